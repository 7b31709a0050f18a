"""salt bench does everything that it has figures for."""

import json

import numpy as np

from saltlib.bench import NETWORKS
from saltlib.cli import main


def test_quick_bench(tmp_path, capsys):
    assert main(["bench", "--quick", "--json", str(tmp_path / "bench.json")]) == 0
    bench = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["work"]: row for row in bench["rows"]}
    assert {f"predict {name}" for name in NETWORKS} | {"train compact", "load tiles", "find neighbours"} <= set(rows)
    assert all(row["tiles_per_second"] > 0 and np.isfinite(row["mib"]) for row in rows.values())
    # Half precision costs an untrained network 0.002 of a probability at most; a mirror image that is not turned back, 0.01.
    assert all(row["plain"] > 0 and row["difference"] < 0.005 for work, row in rows.items() if work.startswith("predict"))
    assert bench["machine"]["matmul_gflops"] > 0
    table = capsys.readouterr().out
    assert all(work in table for work in rows)


def test_a_place_that_can_not_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "none" / "bench.json", tmp_path / "file" / "bench.json"):
        assert main(["bench", "--json", str(place)]) == 1
        assert "can't be written to" in capsys.readouterr().err
