"""OpenVINO predicts what PyTorch predicts, and whoever does it, an interrupted prediction ends with the same bytes."""

import sys

import numpy as np
import pytest
import torch

import saltlib.inference
from saltlib.core import checksum, half_dtype
from saltlib.data import PredictionStore
from saltlib.inference import ConvRelu, Predictor, Recording, import_openvino, predict, predict_to_store
from saltlib.models import MODELS, Network, create_model, raw_grey
from saltlib.synthetic import cut_tiles, make_section

needs_openvino = pytest.mark.skipif(import_openvino() is None, reason="needs OpenVINO")
IN_BF16 = half_dtype(torch.device("cpu")) == torch.bfloat16


@pytest.fixture
def always(monkeypatch):
    "OpenVINO, however few the tiles are."
    monkeypatch.setattr(saltlib.inference, "WORTH_IT", 0)


@pytest.fixture(scope="module")
def tiles():
    return cut_tiles(make_section(seed=3)[0])


@needs_openvino
@pytest.mark.parametrize("name", ["phalanx_v5", "bes_resnext50", "compact"])
def test_openvino_predicts_what_float32_predicts(always, tiles, name):
    torch.manual_seed(0)
    predictor = Predictor(create_model(name), name, tiles=1, batch_size=1)
    assert predictor.program
    exact = predict(predictor.network, tiles[:1], name, precision="float32")
    assert np.abs(predictor.start(tiles[:1])() - exact).mean() < ((0.001 if name == "compact" else 0.005) if IN_BF16 else 1e-4)


@needs_openvino
@pytest.mark.skipif(not IN_BF16, reason="needs a CPU that computes in bfloat16")
def test_an_encoder_with_depthwise_convolutions_stays_in_float32(always, tiles, monkeypatch):
    parts, to_program = [], saltlib.inference.to_program

    def listed(part, example, views, precision):
        parts.append((type(part).__name__, precision))
        return to_program(part, example, views, precision)

    monkeypatch.setattr(saltlib.inference, "to_program", listed)
    assert Predictor(create_model("compact"), "compact", tiles=1).program
    assert parts == [("EncoderPart", "f32"), ("DecoderPart", "bf16")]


@needs_openvino
def test_order_and_partial_batches_change_nothing(always, tiles):
    network = create_model("compact")
    probs = predict(network, tiles[:7], "compact")
    order = [5, 0, 6, 2]
    assert (predict(network, tiles[order], "compact") == probs[order]).all()
    assert (predict(network, tiles[:1], "compact") == probs[:1]).all()
    one_sided = [predict(network, t, "compact", flip=False) for t in (tiles[:7], tiles[:7, :, ::-1])]
    assert np.abs((one_sided[0] + one_sided[1][:, :, ::-1]) / 2 - probs).max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["phalanx_v5", "bes_resnext50", "compact"])
def test_a_gpu_replays_what_it_recorded(tiles, name, tmp_path):
    torch.manual_seed(0)
    networks = [create_model(name), create_model(name)]
    exact = [predict(network, tiles[:8], name, device="cpu", precision="float32") for network in networks]
    predictor = Predictor(networks[0], name, tiles=8, device="cuda", batch_size=3)  # two full batches and one of 2
    for _ in range(2):
        assert np.abs(predictor.start(tiles[:8])() - exact[0]).mean() < 0.005
    assert isinstance(predictor.recorded, Recording)
    assert name == "compact" or any(isinstance(module, ConvRelu) for module in predictor.network.modules())
    many = np.concatenate([tiles[:8]] * 20)
    store = PredictionStore.create(tmp_path / "store", np.arange(160).astype(str))
    list(predict_to_store(networks, many, [name], store, device="cuda"))  # two recordings, which share their memory, by turns
    assert np.abs(store.read(store.ids) - np.concatenate([sum(exact) / 2] * 20)).mean() < 0.005


def test_without_openvino_pytorch_predicts(always, tiles, monkeypatch):
    network = create_model("compact")
    monkeypatch.setitem(sys.modules, "openvino", None)
    predictor = Predictor(network, "compact", tiles=3)
    assert predictor.program is None
    monkeypatch.setattr(saltlib.inference, "WORTH_IT", np.inf)
    assert (predictor.start(tiles[:3])() == predict(network, tiles[:3], "compact")).all()


def test_importing_openvino_reports_nothing():
    import_openvino()
    assert sys.modules["openvino_telemetry"] is None


class Small(torch.nn.Module):
    "Two layers."

    def __init__(self):
        super().__init__()
        self.down, self.up = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ConvTranspose2d(8, 1, 2, stride=2)

    def forward(self, x):
        return self.up(torch.relu(self.down(x / 255)))


@pytest.mark.parametrize("limit", [0, np.inf], ids=["openvino", "pytorch"])
def test_an_interrupted_store_ends_with_the_same_bytes(tiles, monkeypatch, tmp_path, limit):
    monkeypatch.setattr(saltlib.inference, "WORTH_IT", limit)
    monkeypatch.setitem(MODELS, "small", Network(Small, None, 96, (0, 0), "reflect", raw_grey, False))
    many = np.concatenate([tiles] * 4)[:150]  # three pieces, the last of 22 tiles
    ids = np.array([f"t{k}" for k in range(len(many))])
    torch.manual_seed(0)
    networks = [Small(), Small()]
    stores = []
    for name, stop in (("whole", None), ("twice", 1)):
        store = PredictionStore.create(tmp_path / name, ids)
        for done in predict_to_store(networks, many, ["small"], store, device="cpu"):
            if stop:
                break
        if stop:
            assert done == 64 and store.pending()
            store = PredictionStore.create(tmp_path / name, ids)
            assert list(predict_to_store(networks, many, ["small"], store, device="cpu")) == [128, 150]
        assert store.pending() == []
        stores.append(checksum(tmp_path / name))
    assert stores[0] == stores[1]


def test_converted_once_for_all_pieces(tiles, always, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(saltlib.inference, "compile_network", lambda *args: calls.append(args))
    monkeypatch.setitem(MODELS, "small", Network(Small, None, 96, (0, 0), "reflect", raw_grey, False))
    store = PredictionStore.create(tmp_path / "store", np.arange(150).astype(str))
    assert list(predict_to_store([Small()], np.concatenate([tiles] * 4)[:150], ["small"], store, device="cpu")) == [64, 128, 150]
    assert len(calls) == 1
