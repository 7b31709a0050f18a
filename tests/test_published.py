"""The four networks, filled from stand-ins for the released files, answer as the released ones did in 2018.

tests/reference/ holds the stand-ins' writer and the answers; its make_checkpoints.py says how both came about.
"""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from saltlib.core import SaltError
from saltlib.models import create_model, prepare
from saltlib.published import keras_sources, load_published

REFERENCE = Path(__file__).parent / "reference"
VARIANTS = {"phalanx_v4": "res34v4", "phalanx_v3": "res34v3", "phalanx_v5": "res34v5"}
PHALANX = json.loads((REFERENCE / "phalanx_checkpoints.json").read_text())
BES = json.loads((REFERENCE / "bes_checkpoint.json").read_text())

spec = importlib.util.spec_from_file_location("make_checkpoints", REFERENCE / "make_checkpoints.py")
stand_ins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_ins)
stand_ins.fill = cache(stand_ins.fill)  # the phalanx files share most of their tensors, each under two names


@pytest.fixture
def path(tmp_path):
    "Where one stand-in goes; it has up to 230 MB, so it does not outlive its test."
    yield tmp_path / "checkpoint"
    (tmp_path / "checkpoint").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["bes_resnext50", *VARIANTS])
def test_answers_as_in_2018(name, path):
    if name == "bes_resnext50":
        stand_ins.write_bes(path)
        expected = [BES["output"]]
    else:
        stand_ins.write_phalanx(VARIANTS[name], path)
        expected = PHALANX[VARIANTS[name]]["outputs"]
    model = load_published(path, name)
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        inputs = prepare(stand_ins.image(101, 101)[None], name)
        outputs = model.forward_all(inputs) if name == "phalanx_v3" else [model(inputs)]
    assert len(outputs) == len(expected)
    for output, reference in zip(outputs, expected):
        # One map: NCHW and the Keras file's NHWC are the same numbers in the same order.
        assert sorted(output.shape) == sorted(reference["shape"])
        values = output.flatten().numpy()
        assert np.abs(values[reference["index"]] - reference["value"]).max() <= 2e-4
        assert values.mean() == pytest.approx(reference["mean"], abs=2e-4) and values.std() == pytest.approx(reference["std"], abs=2e-4)


def phalanx_file(path, variant="res34v5", change=lambda tensors: None):
    "A file of the right names and shapes, all zero: one number for each tensor, as `expand` stores it."
    tensors = {key: torch.zeros(1).expand(shape) for key, shape, *_ in PHALANX[variant]["keys"]}
    change(tensors)
    torch.save(tensors, path)


def test_batch_counters_of_later_torch_are_read(path):
    phalanx_file(
        path,
        change=lambda tensors: tensors.update({name: torch.tensor(7) for name in ("conv1.1.num_batches_tracked", "resnet.bn1.num_batches_tracked")})
    )
    assert load_published(path, "phalanx_v5").trunk.stem[1].num_batches_tracked == 7


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("decode4.bn.weight"), "1 missing: decode4.bn.weight"),
    (lambda t: t.pop("resnet.layer3.5.bn2.bias"), "1 missing: resnet.layer3.5.bn2.bias"),
    (lambda t: t.update({"decode9.bn.weight": torch.zeros(1)}), "1 unknown: decode9.bn.weight"),
    (lambda t: t.update({"logit.0.bias": torch.zeros(64)}), r"1 of another shape: logit.0.bias \(64,\) instead of \(32,\)"),
    (lambda t: t.update({"resnet.bn1.bias": torch.ones(64)}), r"checkpoint, .*resnet.bn1.bias: The file .* under two names with different values"),
    (lambda t: t.update(dict.fromkeys(("conv1.1.bias", "resnet.bn1.bias"), torch.full((64,), torch.nan))), "1 of its tensors hold infinite numbers or none"),
    (lambda t: t.update({"epoch": 3}), "something else than a state dict"),
    (lambda t: t.update({3: torch.zeros(3)}), "something else than a state dict"),
    (lambda t: t.update({"logit.0.bias": torch.zeros(32, dtype=torch.int8)}), "something else than a state dict"),
    (lambda t: t.update({"logit.0.bias": torch.full((32,), -torch.inf)}), "1 of its tensors hold infinite numbers or none, among them head.0.bias"),
    (lambda t: t.update({"logit.0.bias": torch.full((32,), torch.nan)}), "1 of its tensors hold infinite numbers or none, among them head.0.bias"),
    (lambda t: t.update({"logit.0.bias": torch.zeros(32).to_sparse()}), "something else than a state dict"),
    (lambda t: t.update({"logit.0.bias": torch.zeros(32, device="meta")}), "something else than a state dict"),
])
def test_phalanx_files_that_do_not_fit(change, message, path):
    phalanx_file(path, change=change)
    with pytest.raises(SaltError, match=message):
        load_published(path, "phalanx_v5")


def test_a_file_of_another_variant_is_refused(path):
    phalanx_file(path, "res34v4")
    with pytest.raises(SaltError, match=r"15 unknown: decode1.conv1.0.weight.*4 of another shape: conv1.0.weight"):
        load_published(path, "phalanx_v5")


def test_a_file_with_code_in_it_is_refused_and_not_run(path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (path.with_name("harm"),)

    torch.save({"conv1.0.weight": Harmful()}, path)
    with pytest.raises(SaltError, match="not a torch file of plain tensors.*more than tensors and plain values"):
        load_published(path, "phalanx_v4")
    assert not path.with_name("harm").exists()


@pytest.fixture(scope="module")
def empty_bes(tmp_path_factory):
    "A file of the right names and shapes without any numbers in it: HDF5 reads what was never written as 0."
    path = tmp_path_factory.mktemp("bes") / "empty.hdf5"
    layers = {layer["name"]: {name: shape for name, shape, _ in layer["weights"]} for layer in BES["layers"]}
    layers["relu0"] = {}  # real files list layers without weights as well
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([name.encode() for name in layers])
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = np.array([name.encode() for name in weights], dtype="S")
            for name, shape in weights.items():
                group.create_dataset(name, shape, np.float32, chunks=True)
    return path


def test_layers_without_weights_are_passed_over(empty_bes):
    assert load_published(empty_bes, "bes_resnext50").head.weight.eq(0).all()


def reshape(file, name, shape, **more):
    del file[name]
    file.create_dataset(name, shape, np.float32, **(more or {"chunks": True}))


def link_out(file, link):
    "A sound array, but in another file."
    with h5py.File(Path(file.filename).with_name("elsewhere.hdf5"), "w") as other:
        other.create_dataset("kernel", (7, 7, 3, 64), np.float32)
    del file["conv0/conv0/kernel:0"]
    file["conv0/conv0/kernel:0"] = link


@pytest.mark.parametrize("change, message", [
    (lambda file: file["stage2_unit1_conv2_31"].attrs.update(weight_names=np.array([], dtype="S")), "1 missing: stage2_unit1_conv2_31/kernel:0"),
    (
        lambda file: file["conv0"].attrs.update(
            weight_names=np.array([b"conv0/kernel:0", file["conv0"].create_dataset("conv0/bias:0", 64, "f4").name.removeprefix("/conv0/").encode()])
        ),
        "1 unknown: conv0/bias:0",
    ),
    (lambda file: reshape(file, "prediction/prediction/kernel:0", (1, 1, 8, 2)), "1 of another shape: prediction/kernel:0"),
    (lambda file: reshape(file, "conv0/conv0/kernel:0", (10**6, 10**6, 10**6, 64)), "1 of another shape: conv0/kernel:0"),  # would be 10**20 bytes
    (lambda file: file["conv0"].attrs.update(weight_names=np.array([b"conv0/nothing:0"])), "not a whole Keras weights file"),
    (lambda file: file["conv0"].attrs.update(weight_names=np.array([b"conv0"])), "does not hold numbers"),
    (lambda file: file.attrs.update(layer_names=["conv0"]), "layer_names is no list of names of fixed length"),
    (lambda file: file.attrs.pop("layer_names"), "not a whole Keras weights file"),
    (
        lambda file: file.update({"conv1": h5py.ExternalLink("/etc/passwd", "/")}) or file.attrs.update(layer_names=np.array([b"conv1"])),
        "not a whole Keras weights file",
    ),
    (lambda file: link_out(file, h5py.ExternalLink("elsewhere.hdf5", "kernel")), "not a whole Keras weights file"),
    (lambda file: reshape(file, "conv0/conv0/kernel:0", (7, 7, 3, 64), external="/etc/passwd"), "does not hold its numbers in this file"),
    (lambda file: reshape(file, "conv0/conv0/kernel:0", (7, 7, 3, 64), maxshape=(None,) * 4, chunks=(700, 700, 300, 64)), "or in larger pieces than itself"),
])
def test_bes_files_that_do_not_fit(change, message, empty_bes, path):
    shutil.copy(empty_bes, path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(SaltError, match=message):
        load_published(path, "bes_resnext50")


def test_damaged_bes_files_are_refused(empty_bes, path):
    whole = empty_bes.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no numbers here", b""):
        path.write_bytes(damaged)
        with pytest.raises(SaltError, match="not a whole Keras weights file"):
            load_published(path, "bes_resnext50")


def test_every_weight_of_the_keras_file_has_its_place():
    places = {name for source in keras_sources(create_model("bes_resnext50")).values() for name in source.names}
    assert places == {name for layer in BES["layers"] for name, *_ in layer["weights"]}


def test_compact_and_missing_files_are_refused(path):
    with pytest.raises(SaltError, match="compact was not published"):
        load_published(path, "compact")
    with pytest.raises(SaltError, match="does not exist"):
        load_published(path, "phalanx_v3")
