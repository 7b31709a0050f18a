"""Damaged results, strangers' files, and two at once: what is broken is found and named, and nothing that is read is run."""

import contextlib
import html
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
import zarr
from conftest import ROOT
from test_clusters import SINGLE
from test_runs import SALT, make_project, workers

from saltlib import running
from saltlib.cli import list_runs
from saltlib.core import SaltError, StepRecord, read_record, write_atomic
from saltlib.data import PredictionStore, load_tiles
from saltlib.models import load_weights, save_weights
from saltlib.new_tiles import run_members
from saltlib.recipes import (
    Step, check_settings, input_checksums, parse_recipe, read_recipe, recipe_folder, recipe_steps, step_arguments, step_folder, write_recipe,
)
from saltlib.running import execute_notebook, hold, outdated_lines, outdated_steps, run_recipe, status_rows
from saltlib.steps import RunStep, note_tiles, open_run
from saltlib.synthetic import make_dataset
from saltlib.training import read_checkpoint


def flip(path, rng):
    "Change one bit of a file."
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# Damaged state

RESULTS = ("one.csv", "two/three.bin", "weights/last.safetensors")


def finish(recipe, step, outputs, *more):
    "As a run notebook does at its end."
    record = StepRecord(step_folder(recipe, step, outputs), step.kind, step_arguments(recipe, step))
    record.finish({"mAP": time.time()}, ["one.csv", "two", "weights/last.safetensors", *more], input_checksums(recipe, step, outputs))


@pytest.fixture
def run(tmp_path):
    "A finished run whose results are a few bytes each."
    path = tmp_path / "single.yaml"
    path.write_text(SINGLE)
    recipe, outputs = read_recipe(path), tmp_path / "outputs"
    write_recipe(recipe, outputs)
    for step in recipe_steps(recipe):
        folder = step_folder(recipe, step, outputs)
        for name in RESULTS:
            write_atomic(folder / name, f"{step} {name}")
        write_atomic(folder / f"{step.kind}.ipynb", "{}")
        finish(recipe, step, outputs)
    assert outdated_steps(recipe, outputs) == {}
    return recipe, outputs


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("damage", [lambda path: flip(path, random.Random(3)), lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_damaged_result_is_named_and_made_again(run, name, damage):
    recipe, outputs = run
    steps = recipe_steps(recipe)
    damage(step_folder(recipe, steps[1], outputs) / name)
    assert list(outdated := outdated_steps(recipe, outputs)) == [steps[1]]
    damaged, following = outdated_lines(recipe, outdated, steps, outputs)
    assert re.match(
        rf"\S*/{name.removesuffix('/three.bin')} is missing or no longer what the step 'train round1 compact fold 0' wrote, which is done again.$", damaged,
    )
    assert following == f"Finished steps that wait for this and are kept if it comes out as it was: {len(steps) - 2}, trainings among them: 0."


def test_what_follows_stands_if_a_step_comes_out_as_it_was(run):
    recipe, outputs = run
    steps = recipe_steps(recipe)
    training, predicting = steps[1:3]
    for name, content, follow in (
        ("weights/last.safetensors", f"{training} weights/last.safetensors", []),  # the same again
        ("one.csv", "other times", [steps[-1]]),  # a history: the report shows it, predictions don't read it
        ("weights/last.safetensors", "other weights", [predicting, steps[-1]]),
    ):
        write_atomic(step_folder(recipe, training, outputs) / name, content)
        finish(recipe, training, outputs)
        assert list(outdated_steps(recipe, outputs)) == follow
        finish(recipe, steps[-1], outputs)


def test_a_step_that_read_something_else_is_done_again(run):
    recipe, outputs = run
    first, *others = recipe_steps(recipe)
    write_atomic(step_folder(recipe, first, outputs) / "folds.csv", "other folds")
    finish(recipe, first, outputs, "folds.csv")
    outdated = outdated_steps(recipe, outputs)
    assert list(outdated) == others
    again = sum(step.kind == "train" for step in others)
    assert outdated_lines(recipe, outdated, others, outputs) == [f"Finished trainings whose inputs are no longer the same, and that are done again: {again}."]


def test_other_mosaics_cost_no_training(run):
    "Such as a changed rule finds, when they were lost and are made again."
    recipe, outputs = run
    first, training, predicting, *others = recipe_steps(recipe)
    write_atomic(step_folder(recipe, first, outputs) / "mosaics.csv", "other mosaics")
    finish(recipe, first, outputs, "mosaics.csv")
    assert list(outdated_steps(recipe, outputs)) == others and {step.kind for step in others} == {"ensemble", "report"}


@pytest.fixture
def project(run, tmp_path, monkeypatch):
    "The folder of a project with that run, to work in."
    monkeypatch.chdir(tmp_path)
    for needed in ("settings.ini", "nbs/index.md"):
        write_atomic(needed, "")
    return tmp_path


def test_what_does_not_run_now_stays(run, project, capsys):
    recipe, outputs = run
    _, training, predicting, *_ = steps = recipe_steps(recipe)
    for step in (training, predicting, steps[-1]):
        (step_folder(recipe, step, outputs) / "one.csv").unlink()
    (step_folder(recipe, training, outputs) / "record.json").unlink()
    for file in (interrupted := step_folder(recipe, training, outputs) / "checkpoint.pt", submission := outputs / "single/submission.csv"):
        write_atomic(file, "made before")
    before = sorted(path for path in outputs.rglob("*") if path.is_file() and path.name != ".lock")
    run_recipe(recipe, until="prepare")
    assert "0 of" in capsys.readouterr().out
    assert [path for path in before if not path.exists()] == [] and interrupted.exists() and submission.exists()


def test_a_run_that_ends_early_does_not_call_the_outdated_done(run, project, capsys):
    recipe, outputs = run
    first, *others = recipe_steps(recipe)
    write_atomic(step_folder(recipe, first, outputs) / "folds.csv", "other folds")
    finish(recipe, first, outputs, "folds.csv")
    run_recipe(recipe, until="prepare")
    said = capsys.readouterr().out
    again = sum(step.kind == "train" for step in others)
    assert f"no longer the same, and that are done again by a run without --until: {again}.\n" in said and "0 of" in said
    assert f"mean: 1 of {len(others) + 1} steps are done" in said.replace(recipe.name, "mean")
    assert f"outdated steps, which the same command without --until makes again: {len(others)}\n" in said
    for read in (lambda: open_run(recipe.name, outputs), lambda: run_members(outputs / recipe.name)):
        with pytest.raises(SaltError, match="is outdated: results that it was made from .* Bring the run up to date with salt run .*outputs/single"):
            read()


def test_scores_of_networks_that_are_replaced_are_not_shown(run, project, capsys):
    recipe, outputs = run
    training, predicting = recipe_steps(recipe)[1:3]
    run_recipe(recipe, until="train")
    assert "ensemble round1: mAP" in capsys.readouterr().out
    write_atomic(step_folder(recipe, training, outputs) / "weights/last.safetensors", "other weights")
    finish(recipe, training, outputs)
    run_recipe(recipe, until="train")
    list_runs()
    said = capsys.readouterr().out
    assert "3 of 5 steps are done" in said and "3 of 5 steps done" in said and "ensemble round1: mAP" not in said


def test_networks_are_not_stretched_as_others_were(run):
    recipe, outputs = run
    plain = recipe.model_dump(mode="json")
    plain["rounds"]["round1"]["ensemble"] = {"compact": {"members": {"compact": 1}, "stretch": True}}
    recipe = parse_recipe(plain, "single.yaml")
    write_atomic(recipe_folder(recipe, outputs) / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json")))
    _, training, predicting, ensemble, _ = recipe_steps(recipe)
    write_atomic(step_folder(recipe, ensemble, outputs) / "ends.json", "[[[0, 0, 0.9], [null, 0.1, 0.8]]]")
    finish(recipe, ensemble, outputs, "ends.json")
    assert [member.ends for member in run_members(outputs / recipe.name)] == [(0.1, 0.8)]
    for step in (training, predicting):
        write_atomic(step_folder(recipe, step, outputs) / "weights/last.safetensors", "of another training")
        finish(recipe, step, outputs)
    with pytest.raises(SaltError, match="round1/ensemble is outdated"):
        run_members(outputs / recipe.name)


@pytest.mark.parametrize("damage", [lambda page: page.write_text("{"), Path.unlink])
def test_a_report_that_is_cut_off_is_made_again(run, damage):
    recipe, outputs = run
    report = recipe_steps(recipe)[-1]
    damage(step_folder(recipe, report, outputs) / "report.ipynb")
    assert [*outdated_steps(recipe, outputs)] == [report]
    assert status_rows(recipe, outputs)[-1] == ("report", "missing", "report.ipynb is gone or cut off: salt run makes it again")


def test_settings_that_no_longer_count_are_no_change(run):
    recipe, outputs = run
    path = step_folder(recipe, recipe_steps(recipe)[1], outputs) / "record.json"
    record = json.loads(path.read_text())
    for setting in ({"data": "data"}, {"seed": 7}):  # of an earlier version, and one that counts
        StepRecord(path.parent, record["step"], record["arguments"] | setting).finish({}, [*record["files"]], record["inputs"])
        with pytest.raises(SaltError, match="seed was 7, is 0") if "seed" in setting else contextlib.nullcontext():
            check_settings(recipe, outputs)


def test_a_run_goes_on_where_its_tiles_are_now(run, project):
    recipe, outputs = run
    for folder, seed in (("data/new", 0), ("data/other", 1)):
        make_dataset(folder, 1, seed)
    note_tiles(RunStep(recipe, Step("prepare"), outputs), **{split: load_tiles("data/new", split) for split in ("train", "test")})
    moved = recipe.model_copy(update={"data": "data/new"})
    run_recipe(moved, until="prepare")
    for strange, said in {"data/other": "tiles in data/other are not those that single began with", "data/none": "train.zip is missing"}.items():
        with pytest.raises(SaltError, match=f"{said}.*It was begun with data/new, with which salt run outputs/single goes on"):
            run_recipe(recipe.model_copy(update={"data": strange}), until="prepare")
    assert read_recipe(outputs / recipe.name / "recipe.yaml") == moved and outdated_steps(moved, outputs) == {}
    shutil.copytree("data/new", "data/train_only", ignore=lambda folder, names: {"test"} if folder == "data/new" else set())  # where networks only learn
    only_trains = recipe.model_copy(update={"data": "data/train_only"})
    with pytest.raises(SaltError, match="test.zip is missing"):
        run_recipe(only_trains)
    run_recipe(only_trains, until="train")
    (step_folder(recipe, Step("prepare"), outputs) / "one.csv").unlink()  # it is done again, so the data are those of a new run
    with pytest.raises(SaltError, match="data/none is missing.(.|\n)*salt run --data names another folder"):
        run_recipe(recipe.model_copy(update={"data": "data/none"}), until="train")
    with pytest.raises(SaltError, match="tiles in data/other are not those that single began with"):  # not even now
        run_recipe(recipe.model_copy(update={"data": "data/other"}), until="prepare")
    write_atomic(step_folder(recipe, Step("prepare"), outputs) / "one.csv", "made again")
    finish(recipe, Step("prepare"), outputs, "tiles.csv")
    (step_folder(recipe, Step("prepare"), outputs) / "tiles.csv").unlink()
    with pytest.raises(SaltError, match="tiles.csv is missing or damaged, by which it is told whether data/other has the tiles.* It was begun with data/"):
        run_recipe(recipe.model_copy(update={"data": "data/other"}), until="prepare")


def test_a_run_that_waited_looks_at_its_data_again(run, project, monkeypatch):
    "Another command began the same run on other tiles meanwhile."
    recipe, outputs = run
    for folder, seed in (("data/first", 0), ("data/second", 1)):
        make_dataset(folder, 1, seed)
    prepare = step_folder(recipe, Step("prepare"), outputs)
    shutil.move(prepare, "prepared")
    shutil.rmtree(outputs / recipe.name)

    def begun_meanwhile(path, *_):
        shutil.copytree("prepared", prepare)
        note_tiles(RunStep(recipe, Step("prepare"), outputs), **{split: load_tiles("data/first", split) for split in ("train", "test")})
        write_recipe(recipe.model_copy(update={"data": "data/first"}), outputs)
        return hold(path, "a run")

    monkeypatch.setattr(running, "hold", begun_meanwhile)
    with pytest.raises(SaltError, match="tiles in data/second are not those that single began with.*begun with data/first"):
        run_recipe(recipe.model_copy(update={"data": "data/second"}), until="prepare")
    assert read_recipe(outputs / recipe.name / "recipe.yaml").data == "data/first"


def test_a_run_without_its_data_loses_nothing(run, project):
    recipe, outputs = run
    training = step_folder(recipe, recipe_steps(recipe)[1], outputs)
    write_atomic(training / "one.csv", "changed by a spreadsheet")
    with pytest.raises(SaltError, match="has no tiles any more, which train round1 compact fold 0 reads"):
        run_recipe(recipe)
    assert read_record(training, verify=True, part="weights/")["status"] == "done"


def test_a_run_takes_no_folder_that_holds_something_else(run, project):
    recipe, outputs = run
    write_atomic(outputs / "mean/submission.csv", "id,rle_mask\n")
    with pytest.raises(SaltError, match="outputs/mean is there already and not empty: delete it or give the run mean another name with --set name="):
        run_recipe(recipe.model_copy(update={"name": "mean"}))
    assert [path.name for path in (outputs / "mean").iterdir()] == ["submission.csv"]


def test_any_bit_of_a_record_may_be_wrong(run):
    recipe, outputs = run
    folder = step_folder(recipe, recipe_steps(recipe)[1], outputs)
    path = folder / "record.json"
    whole, sound = path.read_bytes(), read_record(folder, verify=True)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert read_record(folder, verify=True) == sound  # space between two words
        except SaltError as error:
            assert "record.json" in str(error)
    for damaged in (whole[: len(whole) // 2], b"", b"[" * 100_000, b"{}", b'{"status": "done"}'):
        path.write_bytes(damaged)
        with pytest.raises(SaltError, match="record.json is"):
            outdated_steps(recipe, outputs)


def test_any_bit_of_a_checkpoint_may_be_wrong(tmp_path):
    "torch.load itself takes wrong numbers for right ones."
    path, rng = tmp_path / "checkpoint.pt", random.Random(5)
    state = {"settings": {"lr": 0.1}, "history": [{"mAP": 0.5}], "model": {"weight": torch.arange(2000.0)}, "optimizer": {}}
    torch.save(state, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(whole)
        flip(path, rng)
        try:
            found = read_checkpoint(path, state["settings"], torch.device("cpu"))
            assert torch.equal(found.pop("model")["weight"], state["model"]["weight"]) and found == {k: v for k, v in state.items() if k != "model"}
        except SaltError as error:
            assert "delete it to train this phase from its beginning" in str(error)
            refused += 1
    assert refused > 250
    path.write_bytes(whole[:-100])
    with pytest.raises(SaltError, match="checkpoint.pt is damaged"):
        read_checkpoint(path, state["settings"], torch.device("cpu"))


def test_damaged_weights_are_refused(tmp_path):
    path, network = tmp_path / "last.safetensors", torch.nn.Linear(3, 2)
    save_weights(network, path)
    whole = path.read_bytes()
    for damaged in (
        b"", whole[:-1], whole[:7], b"\xff" * 8 + whole[8:], whole.replace(b"F32", b"F8_E8M0".ljust(3)[:3]), whole.replace(b"weight", b"height"),
        whole + b"x",
    ):
        path.write_bytes(damaged)
        with pytest.raises(SaltError, match="last.safetensors does not hold weights of this network"):
            load_weights(network, path)


@pytest.fixture
def store(tmp_path):
    "Three chunks written of four."
    ids = [f"t{k:03}" for k in range(256)]
    store = PredictionStore.create(tmp_path / "p.zarr", ids, size=9)
    for rows in store.pending()[:3]:
        store.write(rows, np.random.default_rng(0).random((64, 9, 9)))
    return store


@pytest.mark.parametrize(
    "damage",
    [lambda path: flip(path, random.Random(1)), lambda path: path.write_bytes(path.read_bytes()[:-5]), lambda path: path.write_bytes(b""), Path.unlink],
)
def test_a_damaged_chunk_of_predictions_is_predicted_again(store, damage):
    sound = store.read(store.ids[:64])
    damage(store.path / "probs/c/1/0/0")
    if (store.path / "probs/c/1/0/0").exists():
        with pytest.raises(SaltError, match="p.zarr is damaged in the predictions of rows 64 to 128"):
            PredictionStore(store.path).read(store.ids[:128])
    again = PredictionStore.create(store.path, store.ids, size=9)
    assert again.pending() == [slice(64, 128), slice(192, 256)]
    assert (again.read(store.ids[:64]) == sound).all()


def test_any_bit_of_a_store_may_be_wrong(store):
    rng, sound = random.Random(2), store.read(store.ids[:192])
    files = [p for p in store.path.rglob("*") if p.is_file()]
    for _ in range(100):
        file = rng.choice(files)
        whole = file.read_bytes()
        flip(file, rng)
        try:
            assert (PredictionStore(store.path).read(store.ids[:192]) == sound).all()
        except SaltError as error:
            assert "p.zarr" in str(error)
        file.write_bytes(whole)


# What is read is never run

def test_no_module_reads_pickles():
    "ruff finds pickle, marshal, eval, exec and yaml.load (pyproject.toml); it does not know these."
    for path in [*(ROOT / "saltlib").glob("*.py"), *(ROOT / "nbs/runs").iterdir()]:
        for call in re.findall(
            r"(?<!safetensors\.)torch\.load\(.*|read_pickle.*|allow_pickle=True.*|load_learner.*|joblib.*", path.read_text() if path.is_file() else "",
        ):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_a_store_in_the_format_that_may_hold_pickles_is_refused(tmp_path):
    group = zarr.create_group(tmp_path / "p.zarr", zarr_format=2, attributes={"ids": ["a"], "made_by": {}})
    group.create_array("probs", shape=(1, 9, 9), chunks=(64, 9, 9), dtype="float16")
    group.create_array("written", shape=(1,), dtype="bool")
    with pytest.raises(SaltError, match="p.zarr is no store of predictions"):
        PredictionStore(tmp_path / "p.zarr")


@pytest.mark.parametrize(
    "change",
    [{"shape": [10**9, 9, 9]}, {"data_type": "float64"}, {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 9, 9]}}}],
)
def test_a_store_that_claims_to_be_huge_is_refused(store, change):
    path = store.path / "probs/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SaltError, match="p.zarr is no store of predictions"):
        PredictionStore(store.path)


BOMB = "a: &a [" + "x, " * 9 + "x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


def test_braces_in_a_path_are_a_name(tmp_path):
    cells = [nbformat.v4.new_code_cell("runs = []", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("print(sum(runs))")]
    (folder := tmp_path / "q{old}").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "a{runs}.ipynb")
    execute_notebook(folder / "a{runs}.ipynb", folder / "b{0}.ipynb", {"runs": [40, 2]}, "braces")
    assert nbformat.read(folder / "b{0}.ipynb", 4).cells[-1].outputs[0].text == "42\n"


def test_merged_keys_do_not_grow_without_bounds(tmp_path):
    (tmp_path / "r.yaml").write_text("a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 40)))
    with pytest.raises(SaltError, match="r.yaml could not be read as YAML: line 15: << brings 16384 keys"):
        read_recipe(tmp_path / "r.yaml")


def test_aliases_do_not_grow_without_bounds(tmp_path):
    (tmp_path / "r.yaml").write_text(BOMB)
    with pytest.raises(SaltError, match="r.yaml is not a recipe: written out, its aliases make 1234567900 values"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch harm']", "name: !!python/name:os.system", "a: &a [*a]", "[" * 5000, "a: " + "9" * 5000, "a: 2018-13-45",
    "a: !!timestamp x", "a: !!bool x",
    "a: \0", "\xff",
])
def test_recipes_that_are_none(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SaltError, match="r.yaml"):
        read_recipe(tmp_path / "r.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", ".", "..", "", "a\n", "a b", "a;b", "$(a)", "a\0", "ä"])
def test_names_of_recipes_rounds_and_phases_are_no_paths(name):
    plain = yaml.safe_load(SINGLE)
    phase = plain["rounds"]["round1"]["phases"]["compact"]
    for named in (
        plain | {"name": name}, plain | {"rounds": {name: plain["rounds"]["round1"]}},
        plain | {"rounds": {"round1": {"phases": {name: phase}, "ensemble": {name: 1}}}},
    ):
        with pytest.raises(SaltError, match="is not a valid recipe"):
            parse_recipe(named, "r.yaml")


@pytest.mark.parametrize("key, value", [("lr", "inf"), ("lr", "nan"), ("clip", "inf"), ("epochs", 0), ("epochs", 1.5), ("epochs", "many"), ("epoch", 1)])
def test_numbers_that_are_none(key, value):
    plain = yaml.safe_load(SINGLE)
    plain["rounds"]["round1"]["phases"]["compact"][key] = float(value) if value in ("inf", "nan") else value
    with pytest.raises(SaltError, match=f"rounds.round1.phases.compact.{key}"):
        parse_recipe(plain, "r.yaml")


def test_notebooks_get_their_parameters_as_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = """'\"\"\"'); import os; os.mkdir("harm") #\n os.mkdir('harm')\r\\" + \\\\ {a} {{b}} %s $(mkdir harm) `mkdir harm` \0 \u2028 é"""
    new, values = nbformat.v4, {"text": evil, "texts": [evil, {evil: evil}], "nothing": None}
    cells = [
        new.new_code_cell("text = ''\ntexts = []\nnothing = 0", metadata={"tags": ["parameters"]}),
        new.new_code_cell("import json; print(json.dumps([text, texts, nothing]))"),
    ]
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), "in.ipynb")
    execute_notebook("in.ipynb", "out.ipynb", values, "test")
    assert json.loads(nbformat.read("out.ipynb", 4).cells[-1].outputs[0].text) == list(values.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.ipynb", "out.ipynb"]


def test_the_report_shows_names_and_does_not_run_them():
    "As the rule html in the Snakefile converts it: text, tables and errors of a notebook."
    import nbconvert

    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>"
    table = pd.DataFrame({"id": [evil]}, index=[evil])
    new = nbformat.v4
    outputs = [
        new.new_output("stream", name="stdout", text=evil),
        new.new_output("execute_result", data={"text/html": table._repr_html_(), "text/plain": repr(table)}),
        new.new_output("error", ename=evil, evalue=evil, traceback=[evil]),
    ]
    exporter = nbconvert.HTMLExporter(
        exclude_input=True, embed_images=True, extra_template_basedirs=[str(ROOT / "nbs/runs")], template_name="report_page"
    )
    page, _ = exporter.from_notebook_node(new.new_notebook(cells=[new.new_code_cell("", outputs=outputs)]))
    assert evil not in page and "<img src=x" not in page and page.count(html.escape(evil, quote=False)) >= 3


def test_any_folder_may_hold_the_project(tmp_path):
    "The commands that Snakemake gives to the shell are quoted."
    folder = tmp_path / "it's {my} $(project): ölfeld 😀/outputs/single"
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "nbs/runs", runs := folder.parent.parent / "nbs/runs")
    python = folder.parent.parent / "python"
    python.symlink_to(sys.executable)
    (folder / "recipe.yaml").write_text(SINGLE)
    command = [
        python, "-m", "snakemake", "--snakefile", runs / "Snakefile", "--directory", folder, "--cores", "1", "--config", "gpu=0", "cores=1",
        "per_gpu=1", f"project={json.dumps([str(folder.parent.parent)], ensure_ascii=False)}", "--dry-run", "--printshellcmds", "--nolock",
    ]
    shown = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.pathsep.join(p for p in sys.path if 'site-packages' in p)}"},
        capture_output=True, text=True,
    )
    assert shown.returncode == 0, shown.stderr
    import shlex
    assert shown.stdout.count(f"{shlex.quote(str(python))} -c") == 6, shown.stdout  # five steps and the page of the report
    assert shown.stdout.count(f"cd {shlex.quote(str(folder.parent.parent))} && ") == 5, shown.stdout


# Two at once

def test_a_second_run_waits_and_names_the_first_and_a_killed_one_holds_nothing(tmp_path):
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=4)
    (project / "single.yaml").write_text(SINGLE)
    lock = project / "outputs/single/.lock"
    code = (
        f"import time; from saltlib.running import Path, hold; held = hold(Path({str(lock)!r}), 'A run of single'); print('held', flush=True); "
        "time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    assert hold(tmp_path / "project/outputs/other/.lock", "A run of other", wait=False)  # another recipe does not wait
    second = subprocess.Popen([*SALT, "run", "single.yaml", "--until", "prepare"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        begun = f"begun by process {first.pid} on {socket.gethostname()}"
        assert second.stderr.readline() == f"A run of single is at work already ({begun}); waiting for it to end.\n"
        first.send_signal(signal.SIGKILL)
        assert "single: 1 of 5 steps are done" in second.communicate(timeout=120)[0] and second.returncode == 0  # its turn
    finally:
        first.kill()
        second.kill()
        first.communicate()


@pytest.mark.parametrize("number, quiet, first", [
    (signal.SIGTERM, True, ""), (signal.SIGTERM, False, ""), (signal.SIGINT, True, ""), (signal.SIGINT, False, ""),
    (signal.SIGTERM, False, "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "),  # as a script's `salt run &`
])
def test_the_end_of_a_run_is_the_end_of_all_its_processes(tmp_path, number, quiet, first):
    "A signal to its first process alone, as systemd, a scheduler or an editor's stop button may send it."
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    run = subprocess.Popen(
        [sys.executable, "-c", f"{first}from saltlib.running import *; watch({command}, [], Progress('run', {{}}, {{}}, bool), {quiet}, False, patience=1)"],
        cwd=tmp_path, start_new_session=True,
    )
    try:
        deadline = time.time() + 60
        while len(workers(tmp_path)) < 3 and time.time() < deadline:
            time.sleep(0.1)
        assert len(workers(tmp_path)) >= 3
        run.send_signal(number)
        run.wait(60)
        assert workers(tmp_path) == []
    finally:
        os.killpg(run.pid, signal.SIGKILL) if workers(tmp_path) else None
