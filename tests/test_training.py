"""What the training notebook can't show without a GPU."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

from saltlib.data import Tiles
from saltlib.synthetic import cut_tiles, make_section
from saltlib.training import ToNetworkInput, fit_phase


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_interrupted_training_goes_on_on_a_gpu(tmp_path):
    image, mask = make_section(seed=3, height_tiles=2, width_tiles=6)
    tiles = Tiles(np.array([f"tile{i:02d}" for i in range(12)]), cut_tiles(image), cut_tiles(mask), np.zeros(12, int))
    settings = dict(model="compact", start="scratch", loss="bce_dice", augment="light", epochs=3, batch_size=4, lr=1e-3, seed=1, skip_easy=0.5, device="cuda")
    before = ToNetworkInput.before_batch

    def pull_the_plug(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        before(self)

    with patch.object(ToNetworkInput, "before_batch", pull_the_plug), pytest.raises(KeyboardInterrupt):
        fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    history = fit_phase(tiles[:8], tiles[8:], tmp_path, **settings)
    assert history["epoch"].tolist() == [0, 1, 2] and np.isfinite(history["train_loss"]).all()
