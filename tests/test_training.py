"""What the training notebook does not show: a step that goes wrong, and a GPU."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from saltlib.core import SaltError, derive_seed, read_torch, set_seed
from saltlib.data import Tiles
from saltlib.losses import LOSSES
from saltlib.synthetic import cut_tiles, make_section
from saltlib.training import Captured, EasyTiles, EpochRate, ToNetworkInput, fit_phase


@contextmanager
def interrupted_in(epoch):
    "A training here ends with Ctrl-C when this epoch begins."
    before = ToNetworkInput.before_batch

    def pull_the_plug(self):
        if self.epoch == epoch:
            raise KeyboardInterrupt
        before(self)

    with patch.object(ToNetworkInput, "before_batch", pull_the_plug), pytest.raises(KeyboardInterrupt):
        yield


@pytest.fixture
def tiles():
    image, mask = make_section(seed=3, height_tiles=2, width_tiles=6)
    return Tiles(np.array([f"tile{i:02d}" for i in range(12)]), cut_tiles(image), cut_tiles(mask), np.zeros(12, int))


def test_weights_that_an_epochs_last_step_spoils_are_not_kept(tiles, tmp_path, monkeypatch):
    "The loss of that step is a number; its gradient is none. And one_cycle leaves a momentum that was set alone."
    batches, loss = [], LOSSES["bce_dice"]

    def spoil(output, target):
        batches.append(torch.is_grad_enabled())
        return (0 * output.mean()).sqrt() if sum(batches) == 4 and batches[-1] else loss(output, target)

    monkeypatch.setitem(LOSSES, "bce_dice", spoil)
    settings = dict(
        model="compact", start="scratch", loss="bce_dice", augment="none", epochs=2, batch_size=4, lr=1e-4, seed=1,
        optimizer={"name": "sgd", "momentum": 0.5, "weight_decay": 0.0}, device="cpu",
    )
    with pytest.raises(SaltError, match="validation loss of epoch 1 became nan"):
        fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    state = read_torch(tmp_path / "checkpoint.pt")
    assert len(state["history"]) == 1 and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert {group["momentum"] for group in state["optimizer"]["param_groups"]} == {0.5}
    assert fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)["valid_loss"].notna().all()  # the loss is as before: the training goes on


def test_published_settings_reach_optimizer_and_network(tiles, tmp_path, monkeypatch):
    "Each cosine cycle begins with a new optimizer; batch norms have the momentum that was set; draws make an epoch longer; each epoch draws anew."
    seen, seeds, before = [], [], EpochRate.before_epoch
    monkeypatch.setattr("saltlib.training.set_seed", lambda seed: seeds.append(seed) or set_seed(seed))

    def look(self):
        before(self)
        norm = next(m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        sampler = self.dls.train.batch_sampler
        seen.append((self.epoch, sampler.epoch, len(self.opt.state_dict()["state"]) > 0, norm.momentum, len(list(sampler))))

    monkeypatch.setattr(EpochRate, "before_epoch", look)
    fit_phase(
        tiles[:4], tiles[4:6], tmp_path, model="compact", start="scratch", loss="bce_dice", augment="none", epochs=2, batch_size=2, lr=1e-3,
        seed=1, draws=3, batch_norm_momentum=0.01, optimizer={"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
        schedule={"name": "cosine", "cycles": 2, "floor": 1e-4}, device="cpu",
    )
    assert seen == [(0, 0, False, 0.01, 6), (1, 1, True, 0.01, 6), (2, 2, False, 0.01, 6), (3, 3, True, 0.01, 6)]
    assert seeds == [1, *(derive_seed(1, "epoch", k) for k in range(4))]


def test_a_damaged_snapshot_of_an_interrupted_training_is_not_used(tiles, tmp_path):
    settings = dict(
        model="compact", start="scratch", loss="bce_dice", augment="none", epochs=1, batch_size=4, lr=1e-3, seed=1,
        schedule={"name": "cosine", "cycles": 3, "floor": 1e-4}, device="cpu",
    )
    with interrupted_in(2):
        fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    snapshot = tmp_path / "weights/snapshot0.safetensors"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SaltError, match="snapshot0.safetensors is missing or damaged.* delete .*checkpoint.pt"):
        fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    snapshot.write_bytes(whole)
    assert fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)["epoch"].tolist() == [0, 1, 2]


def test_a_network_of_three_outputs_is_right_by_its_first():
    "And what is right in validation tells the sampler nothing."
    salt = torch.zeros(2, 1, 4, 4)
    salt[0] = 1
    sampler, callback = SimpleNamespace(easy=np.array([False, False, True, True])), EasyTiles()
    learner = SimpleNamespace(
        dls=SimpleNamespace(train=SimpleNamespace(batch_sampler=sampler)), training=True, pred=(2 * salt - 1, 1 - 2 * salt, None),
        yb=(salt, torch.tensor([2, 0])),
    )
    callback.learn = learner
    callback.before_train()
    callback.after_batch()
    learner.pred, learner.yb = (1 - 2 * salt, None, None), (salt, torch.tensor([3, 1]))
    callback.after_batch()
    learner.training, learner.yb = False, (1 - salt, torch.tensor([3, 1]))
    callback.after_batch()
    callback.after_train()
    assert sampler.easy.tolist() == [True, False, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_interrupted_training_goes_on_on_a_gpu(tiles, tmp_path, monkeypatch):
    "As one does that was neither interrupted nor recorded."
    settings = dict(model="compact", start="scratch", loss="bce_dice", augment="light", epochs=3, batch_size=4, lr=1e-3, seed=1, skip_easy=0.5, device="cuda")
    with interrupted_in(1):
        fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No CUDA graphs")
        history = fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    monkeypatch.setattr(Captured, "before_batch", lambda self: None)
    eager = fit_phase(tiles[:8], tiles[8:], tmp_path / "eager", **settings)
    assert history["epoch"].tolist() == [0, 1, 2] and np.allclose(history["train_loss"], eager["train_loss"], atol=0.02)
