"""`salt predict`: new tiles through the released files and through the networks of a run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_published import stand_ins

from saltlib import new_tiles
from saltlib.core import SaltError
from saltlib.data import read_rle_csv
from saltlib.inference import predict
from saltlib.models import create_model, save_weights
from saltlib.new_tiles import Member, find_members, predict_folder
from saltlib.published import load_published
from saltlib.synthetic import cut_tiles, make_section

@pytest.fixture
def tiles(tmp_path):
    "Three tiles of a synthetic section and a black one, as a folder."
    images = cut_tiles(make_section(seed=2, height_tiles=1, width_tiles=4)[0])
    images[3] = 0
    (tmp_path / "tiles").mkdir()
    for k, image in enumerate(images):
        cv2.imwrite(str(tmp_path / "tiles" / f"t{k}.png"), image)
    return tmp_path / "tiles", images


@pytest.fixture
def released(tmp_path):
    "Stand-ins for one released file of each kind, under its published name."
    phalanx = tmp_path / "released/phalanx/model_128_res34v501.pth"
    bes = tmp_path / "released/bes/unet_resnext_50_lovasz_stage_2_2/fold_0.hdf5"
    for path in (phalanx, bes):
        path.parent.mkdir(parents=True)
    stand_ins.write_phalanx("res34v5", phalanx)
    stand_ins.write_bes(bes)
    yield tmp_path / "released"
    shutil.rmtree(tmp_path / "released")  # 200 MB


def test_released_files_are_combined_by_the_published_weights(tiles, released, tmp_path):
    folder, images = tiles
    predict_folder(folder, released, tmp_path / "new.csv", device="cpu")
    members = {m.group: m for m in find_members(released)}
    phalanx, bes = (predict(load_published(members[g].path, members[g].model), images, members[g].model) for g in ("phalanx", "bes"))
    if phalanx.min() < 0.5 < phalanx.max():
        phalanx = (phalanx - phalanx.min()) / (phalanx.max() - phalanx.min())
    bes[3] = 0
    ids = np.array([f"t{k}" for k in range(4)])
    assert (read_rle_csv(tmp_path / "new.csv", ids) == ((phalanx + bes) / 2 > 0.5)).all()
    assert not list(tmp_path.glob(".new.csv*"))


def test_a_tile_has_the_same_mask_in_any_company(tiles, tmp_path, monkeypatch):
    "A run's networks are stretched as they were over its own test tiles, not over those in the folder."
    folder, images = tiles
    torch.manual_seed(1)
    network = create_model("compact")
    save_weights(network, tmp_path / "last.safetensors")
    probs = predict(network, images, "compact", device="cpu")
    low, high = 0.05, 0.52  # so 0.285 becomes 0.5
    monkeypatch.setattr(new_tiles, "find_members", lambda _: [Member(tmp_path / "last.safetensors", "compact", "all", 1.0, (low, high))])
    predict_folder(folder, "", tmp_path / "all.csv", device="cpu")
    for k in range(1, 4):
        (folder / f"t{k}.png").unlink()
    predict_folder(folder, "", tmp_path / "one.csv", device="cpu")
    masks = [read_rle_csv(tmp_path / name, np.array(["t0"]))[0] for name in ("all.csv", "one.csv")]
    assert np.array_equal(*masks) and (masks[0] != ((probs[0] - low) / (high - low) > 0.5)).mean() < 1e-3
    assert (masks[0] != (probs[0] > 0.5)).mean() > 0.01


def test_bad_input_is_refused_before_work(tiles, tmp_path):
    folder, _ = tiles
    (tmp_path / "empty").mkdir()
    for images, models, out, message in [
        (folder, tmp_path / "empty", tmp_path / "new.csv", "holds no networks"),
        (folder, tmp_path / "empty", tmp_path, "can't be written"),
        (folder, tmp_path / "empty", tmp_path / "none" / "new.csv", "can't be written"),
    ]:
        with pytest.raises(SaltError, match=message):
            predict_folder(images, models, out)
    settings = tmp_path / "SETTINGS.json"
    settings.write_text(json.dumps({"images": str(folder), "models": str(tmp_path / "empty"), "out": str(tmp_path / "new.csv")}))
    done = subprocess.run([Path(sys.executable).with_name("salt"), "predict", "--settings", settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds no networks" in done.stderr
    done = subprocess.run([Path(sys.executable).with_name("salt"), "predict", "--settings", tmp_path / "none.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "none.json is no file of settings" in done.stderr


def test_a_damaged_network_is_refused_before_another_works(tiles, released, tmp_path, capsys):
    bes = next(released.rglob("*.hdf5"))
    bes.write_bytes(bes.read_bytes()[:100_000])
    with pytest.raises(SaltError, match="fold_0.hdf5 is not a whole Keras weights file"):
        predict_folder(tiles[0], released, tmp_path / "new.csv", device="cpu")
    assert "network 1" not in capsys.readouterr().out and not list(tmp_path.glob(".new.csv*"))


def test_a_terminated_prediction_leaves_nothing(tiles, released, tmp_path):
    code = """
import sys, time
from saltlib import cli, inference
def work(*_):
    print("at work", flush=True)
    time.sleep(60)
inference.Predictor.start = work
sys.exit(cli.main(["predict", "--device", "cpu", *sys.argv[1:]]))
"""
    before = set(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--images", tiles[0], "--models", released, "--out", tmp_path / "new.csv"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    while (line := process.stdout.readline()) != "at work\n":
        assert line  # else it ended before
    assert set(tmp_path.iterdir()) == before | {tmp_path / ".new.csv.part"}
    process.terminate()
    assert process.communicate(timeout=30)[1].splitlines()[-1] == "salt predict: stopped." and process.returncode == 130
    assert set(tmp_path.iterdir()) == before


def test_members_count_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(new_tiles, "load_member", lambda member: {"a": 0.9, "b": 0.1}[member.path.name])
    sees = lambda value, *_, **__: SimpleNamespace(start=lambda tiles: lambda: np.full(tiles.shape, value, np.float32))
    monkeypatch.setattr("saltlib.inference.Predictor", sees)
    tiles = np.tile(np.arange(101, dtype=np.uint8), (2, 101, 1))
    tiles[1] = 0
    members = [Member(Path("a"), "compact", "all", 3.0), Member(Path("b"), "compact", "all", 1.0)]
    (probs,) = new_tiles.predict_members(members, tiles, tmp_path, "cpu")
    assert np.allclose(probs[0], 0.7) and (probs[1] == 0).all()  # (3 * 0.9 + 0.1) / 4; a black tile has no salt
