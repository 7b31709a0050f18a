"""The versions in settings.ini, the lock file, conda's and Docker's files cannot drift apart; set-up and CI do what they say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, changes, git
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from saltlib.core import git_commit

BIN = Path(sys.executable).parent
SETUP_FILES = "settings.ini pyproject.toml requirements.lock environment.yml Dockerfile Makefile CITATION.cff .github/workflows/test.yml".split()


def settings(root):
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini")
    return config["DEFAULT"]


def read_lock(root) -> list[tuple[Requirement, int]]:
    "Each pin of the lock file with the number of its hashes."
    pins = []
    for entry in (root / "requirements.lock").read_text().replace("\\\n", " ").splitlines():
        if entry and not entry.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", entry)
            pins.append((Requirement(requirement), sum(re.fullmatch("[0-9a-f]{64}", h.strip()) is not None for h in hashes)))
    return pins


def version_of(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def drift(root) -> list[str]:
    "Everything in which the files of the set-up disagree."
    found = []

    def expect(condition, problem):
        if not condition:
            found.append(problem)

    if "://" in (root / "requirements.lock").read_text():
        return ["lock: holds an address"]
    config, pins = settings(root), read_lock(root)
    python = config["min_python"]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = [Requirement(r) for key in ("requirements", "dev_requirements") for r in config[key].split()]
    wanted += [Requirement(r) for r in project["build-system"]["requires"]]

    for pin, hashes in pins:
        expect(re.fullmatch(r"==[^,*]+", str(pin.specifier)) and not pin.url, f"lock: {pin} is not one version")
        expect(hashes, f"lock: {pin} has no hash")
    names = [canonicalize_name(pin.name) for pin, _ in pins]
    for name in sorted(set(names)):
        expect(names.count(name) == 1, f"lock: {name} has more than one version")
    if found:
        return found
    locked = {canonicalize_name(pin.name): pin for pin, _ in pins}
    for requirement in wanted:
        pin = locked.get(canonicalize_name(requirement.name))
        expect(
            pin and not pin.marker and requirement.specifier.contains(version_of(pin), prereleases=True),
            f"lock: {pin} does not meet {requirement} everywhere: make lock",
        )
    expect(version_of(locked["nbdev"]) == "2.4.14", "lock: nbdev 2.4.14 is the last that reads settings.ini")
    torch = next(r for r in wanted if r.name == "torch")
    expect(torch.specifier.contains("2.11.0"), f"settings.ini: {torch} shuts out torch 2.11, which clusters have")

    expect(project["project"]["requires-python"] == f">={python}", "pyproject.toml: another Python than settings.ini")
    expect(not {"version", "dependencies"} & set(project["project"]), "pyproject.toml: metadata belongs into settings.ini")

    *conda, pip = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    expect(conda == [f"python={python}", "pip"], f"environment.yml: {conda} instead of Python {python} and pip")
    expect(pip == {"pip": ["--require-hashes", "-r requirements.lock"]}, "environment.yml: not just the lock file, with hashes")

    docker = (root / "Dockerfile").read_text()
    base = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu\d+\.\d+$", docker, re.MULTILINE)
    expect(base and docker.count("FROM ") == 1, "Dockerfile: the base is not one pinned image of nvidia/cuda")
    cuda = version_of(locked["cuda-toolkit"])
    expect(base and cuda.startswith(f"{base[1]}."), f"Dockerfile: the base is not of CUDA {cuda}, which torch brings")
    expect("RUN make .venv/.synced\n" in docker and "RUN make setup\n" in docker, "Dockerfile: not installed by make")
    expect(not re.search(r"pip install|[=~<>]=\s*\d", docker), "Dockerfile: names versions of its own")
    expect(re.search(r"^USER [1-9]\d*$", docker, re.MULTILINE), "Dockerfile: runs as root")
    expect(docker.endswith('ENTRYPOINT ["salt"]\nCMD ["--help"]\n'), "Dockerfile: does not start salt")

    make = (root / "Makefile").read_text()
    expect(
        "pip sync --quiet --compile-bytecode --python .venv --require-hashes requirements.lock\n" in make,
        "Makefile: not from the lock, with hashes, and compiled",
    )
    expect(not re.search(r"[a-z]==\d", make), "Makefile: names versions of its own")
    expect(f"--python-version {python} " in make, "Makefile: locks for another Python than settings.ini")
    for name, text in {"Dockerfile": docker, "Makefile": make}.items():
        expect(not re.search(r"token|password", text, re.IGNORECASE), f"{name}: Jupyter's token is to stay on")

    steps = yaml.safe_load((root / ".github/workflows/test.yml").read_text())["jobs"]["test"]["steps"]
    expect(steps[1]["with"]["python-version"] == python, "test.yml: another Python than settings.ini")
    expect(steps[-1] == {"run": "make test"}, "test.yml: does not run make test")

    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    expect(citation["version"] == config["version"], "CITATION.cff: another version than settings.ini")
    return found


def test_nothing_has_drifted():
    assert drift(ROOT) == []


@pytest.mark.parametrize(
    "file, old, new, problem",
    [
        ("requirements.lock", r"^nbdev==.*?\\$", r"nbdev==3.0.0 \\", "nbdev 2.4.14"),
        ("requirements.lock", r"^torch==.*?\\$", r"torch==2.10.0 \\", "does not meet torch"),
        ("requirements.lock", r"^zarr==(.*?) \\$", r"zarr==\1 ; python_version < '3.12' \\", "does not meet zarr"),
        ("requirements.lock", r"^rich==.*(\n .*)+\n", "", "does not meet rich"),
        ("requirements.lock", r"^uv==(.*) \\(\n .*)+\n", r"uv==\1\n", "has no hash"),
        ("requirements.lock", r"^uv==", "pandas==1.0 --hash=sha256:" + "0" * 64 + "\nuv==", "pandas has more than one"),
        ("requirements.lock", r"^h5py==.*\\$", r"h5py>=3 \\", "is not one version"),
        ("requirements.lock", r"\A", "--index-url https://example.org/simple\n", "address"),
        ("settings.ini", r"torch>=2.11", "torch>=2.15", "shuts out torch 2.11"),
        ("settings.ini", r"fastai>=2.8.5,<2.9", "fastai>=2.9", "does not meet fastai"),
        ("settings.ini", r"^(dev_requirements =)", r"\1 einops", "does not meet einops"),
        ("settings.ini", r"^version = .*", "version = 9.9.9", "CITATION.cff"),
        ("settings.ini", r"^min_python = .*", "min_python = 3.12", "environment.yml"),
        ("pyproject.toml", r"setuptools>=\d+", "setuptools>=999", "does not meet setuptools"),
        ("pyproject.toml", r'^name="saltlib"', 'name="saltlib"\nversion="1"', "belongs into settings.ini"),
        ("environment.yml", r"python=3.11", "python=3.13", "environment.yml"),
        ("environment.yml", r"(\s+)- -r requirements.lock", r"\1- -r requirements.lock\1- torch==2.11.0", "environment.yml"),
        ("environment.yml", r"\s+- --require-hashes", "", "environment.yml"),
        ("Dockerfile", r"cuda:[\d.]+", "cuda:12.8.1", "the base is not of CUDA"),
        ("Dockerfile", r"cuda:\S+", "cuda:latest", "pinned image"),
        ("Dockerfile", r"^RUN make setup$", "RUN make setup && pip install torch==2.11.0", "versions of its own"),
        ("Dockerfile", r"^USER .*", "USER root", "root"),
        ("Dockerfile", r"^ENTRYPOINT.*", 'ENTRYPOINT ["jupyter", "lab", "--IdentityProvider.token="]', "token"),
        ("Makefile", r"--require-hashes requirements.lock", "requirements.lock", "with hashes"),
        ("Makefile", r"--python-version 3.11", "--python-version 3.13", "locks for another Python"),
        (".github/workflows/test.yml", r"3\.11", "3.9", "test.yml"),
    ],
)
def test_drift_is_found(tmp_path, file, old, new, problem):
    for name in SETUP_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text, count = re.subn(old, new, (tmp_path / file).read_text(), flags=re.MULTILINE)
    assert count, f"{file} has no {old}"
    (tmp_path / file).write_text(text)
    assert any(problem in p for p in drift(tmp_path))


def test_every_package_that_the_code_imports_is_asked_for():
    "Not only because another one brings it along."
    asked = {canonicalize_name(Requirement(r).name) for r in settings(ROOT)["requirements"].split()}
    nodes = [node for path in (ROOT / "saltlib").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    imported = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"saltlib"}
    owners = metadata.packages_distributions()
    assert {"torch", "cv2", "rich"} <= imported
    assert [name for name in sorted(imported) if not {canonicalize_name(owner) for owner in owners.get(name, [])} & asked] == []


def test_environment_is_the_locked_one():
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions()}
    pins = {canonicalize_name(p.name): version_of(p) for p, _ in read_lock(ROOT) if not p.marker or p.marker.evaluate()}
    assert {name: installed.get(name) for name in pins} == pins


def test_package_has_the_settings_metadata():
    config, package = settings(ROOT), metadata.metadata("saltlib")
    assert package["Version"] == config["version"]
    wanted = {Requirement(r) for r in config["requirements"].split()}
    assert {r for r in map(Requirement, metadata.requires("saltlib")) if not r.marker} == wanted
    scripts = {f"{e.name}={e.value}" for e in metadata.distribution("saltlib").entry_points if e.group == "console_scripts"}
    assert scripts == set(config["console_scripts"].split())


def run(*command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_hadolint():
    report = run(BIN / "hadolint", "Dockerfile", cwd=ROOT)
    assert report.returncode == 0, report.stdout


def test_ruff():
    report = run(BIN / "ruff", "check", "--no-cache", "--output-format", "concise", cwd=ROOT)
    assert report.returncode == 0, report.stdout


def test_a_wheel_brings_the_run_notebooks_and_works_anywhere(tmp_path):
    (gone := ROOT / "build/lib/saltlib/runs/recipes/gone.yaml").parent.mkdir(parents=True, exist_ok=True)
    gone.touch()  # of an earlier build
    built = run(BIN / "uv", "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", tmp_path, ".", cwd=ROOT)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "site", "zip")
    ours, theirs = (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}
        for folder in (ROOT / "nbs/runs", tmp_path / "site/saltlib/runs")
    )
    assert ours == theirs and len(ours) > 8
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(
        sys.executable, "-c", "import sys; from saltlib.cli import main; sys.exit(main())", "run", "demo", "--dry-run", cwd=elsewhere,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert "12 of 12 steps would run" in done.stdout, done.stderr


def test_data_and_results_stay_out_of_git(clone):
    for name in ["data/train.zip", "data/train/images/a.png", "outputs/run/first/record.json", ".venv/bin/python"]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    assert changes(clone) == ""
    assert (clone / "data/README.md").is_file() and (clone / "outputs/README.md").is_file()


def test_make_alone_lists_the_targets():
    listed = run("make", cwd=ROOT, MAKEFLAGS="").stdout
    for target in ["setup", "demo", "test", "lab", "lock"]:
        assert f"make {target} " in listed


def test_setup_runs_again_only_after_a_change(clone):
    def touch(name, time):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
        os.utime(clone / name, (time, time))

    def plan():
        return run("make", "--dry-run", "setup", cwd=clone, MAKEFLAGS="").stdout

    everything = plan()
    assert "-m venv .uv" in everything and "pip sync" in everything and "--editable" in everything
    for time, names in enumerate(
        ["settings.ini setup.py pyproject.toml requirements.lock", ".uv/bin/uv", ".venv/bin/python", ".venv/.synced", ".venv/.installed"]
    ):
        for name in names.split():
            touch(name, 1_700_000_000 + time)
    assert "pip" not in plan()
    touch("settings.ini", 1_800_000_000)
    assert "pip sync" not in plan() and "--editable" in plan()
    touch("requirements.lock", 1_800_000_000)
    assert "pip sync" in plan() and "--editable" in plan()


@pytest.mark.parametrize(
    "printed, make_exit, closing, ok",
    [
        ("= 3 passed, 1 skipped in 61.20s (0:01:01) =", 0, "= 3 passed, 1 skipped in 61.20s (0:01:01) =", True),
        ("= 1 failed, 3 passed in 4.00s =\nmake: *** [Makefile:20: test] Error 1", 2, "= 1 failed, 3 passed in 4.00s =", False),
        ("= no tests ran in 0.01s =\nmake: *** [Makefile:20: test] Error 5", 2, "= no tests ran in 0.01s =", False),
        ("error: no such package", 0, "the tests did not run to their end", False),
    ],
)
def test_ci_closes_with_the_line_of_pytest(clone, tmp_path, printed, make_exit, closing, ok):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text(f"#!/bin/sh\ncat <<'E'\n{printed}\nE\nexit {make_exit}\n")
    (tmp_path / "bin/make").chmod(0o755)
    ci = run("bash", clone / ".ci/run", cwd=tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert ci.stdout.splitlines()[-1] == closing
    assert (ci.returncode == 0) == ok


def test_ci_finds_the_data_beside_the_clone(clone, tmp_path):
    (tmp_path / "shared/tgs").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text('#!/bin/sh\necho "= $SALT_TGS_DIR in 1s ="\n')
    (tmp_path / "bin/make").chmod(0o755)
    ci = run("bash", clone / ".ci/run", cwd="/", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert ci.stdout.splitlines()[-1] == f"= {tmp_path / 'shared/tgs'} in 1s ="


def test_the_commit_says_whether_the_tree_differs(clone, monkeypatch):
    monkeypatch.chdir(clone)
    clean = git_commit()
    assert re.fullmatch("[0-9a-f]{12,}", clean) and git(clone, "rev-parse", "HEAD").startswith(clean)
    (clone / "README.md").write_text("changed")
    assert git_commit() == clean + "+changes"
