import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]

# Two workers share two cores: threads inside them would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # those of steps that have two must not spin beside the other worker's

# On a busy machine hypothesis' limit of 0.2 s an example says nothing about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config):
    """Matplotlib's list of fonts is made anew for the tests, once for all their processes: the one in the user's home outlives
    environments, and a list made while an environment was being deleted has warnings in every notebook from then on."""
    if hasattr(config, "workerinput"):
        return
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["MPLCONFIGDIR"] = folder
    import matplotlib.font_manager  # noqa: F401, PLC0415 reads the variable, and writes the list


# Each of these takes a minute or more. The second one makes the run that others in its file look at.
LONG = ("test_three_rounds", "test_every_step_leaves", "test_killed", "test_failed_step", "test_nbdev_test")


def pytest_collection_modifyitems(items):
    "Long tests first, what looks at the finished run last: so no worker waits for another, or is left alone at the end."
    last = len(LONG) + 1
    items.sort(key=lambda item: next((k for k, name in enumerate(LONG) if item.name.startswith(name)), last if "finished" in item.fixturenames else len(LONG)))


@pytest.fixture(autouse=True)
def deaf_to_the_end_of_children():
    """Undo that torch's DataLoader listens to SIGCHLD from its first worker on: tests end a thousand processes.
    After salt bench in the same process, on a CPU with AMX and Linux 6.18, the kernel now and then fails to deliver
    that signal and sends SIGSEGV instead; the test's worker is gone without a word."""
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def make_clone(folder: Path) -> Path:
    "A repository with the files of the working tree as its only commit."
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if (source := ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def clone(tmp_path):
    "Tests may change it, and ask git what changed."
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="session")
def common_clone(tmp_path_factory):
    "Tests leave it as it is, and ask git whether they did."
    return make_clone(tmp_path_factory.mktemp("common") / "clone")


def commit(folder: Path):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")


def changes(folder: Path) -> str:
    "What differs from the commit, '' if nothing does."
    return git(folder, "status", "--porcelain") + git(folder, "diff")


@pytest.fixture(scope="session")
def tgs() -> Path:
    "The folder of the competition's data."
    if not (folder := os.environ.get("SALT_TGS_DIR")):
        pytest.skip("needs the competition's data: set SALT_TGS_DIR to its folder")
    return Path(folder)
