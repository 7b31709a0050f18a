"""What the profiles ask of a cluster, taken down by stand-ins for its commands."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
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
    project = make_project(tmp_path / "project", n_sections=1, height_tiles=2, width_tiles=5)
    (project / "single.yaml").write_text(SINGLE)
    return project


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_slurm(project, tmp_path, device):
    write_recipe(read_recipe(project / "single.yaml", [f"device={device}"]), project / "outputs")
    salt(project, "step", "prepare", "--recipe-file", "outputs/single/recipe.yaml")  # so that a training is next
    calls, log = tmp_path / "calls.txt", tmp_path / "run.log"
    (tmp_path / "bin").mkdir()
    answers = {"sbatch": f'echo "$@" >> {calls}; exit 1', "sinfo": "echo 'all*'"}
    for name in ("sbatch", "sinfo", "squeue", "sacct", "sacctmgr", "scontrol", "scancel"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{answers.get(name, 'exit 0')}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = subprocess.Popen(
        [*SALT, "run", "single.yaml", "--profile", "slurm", "--set", f"device={device}"], cwd=project, env=env, start_new_session=True,
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )
    deadline = time.time() + 300
    while not calls.exists() and run.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert calls.exists(), log.read_text()
    assert ("--gpus=1" in calls.read_text()) == (device == "auto"), calls.read_text()
    for part in ("--mem 32000", "-t 2880", "=8 ", "train:round=round1,phase=compact,whose=fold0"):
        assert part in calls.read_text(), calls.read_text()


KUBECTL = """#!{python}
import subprocess, sys
from pathlib import Path
import yaml

jobs = Path("{jobs}")
if sys.argv[1] == "create":
    name = f"saltlib-{{len(list(jobs.iterdir()))}}"
    (jobs / name).write_text(sys.stdin.read())
    print(name)
else:
    job = yaml.safe_load((jobs / sys.argv[3]).read_text())
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    done = job["metadata"]["annotations"]["step"] == "prepare" and subprocess.run(command, stdout=sys.stderr).returncode == 0
    print(sys.argv[3], "Complete" if done else "Failed")
"""


def test_kubernetes(project, tmp_path):
    "The stand-in carries out the first step; the second one fails as often as it is tried."
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(KUBECTL.format(python=sys.executable, jobs=jobs))
    (tmp_path / "bin/kubectl").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    shutil.copytree(ROOT / "nbs/runs/profiles/kubernetes", project / "my_cluster")  # as one does to change it
    with (project / "my_cluster/config.yaml").open("a") as config:
        config.write("seconds-between-status-checks: 1\n")
    run = subprocess.run([*SALT, "run", "single.yaml", "--profile", "my_cluster"], cwd=project, env=env, capture_output=True, text=True)
    assert run.returncode == 1 and "single is not complete" in run.stderr, run.stdout + run.stderr
    assert (project / "outputs/single/prepare/record.json").exists(), run.stdout + run.stderr
    specs = [yaml.safe_load(path.read_text()) for path in sorted(jobs.iterdir())]
    assert [spec["metadata"]["annotations"]["step"] for spec in specs] == ["prepare"] + 3 * ["train round1 compact fold0"]
    asked = []
    for spec in specs:
        assert (spec["apiVersion"], spec["kind"], spec["metadata"]["generateName"]) == ("batch/v1", "Job", "saltlib-")
        assert spec["spec"]["backoffLimit"] == 0  # Snakemake tries again
        pod = spec["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never" and container["image"] == "saltlib"
        assert container["command"][0] == "sh" and container["command"][1].startswith(str(project / "outputs/single/.snakemake"))
        mounted = {mount["mountPath"]: (mount["name"], mount.get("subPath")) for mount in container["volumeMounts"]}
        assert mounted == {"/saltlib/data": ("project", "data"), "/saltlib/outputs": ("project", "outputs"), "/dev/shm": ("shm", None)}
        assert {"name": "project", "persistentVolumeClaim": {"claimName": "saltlib"}} in pod["volumes"]
        asked.append((pod["activeDeadlineSeconds"], container["resources"]["limits"]))
    assert asked[0] == (60 * 60, {"cpu": 1, "memory": "8000M", "nvidia.com/gpu": 0})
    assert asked[1:] == 3 * [(2880 * 60, {"cpu": 8, "memory": "32000M", "nvidia.com/gpu": 1})]
