"""The three rounds, shortened, on a real Slurm cluster of one node: make test-slurm starts it (tests/one_node_slurm.sh)."""

import os
import signal
import subprocess
import time
from collections import defaultdict

import pytest
import yaml
from conftest import ROOT
from test_first_place import FEW, check_run, one_of_each_kind, shortened
from test_runs import SALT, make_project

# What a cluster of this machine alone needs beside the shipped profile: it keeps no accounts, it answers at once, and it has few cores.
HERE = {
    "slurm-status-command": "squeue",
    "slurm-no-account": True,
    "slurm-init-seconds-before-status-checks": 5,
    "set-threads": {"train": 1, "predict": 1},
}


def jobs() -> dict[str, list[tuple[str, str]]]:
    "Numbers and states of the cluster's jobs, by step, oldest first."
    found = defaultdict(list)
    listed = subprocess.run(["squeue", "--states=all", "--noheader", "--sort=i", "--format=%i|%k|%T"], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        job, step, state = line.split("|")
        found[step].append((job, state))
    return found


@pytest.mark.slurm
def test_three_rounds_with_a_killed_job(tmp_path):
    project = make_project(tmp_path / "project", width_tiles=4, **FEW)
    path = shortened(project, "short", device="auto", clean_pseudo_labels=False, folds={"n": 2, "use": [1]})
    one_of_each_kind(path)
    shipped = yaml.safe_load((ROOT / "nbs/runs/profiles/slurm/config.yaml").read_text())
    (project / "small_cluster").mkdir()
    (project / "small_cluster/config.yaml").write_text(yaml.safe_dump(shipped | HERE))

    command = [*SALT, "run", path, "--profile", "small_cluster", "--set", "rounds.round1.phases.phalanx_v4.epochs=2"]
    log = tmp_path / "run.log"
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=project, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        killed = project / "outputs/short/round1/phalanx_v4/fold1/train"
        while not (killed / "checkpoint.pt").exists() and run.poll() is None:
            time.sleep(0.5)
        assert run.poll() is None, log.read_text()
        step = next(step for step in jobs() if "train" in step and "phalanx_v4" in step)
        (job, state), = jobs()[step]
        assert state == "RUNNING"
        asked = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
        assert "TresPerJob=gres:gpu:1" in asked and "MinMemoryNode=32000M" in asked and "TimeLimit=2-00:00:00" in asked, asked
        subprocess.run(["scancel", "--signal=KILL", job], check=True)
        assert run.wait() == 0, log.read_text()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
            run.wait()

    check_run(project, "short")
    ended = {step: [state for _, state in tried] for step, tried in jobs().items()}
    assert ended.pop(step) == ["CANCELLED", "COMPLETED"]
    assert len(ended) == 18 and all(states == ["COMPLETED"] for states in ended.values()), ended  # 18 steps and the report's HTML
    assert "going on after epoch 0" in (killed / "train.ipynb").read_text()
