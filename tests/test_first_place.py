"""The three published rounds, shortened, on synthetic data: from folds to the submission, as one graph."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from test_runs import make_project, records, salt

from saltlib.core import read_record
from saltlib.data import PredictionStore
from saltlib.ensemble import read_ends
from saltlib.new_tiles import run_members
from saltlib.recipes import is_contaminated, read_recipe, recipe_steps, step_folder

PUBLISHED = ["id", "unique_pixels", "mask_pixels", "confidence"]


def shortened(project: Path, name: str, **changes) -> Path:
    "first_place with an epoch a cycle and batches of two tiles, from random weights, on two folds; every pseudo-label counts."
    recipe = yaml.safe_load((ROOT / "nbs/runs/recipes/first_place.yaml").read_text())
    recipe |= {"name": name, "data": "data/demo", "device": "cpu", "folds": {"n": 2, "use": [0, 1]}} | changes
    for round_ in recipe["rounds"].values():
        for phase in round_["phases"].values():
            phase |= {"epochs": 1, "batch_size": 2, "start": phase["start"].replace("imagenet", "scratch"), "fold_snapshots": {}}
            if "pseudo_labels" in phase:
                phase["pseudo_labels"] = phase["pseudo_labels"] | {"confidence": 0}
    (project / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return project / f"{name}.yaml"


def one_of_each_kind(path: Path) -> None:
    "Leave one phase of each kind a round: plateau, cosine, snapshots, shared; one cycle where the number does not matter."
    recipe = yaml.safe_load(path.read_text())
    first, second, third = (round_["phases"] for round_ in recipe["rounds"].values())
    for phases, names in ((first, ("bes_2", "bes_4", "bes_5")), (second, ("bes_1", "bes_3", "bes_4", "bes_5"))):
        for name in names:
            del phases[name]
    first["bes_3"]["start"], second["bes_2"]["start"] = "round1/bes_1", "round2/bes_0"
    for phase, cycles, weights in (
        (first["phalanx_v4"], 1, [0]), (second["phalanx_v3"], 1, [0]), (third["phalanx_v5_pre"], 1, "last"), (third["phalanx_v5"], 3, [1, 2]),
    ):
        phase |= {"schedule": phase["schedule"] | {"cycles": cycles}, "weights": weights}
    for name, members in (("round1", {"bes_3": 1}), ("round2", {"bes_2": 3}), ("round3", {"round2/bes_2": 3})):
        recipe["rounds"][name]["ensemble"]["bes"]["members"] = members
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def check_run(project: Path, name: str) -> None:
    "Every step has its record and its executed notebook; the submission has every tile; pseudo-label files are the published ones."
    run = project / "outputs" / name
    recipe = read_recipe(run / "recipe.yaml")
    for step in recipe_steps(recipe):
        folder = step_folder(recipe, step, project / "outputs")
        record = read_record(folder, verify=True)
        assert record["metrics"].get("contaminated", False) == (is_contaminated(recipe, step) and "mAP" in record["metrics"])
        notebook = nbformat.read(folder / f"{step.kind}.ipynb", 4)
        assert notebook.metadata.papermill.exception is None and notebook.metadata.papermill.end_time
        assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
        assert not (folder / "checkpoint.pt").exists()
    asked, answer = (pd.read_csv(p, dtype=str, keep_default_na=False)["id"] for p in (project / "data/demo/sample_submission.csv", run / "submission.csv"))
    assert sorted(asked) == list(answer)
    tables = list(run.glob("*/ensemble/pseudo_labels/*.csv"))
    assert len(tables) == 3 * (1 + recipe.clean_pseudo_labels * len(recipe.folds.use))
    for table in tables:
        labels = pd.read_csv(table, dtype={"id": str})
        assert list(labels.columns[:4]) == PUBLISHED and list(labels["id"]) == list(answer)
        assert labels["confidence"].between(0, 1).all()


BES = {
    "model": "bes_resnext50", "optimizer": {"name": "rmsprop", "rho": 0.9, "eps": 1e-7, "weight_decay": 0}, "draws": 2, "batch_norm_momentum": 0.01,
    "augment": "bes", "black_tiles": "nowhere", "dropout": 0.2,
}
PHALANX = {
    "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4}, "draws": None, "batch_norm_momentum": None, "augment": "phalanx",
    "black_tiles": "everywhere",
}


def plateau(factor, patience, floor, stop):
    return {"schedule": {"name": "plateau", "factor": factor, "patience": patience, "floor": floor, "stop": stop}, "weights": "best"}


def cosine(cycles, floor, weights):
    return {"schedule": {"name": "cosine", "cycles": cycles, "floor": floor}, "weights": weights}


def labels(confidence, black=False, deal=False):
    return {"pseudo_labels": {"confidence": confidence, "black": black, "deal": deal}}


# The table of the method, section 6, with the pseudo-labels of section 7: start, epochs of a cycle, lr, loss, batch, and what else belongs to a row.
TABLE = {
    "round1/bes_1": ("imagenet", 125, 1e-4, "bce_dice", 24, BES | plateau(0.25, 10, 6.25e-6, 20) | {"data": "train"}),
    "round1/bes_2": ("round1/bes_1", 125, 5e-5, "lovasz_elu", 24, BES | plateau(0.5, 7, 6.25e-6, 15) | {"data": "train"}),
    **{f"round1/bes_{k}": (f"round1/bes_{k - 1}", 40, 1e-4, "lovasz_elu", 24, BES | cosine(1, 0, "last") | {"data": "train"}) for k in (3, 4, 5)},
    "round1/phalanx_v4": ("imagenet", 50, 0.012, "lovasz_relu", 18, PHALANX | cosine(6, 0.001, [1, 2, 3, 4, 5]) | {"model": "phalanx_v4", "data": "train"}),
    "round2/bes_0": ("imagenet", 40, 1e-4, "bce_dice", 28, BES | cosine(1, 0, "last") | labels(0.9) | {"data": "pseudo", "shared": True}),
    "round2/bes_1": ("round2/bes_0", 40, 5e-5, "lovasz_elu", 28, BES | cosine(1, 0, "last") | labels(0.9) | {"data": "pseudo", "shared": True}),
    "round2/bes_2": ("round2/bes_1", 125, 5e-5, "lovasz_elu", 28, BES | plateau(0.5, 8, 1.25e-5, 15) | {"data": "train", "shared": False}),
    **{
        f"round2/bes_{k}": (f"round2/bes_{k - 1}", epochs, 5e-5, "lovasz_elu", 28, BES | cosine(1, 0, "last") | {"data": "train"})
        for k, epochs in ((3, 20), (4, 20), (5, 25))
    },
    "round2/phalanx_v3": (
        "imagenet", 50, 0.012, "three_output", 18,
        PHALANX | cosine(4, 0.001, [0, 1, 2, 3]) | labels(0.97, deal=True) | {"model": "phalanx_v3", "data": "train+pseudo", "dropout": 0.4},
    ),
    "round3/phalanx_v5_pre": (
        "imagenet", 50, 0.01, "lovasz_relu", 64,
        PHALANX | cosine(3, 0.001, "last") | labels(0, black=True) | {"model": "phalanx_v5", "data": "pseudo", "shared": True, "dropout": 0},
    ),
    "round3/phalanx_v5": (
        "round3/phalanx_v5_pre", 50, 0.01, "lovasz_relu", 64,
        PHALANX | cosine(4, 0.001, [0, 1, 2, 3]) | {
            "model": "phalanx_v5", "data": "train", "shared": False, "fold_snapshots": {"3": [0, 1, 2], "4": [0, 1, 2]},
        },
    ),
}


def test_the_recipe_is_the_published_table():
    recipe = read_recipe(ROOT / "nbs/runs/recipes/first_place.yaml").model_dump(mode="json")
    phases = {f"{name}/{phase}": settings for name, round_ in recipe["rounds"].items() for phase, settings in round_["phases"].items()}
    assert set(phases) == set(TABLE)
    for name, (start, epochs, lr, loss, batch_size, more) in TABLE.items():
        row = {"start": start, "epochs": epochs, "lr": lr, "loss": loss, "batch_size": batch_size} | more
        assert {key: phases[name][key] for key in row} == row, name
    bes = {"bes_2": 3, "bes_3": 1, "bes_4": 1, "bes_5": 1}
    groups = {
        "round1": (dict.fromkeys(bes, 1), "phalanx_v4"), "round2": (bes, "phalanx_v3"),
        "round3": ({f"round2/{k}": v for k, v in bes.items()}, "phalanx_v5")
    }
    for name, (own, phalanx) in groups.items():
        assert recipe["rounds"][name]["ensemble"] == {"bes": {"members": own, "stretch": False}, "phalanx": {"members": {phalanx: 1}, "stretch": True}}
    assert (
        recipe["folds"]["n"] == 5 and recipe["folds"]["use"] == [0, 1, 2, 3, 4] and recipe["folds"]["by"] == "depth"
        and recipe["postprocess"] == ["published"]
    )


FEW = dict(n_sections=1, height_tiles=2, train_share=0.5, black_share=0)  # half of the tiles with masks


def test_three_rounds_with_one_phase_of_each_kind(tmp_path):
    project = make_project(tmp_path / "project", width_tiles=3, **FEW)
    path = shortened(project, "kinds", clean_pseudo_labels=False, folds={"n": 2, "use": [1]})
    one_of_each_kind(path)
    plan = salt(project, "run", path, "--dry-run").stdout
    assert "18 of 18 steps would run." in plan and "train round2 bes_0 shared" in plan
    assert "phalanx_v3: at most" in plan and "8 stores" in plan and re.search(r"at most [\d.]+ [kMG]B of disk", plan)
    assert "GPU-hours" not in plan  # nothing was measured on a GPU here

    salt(project, "run", path)
    check_run(project, "kinds")
    run = project / "outputs/kinds"
    assert sorted(f.stem for f in (run / "round3/phalanx_v5/fold1/train/weights").iterdir()) == ["best", "last", "snapshot0", "snapshot1", "snapshot2"]
    predicted = json.loads((run / "round3/phalanx_v5/fold1/predict/record.json").read_text())
    assert predicted["arguments"]["weights"] == ["weights/snapshot1.safetensors", "weights/snapshot2.safetensors"] and predicted["metrics"]["networks"] == 2
    assert not (run / "round3/bes_2").exists()  # round 3 reads round 2's predictions
    assert PredictionStore(run / "round3/ensemble/predictions.zarr").pending() == []
    ends = {member.group: member.ends for member in run_members(run)}
    assert ends["bes"] == (0, 1) and ends["phalanx"] == read_ends(run / "round3/ensemble/ends.json")[list(ends).index("phalanx")][None] != (0, 1)

    status = salt(project, "status", "kinds").stdout
    marked = [line for line in status.splitlines() if "contaminated True" in line]
    assert len(marked) == 3 + 2 + 2 and not any("round1" in line for line in marked)
    assert "contaminated" in (run / "report/report.html").read_text()
    before = records(project, "kinds")
    assert "0 of 18 steps to run" in salt(project, "run", path).stdout and records(project, "kinds") == before


def test_the_recipe_of_the_long_test_is_valid(tmp_path):
    assert len(recipe_steps(read_recipe(shortened(tmp_path, "whole")))) == 57


@pytest.mark.full
def test_every_phase_on_two_folds(tmp_path):
    project = make_project(tmp_path / "project", width_tiles=4, **FEW)
    path = shortened(project, "whole")
    salt(project, "run", path)
    check_run(project, "whole")
    run, before = project / "outputs/whole", records(project, "whole")
    assert len(before) == 1 + 2 * 15 + 2 * 11 + 3 + 1
    assert "0 of 57 steps to run" in salt(project, "run", path).stdout and records(project, "whole") == before
    shutil.rmtree(run / "round2/bes_3/fold1/predict/predictions.zarr")
    salt(project, "run", path)
    after = records(project, "whole")
    # The same networks predict the same, so all that was made of it stands.
    assert {k for k in after if after[k] != before[k]} == {"round2/bes_3/fold1/predict"} and len(after) == len(before)
