"""What happens when the disk is full or read-only: on a real small file system, which only this test sees."""

import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

SETUP = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(folder, size: str, script: str) -> str:
    "Output of a script that finds a file system of this size at `folder`; `grow` in it makes the file system larger, `lock` read-only."
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
        def lock(): subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    """
    command = [
        "unshare", "--map-root-user", "--mount", "sh", "-c", SETUP, "sh", size, folder, sys.executable, "-c",
        textwrap.dedent(preamble) + textwrap.dedent(script),
    ]
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
        assert 0 < len(store.pending()) == kept < -(-1000 // 64)
        grow()
        fill(store)
        assert np.abs(PredictionStore(folder / "predictions.zarr").read() - probs).max() < 1e-3
        print("whole")
    """) == "whole\n"


def test_a_file_that_is_written_at_once(tmp_path):
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
        note = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            cells=[nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("'b' * 40_000")],
        )
        cli.run_step = lambda *_: cli.execute_notebook(source, folder / "out.ipynb", {"a": 1}, "prepare")
        source = folder.parent / "in.ipynb"
        nbformat.write(note, source)
        status, said = step()
        assert status == 1 and said.startswith("salt step: ") and "No space left on device" in said and said.count("\\n") == 1, said
        nbformat.read(folder / "out.ipynb", 4)  # as it was before: no half
        grow()
        assert step() == (0, "")
        print("whole")
    """) == "whole\n"


def test_a_submission(tmp_path):
    assert on_small_disk(tmp_path / "disk", "1m", """
        from saltlib.data import read_rle_csv, write_rle_csv
        ids = np.array([f"t{k:04}" for k in range(2000)])
        path = write_rle_csv(folder / "submission.csv", ids, ["1 1"] * 2000)
        before = path.read_bytes()
        codes = [" ".join(f"{k} 1" for k in range(1, 400, 2))] * 2000
        with pytest.raises(SaltError, match="submission.csv could not be written .No space left on device.: make room"):
            write_rle_csv(path, ids, codes)
        assert path.read_bytes() == before and list(folder.iterdir()) == [path]
        grow()
        assert read_rle_csv(write_rle_csv(path, ids, codes), ids).sum() == 2000 * 200
        print("whole")
    """) == "whole\n"


def test_read_only_data_are_enough(tmp_path):
    assert on_small_disk(tmp_path / "disk", "16m", """
        from saltlib.data import check_data, load_tiles
        from saltlib.synthetic import make_dataset
        make_dataset(folder / "data", n_sections=1, seed=1, height_tiles=2, width_tiles=4)
        lock()
        with pytest.raises(OSError, match="Read-only file system"):
            (folder / "data/new").touch()
        assert check_data(folder / "data") == [] and len(load_tiles(folder / "data", "train")) + len(load_tiles(folder / "data", "test")) == 8
        print("whole")
    """) == "whole\n"


def test_read_only_outputs_are_refused_at_once(tmp_path):
    assert on_small_disk(tmp_path / "disk", "1m", """
        import contextlib, io, os, shutil
        from saltlib import cli
        from saltlib.synthetic import make_dataset
        make_dataset(data := folder.parent / "data", 1, seed=0, height_tiles=2, width_tiles=4)
        shutil.copy("settings.ini", folder)
        (folder / "nbs").symlink_to(Path("nbs").resolve())
        (folder / "outputs").mkdir()
        lock()
        os.chdir(folder)
        for command in (["run", "demo", "--data", str(data)], ["mosaic", "--data", "data", "--out", "outputs/mosaics"]):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert cli.main(command) == 1
            line = said.getvalue()
            assert line.startswith(f"salt {command[0]}: outputs") and "Read-only file system" in line and line.count("\\n") == 1, line
        print("refused")
    """) == "refused\n"


def test_an_array_in_a_file(tmp_path):
    "Without room reserved, writing to it would end the process with SIGBUS."
    assert on_small_disk(tmp_path / "disk", "3m", """
        from saltlib.new_tiles import reserve
        np.lib.format.open_memmap(folder / "means.npy", "w+", np.float32, (200, 101, 101))
        with pytest.raises(SaltError, match="no room .No space left on device, 8 MiB.: make room"):
            reserve(str(folder / "means.npy"), "no room")
        grow()
        reserve(str(folder / "means.npy"), "no room")
        np.load(folder / "means.npy", mmap_mode="r+")[:] = 1
        print("whole")
    """) == "whole\n"
