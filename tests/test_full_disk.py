"""What happens when the disk is full: on a real small file system, which only this test sees."""

import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

SETUP = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(folder, size: str, script: str) -> str:
    "Output of a script that finds a file system of this size at `folder`; `grow` in it makes the file system larger."
    may = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    if may.returncode:
        pytest.skip(f"needs mounts of its own: {may.stderr.decode().strip()}")
    folder.mkdir()
    preamble = f"""
        import subprocess
        from pathlib import Path
        import numpy as np
        import pytest
        from saltlib.core import SaltError
        folder = Path({str(folder)!r})
        def grow(): subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
    """
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SETUP, "sh", size, folder, sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_predictions(tmp_path):
    assert on_small_disk(tmp_path / "disk", "6m", """
        from saltlib.data import PredictionStore
        ids = np.array([f"t{k:04}" for k in range(1000)])
        probs = np.random.default_rng(0).random((1000, 101, 101)).astype(np.float32)
        store = PredictionStore.create(folder / "predictions.zarr", ids)
        def fill(store):
            for rows in store.pending():
                store.write(rows, probs[rows])
        with pytest.raises(SaltError, match="predictions.zarr could not be written .No space left on device.: make room"):
            fill(store)
        kept = len(store.pending())
        store = PredictionStore.create(folder / "predictions.zarr", ids)
        assert 0 < len(store.pending()) == kept < -(-1000 // 64) and not store.complete
        grow()
        fill(store)
        assert np.abs(PredictionStore(folder / "predictions.zarr").read() - probs).max() < 1e-3
        print("whole")
    """) == "whole\n"


def test_a_checkpoint_and_the_copies_beside_it(tmp_path):
    "The earlier file stays as it was, and no half of the new one is left."
    assert on_small_disk(tmp_path / "disk", "3m", """
        from saltlib.core import write_atomic
        path = write_atomic(folder / "checkpoint.pt", b"a" * 2_000_000)
        with pytest.raises(SaltError, match="checkpoint.pt could not be written .No space left on device.: make room"):
            write_atomic(path, b"b" * 2_000_000)
        assert path.read_bytes() == b"a" * 2_000_000 and list(folder.iterdir()) == [path]
        grow()
        assert write_atomic(path, b"b" * 2_000_000).read_bytes() == b"b" * 2_000_000
        print("whole")
    """) == "whole\n"


def test_an_executed_notebook(tmp_path):
    "One sentence; the same command goes on once there is room."
    assert on_small_disk(tmp_path / "disk", "64k", """
        import contextlib, io
        from saltlib import cli
        (folder / "filler").write_bytes(b"a" * 60_000)
        def step():
            with contextlib.redirect_stderr(io.StringIO()) as said:
                status = cli.main(["step", "prepare", "--recipe-file", "outputs/none/recipe.yaml"])
            return status, said.getvalue()
        import nbformat, papermill
        note = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, cells=[nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("'b' * 40_000")])
        cli.run_step = lambda *_: cli.execute_notebook(source, folder / "out.ipynb", {"a": 1}, "prepare")
        source = folder.parent / "in.ipynb"
        nbformat.write(note, source)
        status, said = step()
        assert status == 1 and said.startswith("salt step: ") and "No space left on device" in said and said.count("\\n") == 1, said
        grow()
        assert step() == (0, "")
        print("whole")
    """) == "whole\n"
