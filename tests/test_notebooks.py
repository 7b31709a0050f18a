"""The notebooks are the source of saltlib/, run as its tests, and are saved executed, clean and small."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT, changes, commit
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from nbdev.doclinks import nbglob
from nbdev.test import _keep_file

from saltlib.losses import LOSSES
from saltlib.models import MODELS
from saltlib.synthetic import make_dataset

LIBRARY = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
RUNS = sorted((ROOT / "nbs/runs").glob("*.ipynb"))
EXPLORE = sorted((ROOT / "nbs/explore").glob("*.ipynb"))
MAX_OUTPUT = 300_000  # bytes a notebook

library = pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
everything = pytest.mark.parametrize("path", LIBRARY + RUNS + EXPLORE, ids=lambda p: p.stem)


def cells(path, cell_type="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == cell_type]


def source(cell):
    return "".join(cell["source"])


def module(path):
    "The module that a notebook exports."
    (name,) = [m for c in cells(path) for m in re.findall(r"^#\|\s*default_exp (\w+)$", source(c), re.MULTILINE)]
    return name


def nbdev(command, *args, cwd):
    done = subprocess.run([Path(sys.executable).parent / command, *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0 and "Failed to clean" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def test_nbdev_tests_the_library_and_nothing_else():
    # nbdev_test says "Success." to no notebook at all.
    eligible = {Path(p).resolve() for p in nbglob(ROOT / "nbs", as_path=True) if _keep_file(Path(p), ".notest")}
    assert eligible == set(LIBRARY) and RUNS


@library
def test_nbdev_test(path, common_clone):
    # A process each: nbdev_test would use one again for several notebooks, and what one leaves behind help the next.
    report = nbdev("nbdev_test", "--path", f"nbs/{path.name}", "--do_print", cwd=common_clone)
    assert f"- Completed {common_clone / 'nbs' / path.name}" in report and "Success." in report
    assert changes(common_clone) == ""


def test_every_module_comes_from_one_notebook():
    generated = {p.stem for p in (ROOT / "saltlib").glob("*.py")} - {"__init__", "_modidx"}
    assert sorted(map(module, LIBRARY)) == sorted(generated)
    assert all(re.fullmatch(rf"[0-9]{{2}}_{module(p)}", p.stem) for p in LIBRARY)
    assert len({p.stem[:2] for p in LIBRARY}) == len(LIBRARY)


@library
def test_imports_only_from_notebooks_above(path):
    above = [module(p) for p in LIBRARY[: LIBRARY.index(path) + 1]]
    used = [m for c in cells(path) for m in re.findall(r"^\s*(?:from|import) saltlib\.(\w+)", source(c), re.MULTILINE)]
    assert set(used) <= set(above)


@library
def test_opens_with_a_title_and_its_module(path):
    first, second = json.loads(path.read_text())["cells"][:2]
    assert re.match(r"# \S.*\n+> \S", source(first))
    assert re.match(r"#\|\s*default_exp", source(second))


@library
def test_skips_nothing_and_tests_something(path):
    code = [source(c) for c in cells(path)]
    assert not any(re.search(r"^#\|\s*eval:\s*false|^skip_exec", s, re.MULTILINE) for s in code)
    assert any(re.search(r"\btest_\w+\(", s) for s in code)


@library
def test_saved_executed(path):
    assert any(c["outputs"] for c in cells(path))


@pytest.fixture(scope="module")
def few_tiles(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("explore") / "data", n_sections=1, seed=5)


@pytest.mark.parametrize("path", EXPLORE, ids=lambda p: p.stem)
def test_exploration_runs_on_any_data_by_one_variable(path, few_tiles, monkeypatch):
    # In this process: a kernel for each would import torch and fastai again.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("saltlib.synthetic.make_dataset", None)  # no other data are made
    notebook = read_nb(path)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert parameters.source.startswith('data = "data/demo"')
    parameters.source += f"\ndata = {str(few_tiles)!r}" + "\ntiles, epochs = 16, 1" * ("tiles =" in parameters.source)
    shell = CaptureShell()
    with patch.dict(LOSSES), patch.dict(MODELS):  # some add to them, which other tests must not meet
        shell.run_all(notebook, exc_stop=True)
    assert shell.exc is None
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert any({"image/png", "image/jpeg"} & o.get("data", {}).keys() for o in outputs) and not [o for o in outputs if o.get("name") == "stderr"]


@everything
def test_saved_outputs(path):
    outputs = [o for c in cells(path) for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert len(json.dumps(outputs)) < MAX_OUTPUT
    text = json.dumps([o.get("text") or {k: v for k, v in o["data"].items() if "image" not in k} for o in outputs])
    assert not re.findall(r"(?<![\w.~<])/(?:home|root|tmp|Users|var|opt|usr|mnt|work)/[^\s\"']*", text)


def test_export_and_clean_leave_git_clean(clone):
    nbdev("nbdev_export", cwd=clone)
    nbdev("nbdev_clean", cwd=clone)
    assert changes(clone) == ""


def test_a_stale_module_and_an_unclean_notebook_are_found(clone):
    name = LIBRARY[0].name
    stale, unclean = clone / "saltlib" / f"{module(LIBRARY[0])}.py", clone / "nbs" / name
    stale.write_text(stale.read_text() + "\nextra = 1\n")
    notebook = json.loads(unclean.read_text())
    notebook["cells"][1]["execution_count"] = 7
    unclean.write_text(json.dumps(notebook, indent=1) + "\n")
    commit(clone)
    nbdev("nbdev_export", cwd=clone)
    assert '-extra = 1' in changes(clone)
    nbdev("nbdev_clean", cwd=clone)
    assert '-   "execution_count": 7' in changes(clone)


def test_cleaning_keeps_the_parameters_tag(clone):
    nbdev("nbdev_clean", cwd=clone)
    for path in RUNS:
        tagged = [c for c in cells(clone / path.relative_to(ROOT)) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, path.name
