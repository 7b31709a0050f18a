"""Kill small runs again and again at random moments: `make kills`, which takes about half an hour.

Each project has two recipes that work side by side. Whatever is killed, the same command goes on; in the end every
submission equals that of a run that nothing disturbed, every record's results and every notebook are whole, and no
process is left.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat
from test_clusters import SINGLE
from test_runs import SALT, make_project, workers

from saltlib.running import status_rows
from saltlib.core import SaltError, read_record
from saltlib.recipes import read_recipe, recipe_steps, step_folder

RECIPES = {
    name: SINGLE.replace("name: single", f"name: {name}\ndevice: cpu\nseed: {seed}").replace("epochs: 3", "epochs: 2")
    for seed, name in enumerate(("first", "second"))
}

KINDS, SIGNALS = ["prepare", "train", "predict", "ensemble", "report"], ["SIGKILL", "SIGTERM", "SIGINT"]


def start(project: Path, name: str) -> subprocess.Popen:
    log = (project / f"{name}.log").open("a")
    return subprocess.Popen([*SALT, "run", f"{name}.yaml", "--cores", "1"], cwd=project, start_new_session=True, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    "The processes that a process has started, and theirs."
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return found + [below for child in found for below in children(child)]


def at_work(project: Path, name: str) -> str:
    "The kind of step that a run is doing now, '' if none."
    try:
        rows = status_rows(read_recipe(project / f"outputs/{name}/recipe.yaml"), project / "outputs")
    except SaltError:  # it has just begun
        return ""
    return next((step.split()[0] for step, state, _ in rows if state == "running"), "")


def kill(run: subprocess.Popen, name: str, rng: random.Random) -> str:
    "Ctrl-C goes to all processes of a terminal; the other signals to all of them, to the first, or to any."
    try:
        victims = [run.pid, *children(run.pid)]
        if name == "SIGINT" or (whom := rng.choice(["all", "first", "any"])) == "all":
            os.killpg(run.pid, getattr(signal, name))
            return f"{name} to all"
        victim = run.pid if whom == "first" else rng.choice(victims)
        os.kill(victim, getattr(signal, name))
        return f"{name} to process {victims.index(victim) + 1} of {len(victims)}"
    except (ProcessLookupError, FileNotFoundError):  # it ended just now
        return ""


def leftovers(project: Path, seconds: float) -> list[int]:
    "Processes that still work in the project after a while."
    deadline = time.time() + seconds
    while (left := workers(project)) and time.time() < deadline:
        time.sleep(0.5)
    return left


def check_run(project: Path, name: str, expected: dict[str, bytes]) -> None:
    "The end of a run: everything is whole, and as it would have been."
    recipe, outputs = read_recipe(project / f"outputs/{name}/recipe.yaml"), project / "outputs"
    for step in recipe_steps(recipe):
        folder = step_folder(recipe, step, outputs)
        assert read_record(folder, verify=True), f"{folder} has no record"
        nbformat.read(folder / f"{step.kind}.ipynb", 4)
    assert (outputs / name / "submission.csv").read_bytes() == expected[name], f"{project}: the submission of {name} is another one"
    assert "</html>" in (outputs / name / "report/report.html").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--projects", type=int, default=4, help="two runs each")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    rng, began, table, restarts = random.Random(args.seed), time.time(), Counter(), 0
    print(f"seed {args.seed}: {args.kills} kills over {2 * args.projects} runs", flush=True)
    base = Path(tempfile.mkdtemp(prefix="saltlib-kills-"))
    whole = make_project(base / "whole", n_sections=1, height_tiles=3, width_tiles=8)
    expected = {}
    for name, text in RECIPES.items():
        (whole / f"{name}.yaml").write_text(text)
        assert start(whole, name).wait() == 0, (whole / f"{name}.log").read_text()
        expected[name] = (whole / f"outputs/{name}/submission.csv").read_bytes()
    print(f"an undisturbed run takes {(time.time() - began) / len(RECIPES):.0f} s", flush=True)
    assert expected["first"] != expected["second"]
    for name in RECIPES:
        check_run(whole, name, expected)
    seconds = {}  # of each kind of step, as far as its record counts them
    for step in recipe_steps(recipe := read_recipe(whole / "outputs/first/recipe.yaml")):
        seconds[step.kind] = read_record(step_folder(recipe, step, whole / "outputs"))["seconds"]
    for number in range(args.projects):
        project = base / f"project{number}"
        shutil.copytree(whole, project, symlinks=True, ignore=shutil.ignore_patterns("outputs", "*.log"))
        runs, wanted, due = {name: start(project, name) for name in RECIPES}, {}, {}
        for k, name in enumerate(RECIPES, 2 * number):  # every kind of step with another signal in each run, and some a second time
            more = (k + 1) * args.kills // (2 * args.projects) - k * args.kills // (2 * args.projects) - len(KINDS)
            kinds = sorted(KINDS + rng.sample(KINDS, more) if more > 0 else KINDS[: len(KINDS) + more], key=KINDS.index)
            wanted[name] = [(kind, SIGNALS[(k + n) % 3]) for n, kind in enumerate(kinds)]
        while any(run.poll() != 0 for run in runs.values()) or any(wanted.values()):
            time.sleep(0.1)
            for name, run in runs.items():
                if run.poll() is not None and (run.returncode or wanted[name]):
                    if run.returncode == 0:  # past a step that was to be killed: from the beginning
                        check_run(project, name, expected)
                        shutil.rmtree(project / "outputs" / name)
                    restarts += 1
                    assert restarts < 20 + 3 * args.kills, (project / f"{name}.log").read_text()
                    runs[name] = start(project, name)
                elif wanted[name] and at_work(project, name) == wanted[name][0][0]:
                    due.setdefault(name, time.time() + rng.uniform(0, 2 + seconds[wanted[name][0][0]]))  # 2: a kernel starts
                    if time.time() < due[name]:
                        continue
                    kind, signal_name = wanted[name][0]
                    if said := kill(run, signal_name, rng):
                        wanted[name].pop(0)
                        table[kind, signal_name] += 1
                        print(f"kill {table.total()}: {name} in project {number}, in {kind}: {said}", flush=True)
                        time.sleep(rng.uniform(0, 3))  # long enough for it to end, or not
                        del due[name]
                elif name in due:
                    del due[name]
        for name in RECIPES:
            check_run(project, name, expected)
        assert not leftovers(project, 60), f"{project}: processes are left: {workers(project)}"
        print(f"project {number}: both submissions as undisturbed, everything whole, no process left ({(time.time() - began) / 60:.0f} min)", flush=True)
    shutil.rmtree(base)
    print("in".ljust(10), *SIGNALS)
    for kind in KINDS:
        print(kind.ljust(10), *(str(table[kind, name]).rjust(len(name)) for name in SIGNALS))
    print(f"{table.total()} kills over {2 * args.projects} runs: the same submissions every time (seed {args.seed})")


if __name__ == "__main__":
    sys.exit(main())
