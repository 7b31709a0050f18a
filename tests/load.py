"""Many tiles through the library, step by step: `make load`. Each step is a process of its own, as in a run; its time
and its peak memory are printed, and nothing may be lost on the way."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch

from saltlib.core import process_memory
from saltlib.data import PredictionStore, check_data, encode_masks, load_tiles, make_folds, read_by_id, read_folds, unique_pixels, write_folds, write_rle_csv
from saltlib.ensemble import Ensemble, Group, average_round, score_out_of_fold
from saltlib.inference import predict_to_store
from saltlib.mosaic import assemble, find_neighbors, mosaic_groups
from saltlib.synthetic import cut_tiles, make_section

LIMIT = 4000  # MB
TRAIN = 4000  # as in the competition; all others are test tiles


class Tiny(torch.nn.Module):
    "A network of one layer."

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 5, padding=2)

    def forward(self, x):
        return self.layer(x)


def sections(n: int):
    "Tiles by the section; a dozen sections, each time with another contrast and another slow drift of the grey."
    rng = np.random.default_rng(0)
    bases = [make_section([0, k], 10, 20) for k in range(12)]
    for start in range(0, n, 200):
        image, mask = bases[rng.integers(len(bases))]
        drift = cv2.resize(rng.normal(0, 20, (12, 22)).astype(np.float32), image.shape[::-1], interpolation=cv2.INTER_CUBIC)
        image = np.clip(128 + (image.astype(np.float32) - 128) * rng.uniform(0.5, 1) + drift + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        yield from list(zip(cut_tiles(image), cut_tiles(mask)))[: n - start]


def write_data(root: Path, n: int) -> None:
    root.mkdir()
    ids = [f"{k:010x}" for k in np.random.default_rng(1).choice(16**8, n, replace=False)]
    archives = {split: zipfile.ZipFile(root / f"{split}.zip", "w") for split in ("train", "test")}
    codes = []
    for k, (image, mask) in enumerate(sections(n)):
        archives["train" if k < TRAIN else "test"].writestr(f"images/{ids[k]}.png", cv2.imencode(".png", image)[1].tobytes())
        if k < TRAIN:
            archives["train"].writestr(f"masks/{ids[k]}.png", cv2.imencode(".png", mask * np.uint8(255))[1].tobytes())
            codes += encode_masks(mask[None])
    for archive in archives.values():
        archive.close()
    (root / "depths.csv").write_text("id,z\n" + "".join(f"{id},{k % 900}\n" for k, id in enumerate(ids)))
    write_rle_csv(root / "train.csv", ids[:TRAIN], codes)
    write_rle_csv(root / "sample_submission.csv", ids[TRAIN:], [""] * (n - TRAIN))


def check(root: Path) -> None:
    assert check_data(root) == []


def mosaic(root: Path) -> None:
    "With the folds, as a run's first notebook."
    train = load_tiles(root, "train")
    tiles = load_tiles(root, "test", after=train)
    grids = assemble(find_neighbors(tiles.images), len(tiles))
    print(f"({len(grids)} mosaics of {sum(int((grid >= 0).sum()) for grid in grids)} tiles)", end=" ")
    for groups in (None, mosaic_groups(grids, len(tiles))):
        folds = make_folds(tiles.ids, tiles.depths, 5, groups)
        assert len(folds) == len(tiles) and np.ptp(np.bincount(folds)) <= (1 if groups is None else max(grid.size for grid in grids))
    write_folds(root / "folds.csv", train.ids, folds[: len(train)], unique_pixels(train.images))


def predictions(root: Path) -> None:
    "Of two networks: the tiles of fold 0 and all test tiles."
    train = load_tiles(root, "train")
    tiles = load_tiles(root, "test", after=train[read_folds(root / "folds.csv", train.ids) == 0])
    for k in range(2):
        torch.manual_seed(k)
        store = PredictionStore.create(root / f"{k}.zarr", tiles.ids)
        for _ in predict_to_store([Tiny()], tiles.images, ["compact"], store, device="cpu"):
            pass
        assert store.pending() == []


def ensemble(root: Path) -> None:
    train, test = load_tiles(root, "train"), load_tiles(root, "test")
    whole = Ensemble([Group({0: [(PredictionStore(root / f"{k}.zarr"), k + 1) for k in range(2)]})], test.ids)
    score_out_of_fold(whole, train, read_folds(root / "folds.csv", train.ids))
    tables = average_round(whole, test.images, PredictionStore.create(root / "mean.zarr", test.ids), clean=True)
    write_rle_csv(root / "submission.csv", tables[None]["id"], tables[None]["rle_mask"])


def submission(root: Path) -> None:
    "The ids that were asked for, each once, and nothing lost in the stores."
    asked, answered = (read_by_id(root / name, "rle_mask") for name in ("sample_submission.csv", "submission.csv"))
    assert asked[1] == answered[1] == [] and set(asked[0]) == set(answered[0]) and any(answered[0].values())
    assert set(PredictionStore(root / "mean.zarr").ids) == set(asked[0])


STEPS = [write_data, check, mosaic, predictions, ensemble, submission]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=200_000)
    parser.add_argument("--step", choices=[step.__name__ for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step = next(step for step in STEPS if step.__name__ == args.step)
        step(args.root, args.tiles) if step is write_data else step(args.root)
        print(round(process_memory()["VmHWM"] * 2**20 / 10**6))
        return 0
    root, failed = Path(tempfile.mkdtemp(prefix="saltlib-load-")) / "data", False
    for step in STEPS:
        began = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "--step", step.__name__, "--root", root, "--tiles", str(args.tiles)], stdout=subprocess.PIPE, text=True,
        )
        if done.returncode:
            print(f"{step.__name__}: failed ({done.returncode})")
            failed = True
            continue
        *said, peak = done.stdout.split(" ")
        failed |= int(peak) > LIMIT
        print(
            f"{step.__name__}: {args.tiles} tiles, {time.time() - began:.0f} s, {int(peak)} MB{' (too much)' * (int(peak) > LIMIT)} {' '.join(said)}",
            flush=True,
        )
    shutil.rmtree(root.parent)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
