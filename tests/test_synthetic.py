"""Synthetic data: reproducible to the byte, true to place, as much salt as the competition's data, accepted by the checks."""

import csv

import cv2
import numpy as np
import pytest

from saltlib.core import SaltError, checksum
from saltlib.data import check_data, load_tiles, read_rle_csv
from saltlib.synthetic import cut_tiles, make_dataset, model_section, salt_bodies, to_grey


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "data", n_sections=2, seed=11, black_share=0.1)


@pytest.fixture(scope="module")
def tiles(root):
    "Image and true mask of every tile, by id."
    train, test = load_tiles(root, "train"), load_tiles(root, "test")
    truth = read_rle_csv(root / "test_truth.csv", test.ids)
    return {id: pair for split, masks in ((train, train.masks), (test, truth)) for id, *pair in zip(split.ids, split.images, masks)}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_checks_accept_it(root, tiles):
    assert check_data(root) == []
    assert len(tiles) == 80
    assert len(list((root / "train" / "masks").iterdir())) == 48


def test_same_seed_same_bytes_whatever_the_threads(root, tmp_path):
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1 if threads > 1 else 2)
        again = make_dataset(tmp_path / "again", n_sections=2, seed=11, black_share=0.1)
    finally:
        cv2.setNumThreads(threads)
    assert checksum(again) == checksum(root)
    other = make_dataset(tmp_path / "other", n_sections=1, seed=12, height_tiles=1, width_tiles=2, train_share=0.5)
    assert not {row["id"] for row in table(other / "depths.csv")} & {row["id"] for row in table(root / "depths.csv")}


def test_neighbours_are_true(root, tiles):
    pairs = table(root / "neighbors.csv")
    black = {id for id, (image, _) in tiles.items() if image.max() == 0}
    assert 0 < len(black) < 20 and not black & {id for pair in pairs for id in (pair["first"], pair["second"])}
    assert len(pairs) <= 2 * (5 * 7 + 4 * 8)
    facing = {"right": (np.s_[:, -1], np.s_[:, 0]), "down": (np.s_[-1], np.s_[0])}

    def fit(first, second, direction):
        (a, b) = facing[direction]
        return np.corrcoef(tiles[first][0][a], tiles[second][0][b])[0, 1]

    for way in facing:
        ids = [(pair["first"], pair["second"]) for pair in pairs if pair["direction"] == way]
        assert len(set(first for first, _ in ids)) == len(set(second for _, second in ids)) == len(ids)  # one neighbour a side
        true = [fit(first, second, way) for first, second in ids]
        chance = [fit(first, ids[k - 9][1], way) for k, (first, _) in enumerate(ids)]
        assert np.median(true) > 0.85 and np.median(chance) < 0.3


def test_place_is_that_of_the_section(root, tiles):
    amplitudes, salt = map(cut_tiles, model_section([11, 1], 5, 8))
    images = {image.tobytes(): mask for image, mask in tiles.values()}
    found = [(images[image.tobytes()], mask) for image, mask in zip(to_grey(amplitudes), salt) if image.tobytes() in images]
    assert len(found) > 30  # all but the black ones
    assert all((labelled == (mask & ~mask.all())).all() for labelled, mask in found)


def test_labels_and_depths_as_in_the_competition(root, tiles):
    assert not any(mask.all() for _, mask in tiles.values())
    assert not any(mask.any() for image, mask in tiles.values() if image.max() == 0)
    assert all((image.min(), image.max()) == (0, 255) for image, _ in tiles.values() if image.max())
    z = {row["id"]: int(row["z"]) for row in table(root / "depths.csv")}
    assert len(set(z.values())) <= 10  # 2 sections of 5 rows
    assert {(pair["direction"], z[pair["second"]] - z[pair["first"]]) for pair in table(root / "neighbors.csv")} == {("down", 50), ("right", 0)}


def test_as_much_salt_as_in_the_competition():
    coverage = np.concatenate([cut_tiles(salt_bodies(np.random.default_rng(k), (505, 808))).mean(axis=(1, 2)) for k in range(12)])
    coverage[coverage == 1] = 0  # as tiles are labelled
    some = coverage[coverage > 0]
    assert 0.25 < np.mean(coverage == 0) < 0.55  # the competition: 0.39
    shares = np.histogram(some, [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])[0] / len(some)
    assert (shares > 0.05).all() and (shares < 0.4).all()


def test_the_eye_can_find_salt():
    "Weaker inside than outside, and a strong reflection at the top: where salt begins, the trace is at its brightest."
    calmer, top = [], []
    for k in range(8):
        section, mask = model_section([4, k], 4, 5)
        calmer.append(section[mask].std() / section[~mask].std())
        begins = np.diff(mask.astype(np.int8), axis=0, prepend=np.int8(0)) == 1
        begins[0] = False
        top.append(section[begins].mean() / section.std())
    assert np.median(calmer) < 0.85 and np.median(top) > 0.8


def test_refusals(root, tmp_path):
    before = checksum(root)
    with pytest.raises(SaltError, match="not empty: delete it or name another folder"):
        make_dataset(root, n_sections=1, seed=1)
    assert checksum(root) == before
    for wrong in ({"n_sections": 0}, {"seed": -1}, {"train_share": 1.0}, {"width_tiles": 0}):
        with pytest.raises(SaltError, match="Synthetic data need"):
            make_dataset(tmp_path / "wrong", **{"n_sections": 1, "seed": 1} | wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saltlib.data.write_png", full_disk)
    with pytest.raises(SaltError, match="No space left on device"):
        make_dataset(tmp_path / "data", n_sections=1, seed=1)
    assert list(tmp_path.iterdir()) == []
