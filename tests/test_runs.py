"""Whole runs on small synthetic data: every step an executed notebook, nothing done twice, nothing lost to a kill."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from filelock import FileLock

from saltlib import core, running
from saltlib.cli import main, show_status
from saltlib.core import SaltError, StepRecord, checksum, gpu_works, read_record, seal
from saltlib.data import PredictionStore, load_tiles, read_folds, read_rle_csv, rle_decode
from saltlib.inference import load_networks, predict_mean
from saltlib.metrics import precision_at_iou
from saltlib.new_tiles import run_members
from saltlib.nursery import fork_kernel, nursery
from saltlib.postprocess import find_sources, straight_masks, straight_rows
from saltlib.recipes import read_recipe, recipe_steps, step_folder, write_recipe
from saltlib.steps import open_step, training_tiles
from saltlib.synthetic import make_dataset

SALT = [Path(sys.executable).with_name("salt")]
SHORT = ["--set", "rounds.*.phases.*.epochs=1", "--set", "rounds.round2.phases.compact.epochs=2", "--set", "rounds.*.phases.*.pseudo_labels={confidence: 0.5}"]


def make_project(folder: Path, n_sections: int = 2, seed: int = 5, **data) -> Path:
    "A project of its own: outputs and data apart, notebooks and recipes of this one."
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs").symlink_to(ROOT / "nbs")
    make_dataset(folder / "data" / "demo", n_sections=n_sections, seed=seed, **data)
    return folder


SECRET = "not-to-be-kept-6b1f"


def salt(project, *args, check=True):
    done = subprocess.run([*SALT, *args], cwd=project, env=os.environ | {"KAGGLE_KEY": SECRET}, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def records(project, recipe="demo"):
    return {str(p.parent.relative_to(project / "outputs" / recipe)): p.stat().st_mtime_ns for p in (project / "outputs" / recipe).rglob("record.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The demo's recipe, one epoch and two, run to its end; made once for all workers, so tests copy it before they change it."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "finished.lock"):
        if not (base / "finished.txt").exists():
            project = make_project(base / "finished", seed=4)  # sections with straight flanks, for the mosaic rules
            (base / "finished.txt").write_text(salt(project, "run", "demo", *SHORT).stdout)
    return base / "finished", (base / "finished.txt").read_text()


@pytest.fixture
def project(finished, tmp_path):
    "A copy of the finished run's project, to be changed."
    return Path(shutil.copytree(finished[0], tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns(".snakemake")))


def reseal(folder):
    "A record that fits results which a test has changed."
    record = json.loads((folder / "record.json").read_text())
    del record["checksum"]
    record["files"] = {name: checksum(folder / name) for name in record["files"]}
    (folder / "record.json").write_text(json.dumps(record | {"checksum": seal(record)}))


def test_every_step_leaves_a_record_and_an_executed_notebook(finished):
    project, _ = finished
    recipe = read_recipe(project / "outputs/demo/recipe.yaml")
    steps = recipe_steps(recipe)
    assert len(steps) == 1 + 2 * (2 + 2 + 1) + 1
    for step in steps:
        folder = step_folder(recipe, step, project / "outputs")
        assert read_record(folder, verify=True)["step"] == step.kind
        notebook = nbformat.read(folder / f"{step.kind}.ipynb", 4)
        assert notebook.metadata.papermill.exception is None and notebook.metadata.papermill.end_time
        outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
        assert any({"image/png", "image/jpeg"} & o.get("data", {}).keys() for o in outputs)
        assert not [o for o in outputs if o.get("name") == "stderr"]
        assert (folder / f"{step.kind}.ipynb").stat().st_size < 1_500_000


def test_no_secret_of_the_environment_is_kept(finished):
    files = [p for p in (finished[0] / "outputs").rglob("*") if p.is_file()]
    assert len(files) > 50 and not [p for p in files if SECRET.encode() in p.read_bytes()]


def corrected(project):
    "The masks that the mosaic rules give to test tiles."
    train = load_tiles(project / "data/demo", "train")
    mosaics = pd.read_csv(project / "outputs/demo/prepare/mosaics.csv", dtype={"id": str})
    return straight_masks(find_sources(mosaics, dict(zip(train.ids, straight_rows(train.masks))), ("published", "continued")), train)


def test_submission_and_report(finished):
    project, _ = finished
    asked = pd.read_csv(project / "data/demo/sample_submission.csv", dtype=str)
    answer = pd.read_csv(project / "outputs/demo/submission.csv", dtype=str, keep_default_na=False)
    assert list(answer.columns) == ["id", "rle_mask"]
    assert sorted(asked["id"]) == list(answer["id"])
    masks = np.array([rle_decode(rle) for rle in answer["rle_mask"]])
    mean = PredictionStore(project / "outputs/demo/round2/ensemble/predictions.zarr").read(answer["id"].to_numpy(str))
    given, expected = corrected(project), mean > 0.5
    rows = np.flatnonzero(answer["id"].isin(list(given)))
    truth = read_rle_csv(project / "data/demo/test_truth.csv", answer["id"][rows].to_numpy(str))
    assert len(rows) > 5 and precision_at_iou(masks[rows], truth).mean() > precision_at_iou(expected[rows], truth).mean() + 0.2
    expected[rows] = [given[id] for id in answer["id"][rows]]
    mean[rows] = expected[rows]
    assert masks.any() and (masks == expected)[np.abs(mean - 0.5) > 1e-3].all()  # the store keeps float16
    effects = pd.read_csv(project / "outputs/demo/round2/ensemble/postprocess.csv", index_col="rules")
    assert list(effects.index[effects["in use"]]) == ["published + continued"] and effects["changed"].iloc[-1] > 0
    first = pd.read_csv(project / "outputs/demo/round1/ensemble/submission.csv", dtype=str, keep_default_na=False)
    labels = pd.read_csv(project / "outputs/demo/round1/ensemble/pseudo_labels/all.csv", dtype=str, keep_default_na=False)
    assert first["rle_mask"].equals(labels["rle_mask"])  # only the last round's submission is corrected
    html = (project / "outputs/demo/report/report.html").read_text()
    assert "Test tiles" in html and "data:image/png;base64" in html
    assert "folds by depth" in html and "beside it" in html and "published + continued" in html
    for said in ("Calibration", "rank correlation of disagreement and error", "90 to 100 %", "Whole sections", 'name="viewport"', "@media print"):
        assert said in html, said
    assert not re.findall(r"""(?:src=|@import |import\(|url\()["']?(?:https?:)?//""", html)  # opens without a network


def test_the_networks_of_a_run_mask_a_folder_of_tiles(finished, tmp_path):
    project, _ = finished
    out = tmp_path / "again.csv"
    salt(project, "predict", "--images", project / "data/demo/test/images", "--models", "demo", "--out", out, "--device", "cpu")
    answers = [pd.read_csv(p, dtype=str, keep_default_na=False) for p in (project / "outputs/demo/submission.csv", out)]
    assert list(answers[0]["id"]) == list(answers[1]["id"])
    masks = [np.array([rle_decode(rle) for rle in a["rle_mask"]]) for a in answers]
    by_networks = ~answers[0]["id"].isin(list(corrected(project)))  # the mosaic rules need a run's data
    assert (masks[0] != masks[1])[by_networks].mean() < 1e-3  # the run keeps its predictions as float16


def test_history_has_a_line_an_epoch_and_progress_is_shown(finished):
    project, out = finished
    history = pd.read_csv(project / "outputs/demo/round1/compact/fold0/train/history.csv")
    assert history["epoch"].tolist() == [0] and history["mAP"].between(0, 1).all()
    assert out.count("| epoch ") == 2 + 2 * 2  # one epoch and two, on two folds
    assert "train round2 compact fold 1 | epoch   0" in out and "prepare | started" in out
    end = out[out.index("demo: all 12 steps are done") :]
    assert "ensemble round2: " in end and "mAP" in end
    for path in re.findall(r"outputs/\S+", end):
        assert list(project.glob(path)), path


def test_executed_train_notebook_tells_the_whole_training(finished):
    project, _ = finished
    folder = project / "outputs/demo/round2/compact/fold1/train"
    text, pictures = "", 0
    for output in (o for c in nbformat.read(folder / "train.ipynb", 4).cells for o in c.get("outputs", [])):
        text += output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text"))
        pictures += "image/png" in output.get("data", {})
    record = read_record(folder)
    for said in (
        "compact from demo/round1/compact/fold1", "seed", record["commit"] or "not in git", record["versions"]["torch"],
        f"mAP {record['metrics']['mAP']:.4f}", "false alarms (share)", "missed bodies (share)", "boundary error (pixels)", "90 to 100 %",
        "tiles/s while learning", "GiB",
    ):
        assert said in text, said
    assert pictures == 5 and record["metrics"]["memory_gib"] > 0.1  # curves, classes, thresholds, best and median, worst
    assert "%|" not in text and "Warning" not in text


def test_runs_are_compared_tile_by_tile(project):
    other = project / "outputs/other"
    shutil.copytree(project / "outputs/demo", other)
    (other / "recipe.yaml").write_text((other / "recipe.yaml").read_text().replace("seed: 2018", "seed: 7"))
    scores = pd.read_csv(table := other / "round2/ensemble/out_of_fold.csv", dtype={"id": str})
    changed, before = scores["id"][3], scores["precision"].copy()
    scores.loc[3, "precision"] = 1 - round(scores["precision"][3])
    scores.to_csv(table, index=False)
    refused = salt(project, "compare", "demo", "outputs/other", check=False)
    assert refused.returncode == 1 and "out_of_fold.csv is missing or no longer what the step wrote" in refused.stderr
    reseal(table.parent)
    text = salt(project, "compare", "demo", "outputs/other", "--out", "outputs/compared.ipynb").stdout
    assert "seed" in text and "2018" in text and "other - demo" in text and changed in text
    assert f"{(scores['precision'] - before).mean():.4f}".rstrip("0") in text
    notebook = nbformat.read(project / "outputs/compared.ipynb", 4)
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])) == 3  # curves, and the changed tile as each run sees it
    refused = salt(project, "compare", "demo", "no_such_run", check=False)
    assert refused.returncode == 1 and "There is no run no_such_run" in refused.stderr


def test_runs_are_averaged(project):
    other = project / "outputs/other"
    shutil.copytree(project / "outputs/demo", other)
    for path in (other / "round2").glob("**/predictions.zarr"):  # a run that says the contrary everywhere
        store = PredictionStore(path)
        for first in range(0, len(store.ids), 64):
            rows = slice(first, min(first + 64, len(store.ids)))
            store.write(rows, 1 - store.read(store.ids[rows]))
    reseal(other / "round2/ensemble")
    demo = pd.read_csv(project / "outputs/demo/round2/ensemble/out_of_fold.csv", dtype={"id": str}).set_index("id")["precision"]
    text = salt(project, "blend", "demo=3", "other", "--out", "outputs/mean").stdout
    mean = pd.read_csv(project / "outputs/mean/out_of_fold.csv", dtype={"id": str}).set_index("id")["weighted mean"]
    assert f"weighted mean: mAP {mean.mean():.4f}" in text and f"demo: mAP {demo.mean():.4f}" in text and "other: mAP" in text
    assert (mean == demo).mean() > 0.9 and list(mean.index) == list(demo.index)  # half precision rounds a pixel away
    one, own = (pd.read_csv(project / "outputs" / run / "submission.csv", dtype=str, keep_default_na=False) for run in ("mean", "demo"))
    masks, expected = (np.array([rle_decode(rle) for rle in table["rle_mask"]]) for table in (one, own))
    assert (one["id"] == own["id"]).all() and expected.any() and (masks == expected).mean() > 0.999
    table = other / "round2/ensemble/out_of_fold.csv"  # as if the other run had fold 1 alone
    own = pd.read_csv(table, dtype={"id": str}).query("fold == 1")
    own.to_csv(table, index=False)
    reseal(table.parent)
    text = salt(project, "blend", "demo", "other=3", "--out", "outputs/contrary").stdout
    assert text.count(f", {len(own)} tiles)") == 3
    contrary = pd.read_csv(project / "outputs/contrary/out_of_fold.csv", dtype={"id": str}).set_index("id")["weighted mean"]
    assert contrary[own["id"]].mean() < 0.5 * demo[own["id"]].mean()
    again = salt(project, "blend", "demo", "other", "--out", "outputs/mean", check=False)
    assert again.returncode == 1 and "not empty" in again.stderr
    store = other / "round2/ensemble/predictions.zarr"
    ids = PredictionStore(store).ids
    shutil.rmtree(store)
    PredictionStore.create(store, np.array(["elsewhere", *ids[1:]]))
    reseal(store.parent)
    strange = salt(project, "blend", "demo", "other", "--out", "outputs/strange", check=False)
    assert strange.returncode == 1 and "other test tiles" in strange.stderr and "2 differ" in strange.stderr
    assert not (project / "outputs/strange").exists()
    (project / "outputs/demo/round2/compact/fold1/predict/predictions.zarr/probs/c/0/0/0").unlink()  # a member's, which zarr would read as zeros
    shutil.copytree(project / "outputs/demo", project / "outputs/again")
    damaged = salt(project, "blend", "demo", "again", "--out", "outputs/lost", check=False)
    assert damaged.returncode == 1 and "is damaged in the predictions of rows 0 to 64 (a file is missing)" in damaged.stderr
    assert [p.name for p in (project / "outputs/lost").iterdir()] == ["blend.ipynb"]  # the same command may be given again


def test_pseudo_labels_of_a_fold_come_from_its_own_models(finished):
    project, _ = finished
    run = project / "outputs/demo"
    for fold in (0, 1):
        table = pd.read_csv(run / f"round1/ensemble/pseudo_labels/fold{fold}.csv", dtype={"id": str, "rle_mask": str}, keep_default_na=False)
        own = PredictionStore(run / f"round1/compact/fold{fold}/predict/predictions.zarr").read(table["id"].to_numpy(str))
        masks = np.array([rle_decode(rle) for rle in table["rle_mask"]])
        not_black = table["unique_pixels"].to_numpy() > 1
        assert (masks == (own > 0.5))[not_black].all()
        learned = json.loads((run / f"round2/compact/fold{fold}/train/record.json").read_text())
        assert "demo/round1/ensemble" in learned["inputs"] and learned["arguments"]["clean_pseudo_labels"]
        alone = json.loads((run / f"round1/compact/fold{fold}/train/record.json").read_text())
        chosen = not_black & (table["confidence"] >= 0.5)
        assert learned["metrics"]["train_tiles"] == alone["metrics"]["train_tiles"] + chosen.sum()
        assert f"(train+pseudo, {chosen.sum()} with pseudo-labels)" in (run / f"round2/compact/fold{fold}/train/train.ipynb").read_text()
        assert "contaminated" not in learned["metrics"]


def test_out_of_fold_predictions_stand_beside_those_of_the_test_tiles(finished):
    project, _ = finished
    run = project / "outputs/demo"
    folds = pd.read_csv(run / "prepare/folds.csv", dtype={"id": str}).set_index("id")["fold"]
    test = set(load_tiles(project / "data/demo", "test").ids)
    for fold in (0, 1):
        store = PredictionStore(run / f"round2/compact/fold{fold}/predict/predictions.zarr")
        assert store.pending() == [] and set(store.ids) == test | set(folds.index[folds == fold])
    scores = pd.read_csv(run / "round2/ensemble/out_of_fold.csv", dtype={"id": str})
    assert set(scores["id"]) == set(folds.index[folds.isin([0, 1])]) and (folds[scores["id"]].to_numpy() == scores["fold"]).all()


def test_second_call_runs_nothing(finished):
    project, _ = finished
    before = records(project)
    again = salt(project, "run", "demo", *SHORT)
    assert records(project) == before and "epoch" not in again.stdout
    assert salt(project, "run", "demo", *SHORT, "--dry-run").stdout == "0 of 12 steps would run.\n"


def test_a_copy_with_any_dates_is_not_made_again(project, finished):
    steps = recipe_steps(read_recipe(project / "outputs/demo/recipe.yaml"))
    for age, step in enumerate(steps):  # each newer than those that read it
        os.utime(step_folder(read_recipe(project / "outputs/demo/recipe.yaml"), step, project / "outputs") / "record.json", (1e9 - age, 1e9 - age))
    for step in steps:  # as if Snakemake had been killed while they were at work, and they had come to their end
        marker = base64.urlsafe_b64encode(
            f"{step_folder(read_recipe(project / 'outputs/demo/recipe.yaml'), step, Path('.')).relative_to('demo')}/record.json".encode()
        ).decode()
        (project / "outputs/demo/.snakemake/incomplete").mkdir(parents=True, exist_ok=True)
        (project / "outputs/demo/.snakemake/incomplete" / marker).touch()
    shutil.rmtree(project / "outputs/demo/report")
    (project / "outputs/demo/submission.csv").unlink()
    before = records(project)
    assert "1 of 12 steps to run" in salt(project, "run", "demo", *SHORT).stdout
    after = records(project)
    assert set(after) - set(before) == {"report"} and {k: after[k] for k in before} == before
    assert (project / "outputs/demo/submission.csv").read_bytes() == (finished[0] / "outputs/demo/submission.csv").read_bytes()


def test_a_round_is_added_to_a_finished_run(tmp_path):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=8)
    text = """
name: grows
data: data/demo
folds: {n: 2, use: [0]}
rounds:
  round1: {phases: {one: {model: compact, epochs: 1, batch_size: 8, lr: 1e-3, loss: bce_dice}}, ensemble: {one: 1}}
"""
    (project / "grows.yaml").write_text(text)
    salt(project, "run", "grows.yaml")
    before, first = records(project, "grows"), (project / "outputs/grows/submission.csv").read_bytes()
    (project / "grows.yaml").write_text(
        text + "  round2: {phases: {two: {model: compact, start: round1/one, epochs: 1, batch_size: 8, lr: 1e-3, loss: lovasz_elu}}, ensemble: {two: 1}}\n"
    )
    assert "outputs/grows/report was made with other settings" in salt(project, "run", "grows.yaml", check=False).stderr
    shutil.rmtree(project / "outputs/grows/report")
    assert "all 8 steps are done" in salt(project, "run", "grows.yaml").stdout
    after = records(project, "grows")
    assert {k for k in before if after[k] == before[k]} == set(before) - {"report"}
    assert (project / "outputs/grows/round1/ensemble/submission.csv").read_bytes() == first != (project / "outputs/grows/submission.csv").read_bytes()
    assert "0 of 8 steps to run" in salt(project, "run", "grows.yaml").stdout


def test_what_a_finished_run_refuses_and_mends(project, monkeypatch, capsys):
    before = records(project)
    monkeypatch.chdir(project)
    (project / "data/broken").mkdir()
    for name in ("train.csv", "sample_submission.csv"):
        shutil.copy(project / "data/demo" / name, project / "data/broken")
    for args, said in {
        ("run", "demo", "--set", "name=mine", "--data", "data/broken", "--dry-run"): "depths.csv",
        ("run", "demo", "--set", "name=mine", "--data", "data/broken"): "depths.csv",
        ("step", "train", "--recipe-file", "outputs/demo/recipe.yaml"): "has no step 'train'",
        ("step", "train", "--recipe-file", "outputs/demo/recipe.yaml", "--round", "../../x", "--phase", "compact", "--fold", "0"): "has no step",
        ("step", "prepare", "--recipe-file", "nbs/runs/recipes/demo.yaml"): "is not the recipe of a run",
        ("run", "demo", *SHORT, "--set", "seed=3", "--dry-run"): "was made with other settings",
        ("run", "demo"): "give this run a name of its own with --set name=",
        ("run", "demo", "--set", "name=mine", "--set", "folds.file=nbs/runs/recipes/demo.yaml"): "demo.yaml",
        **({} if gpu_works() else {("run", "demo", "--set", "name=mine", "--set", "device=cuda"): "Device cuda was asked for, but torch"}),
        ("run", "demo", "--cores", "9999"): "asks for more than this machine has",
        ("run", "demo", *SHORT, "--profile", "nonsense", "--dry-run"): "There is no profile nonsense",
        ("run", "demo", "--set", "name=mine", "--set", "folds.file=nowhere.csv"): "There is no file nowhere.csv",
    }.items():
        assert main(args) == 1 and said in (told := capsys.readouterr().err), (args, told)
    assert salt(project, "run", "demo", "--cores", "0", check=False).returncode == 2
    assert "counted with the competition's" in salt(project, "run", "demo", "--set", "name=mine", "--data", "data/none", "--dry-run").stdout
    assert records(project) == before and sorted(p.name for p in (project / "outputs").iterdir()) == ["demo"]
    page = project / "outputs/demo/report/report.html"
    page.write_text("")
    salt(project, "run", "demo", *SHORT)
    assert "</html>" in page.read_text() and records(project) == before and (project / "outputs/demo/submission.csv").exists()
    for file in (page, page.with_name("report.ipynb")):
        file.unlink()
    assert "1 of 12 steps to run" in salt(project, "run", "demo", *SHORT).stdout
    assert "</html>" in page.read_text() and {k for k, t in records(project).items() if t != before[k]} == {"report"}


def test_a_run_goes_on_if_nobody_reads_its_lines(tmp_path):
    "As behind `| head -1`."
    project = make_project(tmp_path / "project", n_sections=1)
    for said in (b"3 of 12 steps to run", b"folds.csv is missing"):  # the second time it looks once more at what follows
        with subprocess.Popen([*SALT, "run", "demo", "--until", "train", *SHORT], cwd=project, stdout=subprocess.PIPE) as run:
            assert said in run.stdout.readline()
            run.stdout.close()
        assert run.returncode == 0 and sorted(Path(name).name for name in records(project)) == ["prepare", "train", "train"]
        (project / "outputs/demo/prepare/folds.csv").rename(tmp_path / "folds.csv")


def test_a_trainings_record_has_the_score_of_its_networks(finished):
    project, _ = finished
    train = load_tiles(project / "data/demo", "train")
    folds = read_folds(project / "outputs/demo/prepare/folds.csv", train.ids)
    for fold in (0, 1):
        folder, valid = project / f"outputs/demo/round2/compact/fold{fold}/train", train[folds == fold]
        probs = predict_mean(load_networks("compact", [folder / "weights/last.safetensors"]), valid.images, "compact", device="cpu")
        assert read_record(folder)["metrics"]["mAP"] == pytest.approx(precision_at_iou(probs > 0.5, valid.masks).mean(), abs=0.005)


def test_a_machine_without_network_hands_its_results_out_in_pieces(finished, tmp_path):
    project = tmp_path / "there"
    shutil.copytree(finished[0], project, symlinks=True)
    site = project / ".gpu-pack" / "site"
    (site / "bin").mkdir(parents=True)
    (site / "bin" / "salt").symlink_to(SALT[0])
    (site / ".installed").touch()
    packed = subprocess.run(["tar", "--create", "--directory", project / "data" / "demo", "train.csv"], check=True, capture_output=True).stdout
    (project / ".gpu-pack" / "train.tar.00").write_bytes(packed[:1000])
    (project / ".gpu-pack" / "train.tar.01").write_bytes(packed[1000:])
    script = [project / "nbs/runs/gpu_machine.sh", "results", "2"]
    assert "gpu_machine.sh OUT MINUTES COMMAND" in subprocess.run(script, cwd=project, capture_output=True, text=True).stderr
    done = subprocess.run([*script, "run", "demo", *SHORT], cwd=project, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0 and "all 12 steps are done" in done.stdout, done.stdout + done.stderr
    assert (project / "data/train.csv").read_bytes() == (project / "data/demo/train.csv").read_bytes()
    pieces = sorted((project / "results").iterdir())
    assert len(pieces) > 2 and all(piece.stat().st_size <= 16 * 2**20 for piece in pieces)
    subprocess.run(["tar", "--extract", "--directory", tmp_path], input=b"".join(piece.read_bytes() for piece in pieces), check=True)
    trained = sorted((finished[0] / "outputs").rglob("train/record.json"))
    assert len(trained) == 4
    for record in trained:
        assert read_record(tmp_path / record.parent.relative_to(finished[0]), verify=True)["step"] == "train"
    assert not list((tmp_path / "outputs").rglob("predictions.zarr"))


def test_status_of_a_finished_run(finished):
    project, _ = finished
    done = salt(project, "status", "demo")
    assert "12 of 12 steps done" in done.stdout and "missing" not in done.stdout
    (run,) = (line for line in salt(project, "status").stdout.splitlines() if "demo" in line)
    score = read_record(project / "outputs/demo/round2/ensemble")["metrics"]["mAP"]
    assert f"12 of 12 steps done; ensemble round2: mAP {score:.4g}" in run and "done" in run.split("│")[2]


def test_a_damaged_run_hides_no_other(tmp_path):
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    assert "outputs: 0" in salt(tmp_path, "status").stdout
    for name, text in {"broken": "name: [", "mine": (ROOT / "nbs/runs/recipes/demo.yaml").read_text()}.items():
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "recipe.yaml").write_text(text)
    lines = salt(tmp_path, "status").stdout.splitlines()
    assert (
        "outputs: 2" in lines[0] and any("mine" in line and "0 of 12 steps done" in line for line in lines)
        and any("could not be read as YAML" in line for line in lines)
    )


def test_damaged_result_is_refused_where_it_is_read(project):
    weights = project / "outputs/demo/round1/compact/fold0/train/weights/last.safetensors"
    whole = weights.read_bytes()
    predict = ["step", "predict", "--recipe-file", "outputs/demo/recipe.yaml", "--round", "round1", "--phase", "compact", "--fold", "0"]
    shutil.rmtree(project / "outputs/demo/round1/compact/fold0/predict")
    weights.write_bytes(whole[:-1] + b"x")
    refused = salt(project, *predict, check=False)
    assert refused.returncode == 1 and "last.safetensors is missing or no longer what the step wrote" in refused.stderr
    weights.write_bytes(whole)
    image = next((project / "data/demo/test/images").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    refused = salt(project, *predict, check=False)
    assert refused.returncode == 1 and f"{image.name} is truncated" in refused.stderr


def test_damaged_data_are_refused_before_anything_runs(tmp_path):
    project = make_project(tmp_path / "project")
    image = next((project / "data/demo/train/images").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    refused = salt(project, "run", "demo", check=False)
    assert refused.returncode == 1 and image.name in refused.stderr
    assert records(project) == {} and salt(project, "check-data", "data/demo", check=False).returncode == 1


def test_failed_step_shows_in_the_status(tmp_path):
    project = make_project(tmp_path / "project")
    settings = ["--set", "folds={n: 2, by: mosaic, use: [0]}", "--set", "rounds.*.phases.*.lr=1e30"]
    failed = salt(project, "run", "demo", *settings, check=False)
    assert failed.returncode == 1 and "The loss became" in failed.stderr and "train.ipynb" in failed.stderr
    folds, mosaics = (pd.read_csv(project / "outputs/demo/prepare" / name, dtype={"id": str}) for name in ("folds.csv", "mosaics.csv"))
    assert (folds.merge(mosaics, on="id").groupby("mosaic")["fold"].nunique() == 1).all() and set(folds["fold"]) == {0, 1}
    status = salt(project, "status", "demo", check=False)
    assert status.returncode == 1 and "1 of 8 steps done" in status.stdout
    assert "failed" in status.stdout and "The loss became" in status.stdout and "round1/compact/fold0/train/train.ipynb" in status.stdout


def workers(project):
    "Processes that work in the project."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(project):
                found.append(int(process.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("gpus, profile, forked", [([], None, True), (["0"], None, True), ([], "slurm", False)])
def test_kernels_are_forked_but_for_a_cluster(tmp_path, monkeypatch, gpus, profile, forked):
    monkeypatch.chdir(make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4))
    seen = []
    monkeypatch.setattr(running, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(running, "watch", lambda *_: seen.append("SALT_NURSERY" in os.environ))
    if profile:
        monkeypatch.setattr(running.shutil, "which", lambda name: None)
        with pytest.raises(SaltError, match="no command sbatch here"):
            running.run_recipe(running.load_recipe("demo", None, []), profile=profile, quiet=True)
        monkeypatch.setattr(running.shutil, "which", lambda name: name)
    running.run_recipe(running.load_recipe("demo", None, []), profile=profile, quiet=True)
    assert seen == [forked] and "SALT_NURSERY" not in os.environ


def test_steps_share_a_gpu_if_asked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4))
    recipe, commands = running.load_recipe("demo", None, []), []
    monkeypatch.setattr(running, "watch", lambda command, *_: commands.append(command))
    monkeypatch.setattr(running, "visible_gpus", lambda: ["0", "1"])
    running.run_recipe(recipe, per_gpu=3, quiet=True)
    assert commands[0][commands[0].index("--resources") + 1] == "gpu=6"
    shown = subprocess.run([*commands[0], "--dry-run", "--printshellcmds"], capture_output=True, text=True).stdout
    asked = re.findall(r"step .*? (train|predict) .* --per-gpu (\d)", shown)
    assert {kind for kind, _ in asked} == {"train", "predict"} and {n for _, n in asked} == {"3"}, shown
    with pytest.raises(SaltError, match="with --profile a cluster deals out its own"):
        running.run_recipe(recipe, per_gpu=3, profile="slurm", quiet=True)
    with pytest.raises(SaltError, match="--cores counts the cores of this machine, but with --profile"):
        running.run_recipe(recipe, cores=2, profile="slurm", quiet=True)
    monkeypatch.setattr(running, "visible_gpus", lambda: [])
    with pytest.raises(SaltError, match="this run has none: leave it out"):
        running.run_recipe(recipe, per_gpu=3, quiet=True)
    assert len(commands) == 1
    monkeypatch.setattr(running, "usable_cores", lambda: 4)
    running.run_recipe(recipe, cores=3, quiet=True)  # without a GPU, trainings share the cores that were asked for
    assert commands[1][commands[1].index("--cores") + 1] == "3" and "cores=3" in commands[1]


@pytest.mark.skipif(gpu_works(), reason="torch can use this machine's GPU")
def test_a_gpu_that_torch_cannot_use_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4))
    monkeypatch.setattr(running, "watch", None)
    for module in (core, running):
        monkeypatch.setattr(module, "visible_gpus", lambda: ["0"])
    with pytest.raises(SaltError, match="There is a GPU that torch .* can't use"):
        running.run_recipe(running.load_recipe("demo", None, ["device=auto"]), quiet=True)
    assert not (tmp_path / "project/outputs/demo").exists()


def test_a_step_has_its_threads_and_a_place_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4))
    write_recipe(running.load_recipe("demo", None, ["device=auto"]), "outputs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = []

    def execute(notebook, output, parameters, label):
        seen.append(parameters | {"threads": os.environ["OMP_NUM_THREADS"], "gpu": os.environ["CUDA_VISIBLE_DEVICES"]})
        StepRecord(output.parent, "train", {}).finish({}, [])

    monkeypatch.setattr(running, "execute_notebook", execute)
    monkeypatch.setattr(running, "visible_gpus", lambda: ["0", "1"])
    running.run_step("train", "outputs/demo/recipe.yaml", "round1", "compact", 1, threads=3)
    assert seen[0].pop("gpu") in ("0", "1")
    assert seen == [{"recipe_file": "outputs/demo/recipe.yaml", "round": "round1", "phase": "compact", "fold": 1, "threads": "3"}]


def test_trainings_alone_end_with_the_round_before_predictions(tmp_path, monkeypatch):
    "Also where a phase of the next round needs none."
    monkeypatch.chdir(make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4))
    more = "{model: compact, start: round1/compact, epochs: 1, batch_size: 8, lr: 1e-3, loss: bce_dice}"
    recipe = running.load_recipe("demo", None, [f"rounds.round2.phases.more={more}", "rounds.round2.ensemble={compact: 1, more: 1}"])
    commands = []
    monkeypatch.setattr(running, "watch", lambda command, *_: commands.append(command))
    running.run_recipe(recipe, until="train", quiet=True)
    shown = subprocess.run([*commands[0], "--dry-run", "--printshellcmds"], capture_output=True, text=True).stdout
    asked = re.findall(r"step --recipe-file \S+ (\w+)(?: --round (\w+))?", shown)
    assert sorted(asked) == [("prepare", ""), ("train", "round1"), ("train", "round1")], shown
    assert [*map(str, running.steps_until(recipe, "train"))][1:] == [f"train round1 compact fold {k}" for k in (0, 1)]


def test_outputs_on_another_disk_long_names_of_temporary_folders_and_no_home(tmp_path):
    "As on clusters and in containers."
    project = make_project(tmp_path / "project", n_sections=1)
    (disk := tmp_path / "disk" / "results").mkdir(parents=True)
    (project / "outputs").symlink_to(disk)
    (temporary := tmp_path / ("t" * 80)).mkdir()
    env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"} | {"TMPDIR": str(temporary), "HOME": "/proc/none"}
    done = subprocess.run([*SALT, "run", "demo", "--until", "prepare"], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and list(records(project)) == ["prepare"], done.stdout + done.stderr
    shutil.copytree(project / "outputs/demo", project / "outputs/copy", ignore=shutil.ignore_patterns(".snakemake"))
    assert "was demo when its steps were made" in salt(project, "run", "copy", check=False).stderr


def test_a_recipe_is_found_where_the_user_is(tmp_path, monkeypatch, capsys):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4)
    (project / "own").mkdir()
    shutil.copy(ROOT / "nbs/runs/recipes/demo.yaml", project / "own/mine.yaml")
    monkeypatch.chdir(project / "own")
    assert not show_status("mine.yaml") and "0 of 12 steps done" in capsys.readouterr().out


def test_trainings_alone_need_the_folds_and_the_train_tiles(tmp_path):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=8)
    short = ["compact", "--data", "data/demo", "--set", "rounds.*.phases.*.epochs=1"]
    assert "3 of 6 steps would run." in salt(project, "run", *short, "--until", "train", "--dry-run").stdout
    printed = salt(project, "run", *short, "--until", "prepare").stdout
    assert "1 of 6 steps to run" in printed and "1 of 6 steps are done" in printed
    shutil.rmtree(project / "data/demo/test")
    assert "3 of 6 steps are done" in salt(project, "run", *short, "--until", "train").stdout
    done = {step: read_record(project / "outputs/compact" / step) for step in ("prepare", "round1/start/fold0/train", "round1/lovasz/fold0/train")}
    assert all(done.values()) and set(records(project, "compact")) == set(done)


def test_a_run_ends_with_a_round(finished, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(finished[0], project, symlinks=True)
    for gone in ("report", "round2", "round1/ensemble"):
        shutil.rmtree(project / "outputs/demo" / gone)
    (project / "outputs/demo/round1/ensemble").mkdir()
    for left in (".out_of_fold.csv.7.part", "0.5ff1.partial"):  # of an attempt that was killed: ours, and zarr's
        (project / "outputs/demo/round1/ensemble" / left).touch()
    assert "1 of 12 steps would run." in salt(project, "run", "demo", *SHORT, "--until", "round1", "--dry-run").stdout
    assert "6 of 12 steps are done" in salt(project, "run", "demo", *SHORT, "--until", "round1").stdout
    assert (project / "outputs/demo/round1/ensemble/record.json").exists() and not (project / "outputs/demo/round2").exists()
    assert (project / "outputs/demo/submission.csv").exists() and not list((project / "outputs/demo").rglob("*.part*"))  # until a report makes it again
    assert "choose one of prepare, train, round1, round2" in salt(project, "run", "demo", *SHORT, "--until", "round3", check=False).stderr


def test_a_training_needs_only_the_pseudo_labels_of_the_round_before(finished, tmp_path, monkeypatch):
    run = tmp_path / "outputs/demo"
    (tmp_path / "data").symlink_to(finished[0] / "data")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(
        finished[0] / "outputs/demo", run,
        ignore=shutil.ignore_patterns("predictions.zarr", "out_of_fold.csv", "submission.csv", "ends.json", "round2", "report"),
    )
    learned = read_record(finished[0] / "outputs/demo/round2/compact/fold0/train")["metrics"]["train_tiles"]
    assert len(training_tiles(open_step("train", run / "recipe.yaml", "round2", "compact", 0))[0]) == learned
    thrice = read_recipe(run / "recipe.yaml", ["rounds.round2.phases.compact.repeat_train=3"])
    alone = read_record(run / "round1/compact/fold0/train")["metrics"]["train_tiles"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(thrice.model_dump(mode="json")))
    assert len(training_tiles(open_step("train", run / "recipe.yaml", "round2", "compact", 0))[0]) == learned + 2 * alone
    labels = run / "round1/ensemble/pseudo_labels/fold0.csv"
    labels.write_text(labels.read_text() + "\n")
    with pytest.raises(SaltError, match="fold0.csv is missing or no longer what the step wrote"):
        open_step("train", run / "recipe.yaml", "round2", "compact", 0)


def test_one_training_predicts_at_two_sizes_then_at_one(tmp_path):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=8)
    phase = "model: lite2_at_96, start: scratch, epochs: 1, batch_size: 8, lr: 1e-3, loss: bce_dice"
    ask = lambda sizes: [
        "run", "compact", "--data", "data/demo", "--set", f"rounds.round1.phases={{only: {{{phase}, predict_as: [{sizes}]}}}}", "--set",
        "rounds.round1.ensemble={only: 1}", "--until", "round1",
    ]
    salt(project, *ask("lite2_at_96, lite2_at_128"))
    fold, before = project / "outputs/compact/round1/only/fold0", records(project, "compact")
    tiles, (network,) = load_tiles(project / "data/demo", "test"), load_networks("lite2_at_96", [fold / "train/weights/last.safetensors"])
    at = {side: predict_mean([network], tiles.images, f"lite2_at_{side}", device="cpu") for side in (96, 128)}
    stored = lambda: PredictionStore(fold / "predict/predictions.zarr").read(tiles.ids)
    np.testing.assert_allclose(stored(), (at[96] + at[128]) / 2, atol=0.01)
    assert np.abs(at[96] - at[128]).max() > 0.02  # else this test could not tell them apart
    assert [(member.model, member.weight) for member in run_members(project / "outputs/compact")] == [("lite2_at_96", 0.5), ("lite2_at_128", 0.5)]

    refused = salt(project, *ask(""), check=False)
    assert refused.returncode and "fold0/predict was made with other settings" in refused.stderr and "predict_as" in refused.stderr
    shutil.rmtree(fold / "predict")
    salt(project, *ask(""))
    np.testing.assert_allclose(stored(), at[96], atol=0.01)
    assert records(project, "compact")["round1/only/fold0/train"] == before["round1/only/fold0/train"]


@pytest.mark.parametrize("name, threads", [("compact", {"3"}), ("modern", {"1"})])
def test_trainings_that_can_be_at_work_together_share_the_cores(tmp_path, name, threads):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4)
    recipe = read_recipe(ROOT / f"nbs/runs/recipes/{name}.yaml", ["data=data/demo"])
    folder = write_recipe(recipe, project / "outputs").parent
    command = [
        sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--snakefile", ROOT / "nbs/runs/Snakefile", "--directory", folder,
        "--cores", "3", "--config", "gpu=0", "cores=3", "per_gpu=1", f"project={json.dumps([str(ROOT)])}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    given = dict(re.findall(r"step .* train --round round1 --phase (\w+) --fold 0 --threads (\d)", shown))
    assert set(given) == set(recipe.rounds["round1"].phases) and set(given.values()) == threads, shown


@pytest.mark.parametrize("unread", ["", "asked.send(b'17')"])
def test_a_kernel_ends_with_the_process_that_asked_for_it(unread):
    "Also if that one was killed before it read the kernel's answer."
    code = (
        "import socket; from saltlib.nursery import end_with; asked, asking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        f"{unread}; asking.close(); end_with(asked)"
    )
    done = subprocess.run([sys.executable, "-c", code.replace("; ; ", "; ")], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_no_kernel_is_forked_with_a_library_that_has_changed(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "saltlib", tmp_path / "saltlib")
    monkeypatch.chdir(tmp_path)  # where the nursery looks for modules first
    with nursery():
        asked = [sys.executable, "-m", "ipykernel_launcher", "--IPKernelApp.log_level=CRITICAL"], dict(os.environ), tmp_path
        kernel = fork_kernel(*asked)
        assert kernel.poll() is None
        kernel.connection.close()
        (tmp_path / "saltlib/core.py").touch()
        assert fork_kernel(*asked) is None


def test_killed_training_goes_on_to_the_same_result(project, finished):
    before = records(project)
    weights = project / "outputs/demo/round2/compact/fold1/train/weights"
    shutil.rmtree(weights.parent)
    weights.mkdir(parents=True)
    (weights / "snapshot0.safetensors").touch()  # of an earlier training with other settings
    run = subprocess.Popen([*SALT, "run", "demo", *SHORT], cwd=project, start_new_session=True, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "| epoch   0" in line:
            at_work = workers(project)
            assert sum("saltlib.nursery" in Path(f"/proc/{pid}/cmdline").read_text() for pid in at_work) == 2  # the nursery and the kernel forked from it
            for pid in at_work:
                with contextlib.suppress(ProcessLookupError):  # a kernel ends with its step
                    os.kill(pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    deadline = time.time() + 30
    while workers(project) and time.time() < deadline:
        time.sleep(0.2)
    assert workers(project) == []
    assert records(project) == {k: t for k, t in before.items() if k != "round2/compact/fold1/train"}

    out = salt(project, "run", "demo", *SHORT).stdout
    assert [line for line in out.splitlines() if "steps to run" in line] == [
        f"demo: {n} of 12 steps to run, results in outputs/demo/" for n in (1, 1)  # the training, then the report, which shows its times
    ]
    assert "going on after epoch 0" in out and "| epoch   0" not in out and "| epoch   1" in out
    after = records(project)
    # The weights come out as they were, so what was predicted with them stands.
    assert {k for k in after if after[k] != before[k]} == {"round2/compact/fold1/train", "report"} and len(after) == len(before)
    runs = [p / "outputs/demo" for p in (finished[0], project)]
    histories = [pd.read_csv(run / "round2/compact/fold1/train/history.csv").drop(columns=["seconds", "tiles_per_second", "waiting"]) for run in runs]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for name in ("round2/compact/fold1/train/weights/last.safetensors", "submission.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    assert sorted(file.name for file in weights.iterdir()) == ["best.safetensors", "last.safetensors"]
