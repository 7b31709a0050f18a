"""What the profile for Slurm asks of a cluster, taken down by a stand-in for its commands."""

import os
import signal
import subprocess
import time

import pytest
from test_runs import SALT, make_project, salt

from saltlib.recipes import read_recipe, write_recipe


SINGLE = """
name: single
data: data/demo
folds: {n: 2, use: [0]}
rounds:
  round1:
    phases:
      compact: {model: compact, start: imagenet, epochs: 3, batch_size: 16, lr: 1.0e-3, loss: lovasz_elu}
    ensemble: {compact: 1}
"""


@pytest.fixture
def project(tmp_path):
    "A project whose next step is a training."
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=5)
    (project / "single.yaml").write_text(SINGLE)
    write_recipe(read_recipe(project / "single.yaml"), project / "outputs")
    salt(project, "step", "prepare", "--recipe-file", "outputs/single/recipe.yaml")
    return project


def test_slurm(project, tmp_path):
    calls, log = tmp_path / "calls.txt", tmp_path / "run.log"
    (tmp_path / "bin").mkdir()
    answers = {"sbatch": f'echo "$@" >> {calls}; exit 1', "sinfo": "echo 'all*'"}
    for name in ("sbatch", "sinfo", "squeue", "sacct", "sacctmgr", "scontrol", "scancel"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{answers.get(name, 'exit 0')}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = subprocess.Popen([*SALT, "run", "single.yaml", "--profile", "slurm"], cwd=project, env=env, start_new_session=True, stdout=log.open("w"), stderr=subprocess.STDOUT)
    deadline = time.time() + 300
    while not calls.exists() and run.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert calls.exists(), log.read_text()
    for part in ("--gpus=1", "--mem 32000", "-t 2880", "=8 ", "train:round=round1,phase=compact,fold=0"):
        assert part in calls.read_text(), calls.read_text()


def test_unknown_profile(project):
    refused = salt(project, "run", "single.yaml", "--profile", "nowhere", check=False)
    assert refused.returncode == 1 and "There is no profile nowhere" in refused.stderr and "one of slurm" in refused.stderr
