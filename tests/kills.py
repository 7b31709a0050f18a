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

from saltlib.core import read_record
from saltlib.recipes import read_recipe, recipe_steps, step_folder

RECIPES = {name: SINGLE.replace("name: single", f"name: {name}\ndevice: cpu\nseed: {seed}").replace("epochs: 3", "epochs: 2") for seed, name in enumerate(("first", "second"))}


def start(project: Path, name: str) -> subprocess.Popen:
    log = (project / f"{name}.log").open("a")
    return subprocess.Popen([*SALT, "run", f"{name}.yaml", "--cores", "1"], cwd=project, start_new_session=True, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    "The processes that a process has started, and theirs."
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return found + [below for child in found for below in children(child)]


def at_work(project: Path, name: str) -> str:
    "What a run was doing last, by its log."
    lines = [line for line in (project / f"{name}.log").read_text().splitlines() if " | " in line]
    return lines[-1].split()[0] if lines else "beginning"


def kill(run: subprocess.Popen, rng: random.Random) -> str:
    "Ctrl-C goes to all processes of a terminal; the other signals to all of them, or to one."
    name = rng.choice(["SIGKILL", "SIGTERM", "SIGINT"])
    try:
        victims = [run.pid, *children(run.pid)]
        if name == "SIGINT" or rng.random() < 0.5:
            os.killpg(run.pid, getattr(signal, name))
            return f"{name} to all"
        victim = rng.choice(victims)
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


def check(project: Path, expected: dict[str, bytes]) -> None:
    "The end of a project: everything is whole, and as it would have been."
    for name in RECIPES:
        recipe, outputs = read_recipe(project / f"outputs/{name}/recipe.yaml"), project / "outputs"
        for step in recipe_steps(recipe):
            folder = step_folder(recipe, step, outputs)
            assert read_record(folder, verify=True), f"{folder} has no record"
            nbformat.read(folder / f"{step.kind}.ipynb", 4)
        assert (outputs / name / "submission.csv").read_bytes() == expected[name], f"{project}: the submission of {name} is another one"
        assert "</html>" in (outputs / name / "report/report.html").read_text()
    assert not leftovers(project, 60), f"{project}: processes are left: {workers(project)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--projects", type=int, default=4, help="two runs each")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--minutes", type=float, default=60, help="no further kill after this time")
    args = parser.parse_args()
    rng, began, kills, kinds, places = random.Random(args.seed), time.time(), 0, Counter(), Counter()
    restarts = 0
    print(f"seed {args.seed}: {args.kills} kills over {2 * args.projects} runs", flush=True)
    base = Path(tempfile.mkdtemp(prefix="saltlib-kills-"))
    whole = make_project(base / "whole", n_sections=1, height_tiles=3, width_tiles=8)
    expected, longest = {}, 0
    for name, text in RECIPES.items():
        (whole / f"{name}.yaml").write_text(text)
        now = time.time()
        assert start(whole, name).wait() == 0, (whole / f"{name}.log").read_text()
        longest = max(longest, time.time() - now)
        expected[name] = (whole / f"outputs/{name}/submission.csv").read_bytes()
    print(f"an undisturbed run takes {longest:.0f} s", flush=True)
    assert expected["first"] != expected["second"]
    check(whole, expected)
    for number in range(args.projects):
        project = base / f"project{number}"
        shutil.copytree(whole, project, symlinks=True, ignore=shutil.ignore_patterns("outputs", "*.log"))
        wanted = (number + 1) * args.kills // args.projects
        runs = {name: start(project, name) for name in RECIPES}
        while any(run.poll() != 0 for run in runs.values()):
            time.sleep(rng.uniform(0, longest / 4))
            for name, run in runs.items():
                if run.poll() is not None and run.returncode != 0:  # killed, or failed as a step of it was killed
                    restarts += 1
                    assert restarts < 20 + 3 * kills, (project / f"{name}.log").read_text()
                    runs[name] = start(project, name)
            alive = [name for name in RECIPES if runs[name].poll() is None]
            if alive and kills < wanted and time.time() - began < 60 * args.minutes:
                name = rng.choice(alive)
                place = at_work(project, name)
                if said := kill(runs[name], rng):
                    kills, places[place], kinds[said.split()[0]] = kills + 1, places[place] + 1, kinds[said.split()[0]] + 1
                    print(f"kill {kills}: {name} in project {number}, after {place}: {said}", flush=True)
            if kills < wanted and not alive and all(run.poll() == 0 for run in runs.values()):  # done too early: once more
                check(project, expected)
                shutil.rmtree(project / "outputs")
                runs = {name: start(project, name) for name in RECIPES}
        check(project, expected)
        print(f"project {number}: both submissions as undisturbed, everything whole, no process left ({(time.time() - began) / 60:.0f} min)", flush=True)
    shutil.rmtree(base)
    print(f"{kills} kills ({dict(kinds)}; after {dict(places)}) over {2 * args.projects} runs: the same submissions every time (seed {args.seed})")


if __name__ == "__main__":
    sys.exit(main())
