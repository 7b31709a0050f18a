"""Ensembles at size."""

import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import zarr

from saltlib.data import SIZE, PredictionStore
from saltlib.ensemble import Ensemble, Group, average_round, group_means


class AtOnce(ThreadPoolExecutor):
    "Does what it is given before it goes on: the peak of threads depends on how their moments meet, by a tenth and more."

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future


def peak_memory(folder, tiles: int, members: int) -> int:
    "Bytes that the averaging of a round needs beside the images, at its peak."
    ids = np.array([f"tile{k:05}" for k in range(tiles)])
    row, column = np.mgrid[:SIZE, :SIZE]
    probs = 1 / (1 + np.exp(np.hypot(row - 50, column - 40) / 4 - 9))
    images = np.random.default_rng(0).integers(0, 255, (tiles, SIZE, SIZE), dtype=np.uint8)
    folder.mkdir()
    for k in range(members):
        store = PredictionStore.create(folder / f"{k}.zarr", ids)
        for rows in store.pending():
            store.write(rows, np.broadcast_to(probs, (rows.stop - rows.start, SIZE, SIZE)))
    mean = PredictionStore.create(folder / "mean.zarr", ids)
    tracemalloc.start()
    stores = [(PredictionStore(folder / f"{k}.zarr"), 1.0) for k in range(members)]
    tables = average_round(Ensemble([Group({0: stores}, stretch=True)], ids), images, mean, clean=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mean.pending() == [] and len(tables[0]) == len(tables[None]) == tiles
    return peak


def constant(path, ids, value):
    store = PredictionStore.create(path, ids)
    for rows in store.pending():
        store.write(rows, np.full((rows.stop - rows.start, SIZE, SIZE), value))
    return store


def test_folds_count_the_same_whatever_their_weights(tmp_path):
    ids = np.array(["a", "b", "c"])
    low, high, other = (constant(tmp_path / f"{value}.zarr", ids, value) for value in (0.25, 0.75, 0.5))
    means = group_means(Group({2: [(low, 3.0), (high, 1.0)], 4: [(other, 8.0)]}), ids[[2, 0]])
    assert list(means) == [2, 4, None]  # folds by their numbers, then all
    for fold, expected in ((2, 0.375), (4, 0.5), (None, 0.4375)):
        assert means[fold].shape == (2, SIZE, SIZE) and (means[fold] == expected).all()


def test_memory_grows_neither_with_tiles_nor_with_members(tmp_path, monkeypatch):
    monkeypatch.setattr("saltlib.core.ThreadPoolExecutor", AtOnce)
    with zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}):  # zarr's threads, too, meet otherwise on a busy machine
        few = peak_memory(tmp_path / "few", 512, 1)
        assert peak_memory(tmp_path / "tiles", 1280, 1) < 1.1 * few
        assert peak_memory(tmp_path / "members", 512, 3) < 1.1 * few
