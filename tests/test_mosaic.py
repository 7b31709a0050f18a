"""Neighbours and mosaics: right where the truth is known, as published on the competition's tiles, nothing placed on bad input."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from saltlib import mosaic
from saltlib.cli import main
from saltlib.core import SaltError
from saltlib.data import is_black, load_tiles, make_folds
from saltlib.metrics import bootstrap_interval
from saltlib.mosaic import assemble, close_pairs, edge_disagreement, find_neighbors, mosaic_groups, unit
from saltlib.synthetic import make_dataset

PAIR = ["first", "second", "direction"]


def load_all(root):
    train, test = load_tiles(root, "train"), load_tiles(root, "test")
    return np.concatenate([train.ids, test.ids]), np.concatenate([train.images, test.images])


def named(neighbors, ids):
    return set(neighbors.assign(first=ids[neighbors["first"]], second=ids[neighbors["second"]])[PAIR].itertuples(index=False, name=None))


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    "30 synthetic sections: ids, tiles and their true neighbours."
    root = make_dataset(tmp_path_factory.mktemp("sections") / "data", n_sections=30, seed=11)
    truth = set(pd.read_csv(root / "neighbors.csv", dtype=str)[PAIR].itertuples(index=False, name=None))
    return *load_all(root), truth


@pytest.fixture(scope="module")
def neighbors(sections):
    "Those that the default rule finds."
    return find_neighbors(sections[1])


def noisy(images, deviation):
    return (images + np.random.default_rng(1).normal(0, deviation, images.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "method, noise, least_found", [("published", 0, 0.7), ("default", 0, 0.8), ("published", 5, 0.1), ("default", 5, 0.3), ("default", 15, 0.3)],
)
def test_neighbours_of_synthetic_sections(sections, method, noise, least_found):
    ids, images, truth = sections
    found = named(find_neighbors(noisy(images, noise) if noise else images, method), ids)
    assert len(found & truth) >= 0.995 * len(found)
    assert len(found & truth) >= least_found * len(truth)


def mirrored_halves(images):
    "Half of the tiles mirrored, left to right, and which: a pair of both kinds is wrong, and about as many wrong ones are of one kind."
    mirrored = np.random.default_rng(0).random(len(images)) < 0.5
    return np.where(mirrored[:, None, None], images[:, :, ::-1], images), mirrored


@pytest.mark.parametrize("noise", [0, 5])
def test_mirrored_tiles_are_no_neighbours_of_others(sections, noise):
    _, images, _ = sections
    halves, mirrored = mirrored_halves(noisy(images, noise) if noise else images)
    found = find_neighbors(halves)
    assert len(found) > 100
    assert 2 * (mirrored[found["first"]] != mirrored[found["second"]]).sum() <= 0.01 * len(found)


def test_noise_alone_has_no_neighbours():
    noise = np.random.default_rng(0).integers(0, 256, (300, 101, 101), dtype=np.uint8)
    for method in ("default", "published"):
        assert len(find_neighbors(noise, method)) == 0


def test_duplicates_are_not_placed_wrongly(sections):
    ids, images, truth = sections
    twice = np.concatenate([images, images[:200]])
    found = find_neighbors(twice)
    names = np.concatenate([ids, ids[:200]])
    assert len(found) > 1000 and len(named(found, names) & truth) >= 0.995 * len(found)


def test_pairs_are_consistent_and_grids_hold_each_tile_once(sections, neighbors):
    ids, images, _ = sections
    assert not neighbors.duplicated(["first", "direction"]).any() and not neighbors.duplicated(["second", "direction"]).any()
    grids = assemble(neighbors, len(ids))
    tiles = np.concatenate([grid[grid >= 0] for grid in grids])
    assert len(tiles) == len(set(tiles)) and min((grid >= 0).sum() for grid in grids) >= 2
    met = {
        (a, b, d) for grid in grids for d, first, second in (("right", grid[:, :-1], grid[:, 1:]), ("down", grid[:-1], grid[1:]))
        for a, b in zip(first.flat, second.flat) if min(a, b) >= 0
    }
    assert met == set(neighbors[PAIR].itertuples(index=False, name=None))


def test_order_of_tiles_does_not_matter(sections, neighbors):
    ids, images, _ = sections
    order = np.random.default_rng(3).permutation(len(ids))
    assert named(neighbors, ids) == named(find_neighbors(images[order]), ids[order])


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    last, first = (unit(v) for v in rng.normal(size=(2, 700, 9)).astype(np.float32))
    whole = close_pairs(last, first, least=0.5)
    monkeypatch.setattr("saltlib.mosaic.BLOCK", (64, 100))
    pieces = close_pairs(last, first, least=0.5)
    assert set(zip(whole.first, whole.second)) == set(zip(pieces.first, pieces.second))
    np.testing.assert_allclose(whole.rest_first, pieces.rest_first, atol=1e-6)
    np.testing.assert_allclose(whole.rest_second, pieces.rest_second, atol=1e-6)


@pytest.mark.parametrize("gpu", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_torch_finds_the_same_neighbours(sections, neighbors, gpu):
    ids, images, _ = sections
    assert named(neighbors, ids) == named(find_neighbors(images, gpu=gpu), ids)
    assert len(find_neighbors(np.repeat(images[:1], 5, axis=0), gpu=gpu)) == 0


def test_the_teachers_are_drawn_alike_each_time(sections, monkeypatch):
    taught = []
    monkeypatch.setattr(mosaic, "TEACHERS", 20)
    monkeypatch.setattr(mosaic, "learn_continuation", lambda tiles, learn=mosaic.learn_continuation: taught.append(tiles.tobytes()) or learn(tiles))
    for _ in range(2):
        mosaic.learned_pairs(sections[1][:60])
    assert taught[0] == taught[1] and len(taught[0]) == 20 * 101 * 101


def test_a_mosaic_stays_in_one_fold(sections, neighbors):
    ids, images, _ = sections
    groups = mosaic_groups(assemble(neighbors, len(ids)), len(ids))
    folds = make_folds(ids, np.zeros(len(ids)), groups=groups)
    assert (pd.Series(folds[groups >= 0]).groupby(groups[groups >= 0]).nunique() == 1).all()
    assert np.bincount(folds).max() - np.bincount(folds).min() <= 0.1 * len(ids)


def test_salt_mosaic_writes_tables_and_pictures(tmp_path, capsys):
    root = make_dataset(tmp_path / "data", n_sections=2, seed=5)
    assert main(["mosaic", "--data", str(root), "--out", str(tmp_path / "out")]) == 0
    ids, _ = load_all(root)
    train, test, beside = load_tiles(root, "train"), load_tiles(root, "test"), set()
    for file in sorted((tmp_path / "out").glob("mosaic_*.csv")):
        grid = pd.read_csv(file, header=None, dtype=str, keep_default_na=False).to_numpy()
        assert set(grid.ravel()) <= {*ids, ""}
        for lines, direction in ((grid, "right"), (grid.T, "down")):
            beside |= {(*pair, direction) for line in lines for pair in zip(line, line[1:]) if "" not in pair}
        picture = cv2.imread(str(file.with_suffix(".png")))[:, :, ::-1].astype(int)
        for (row, column), id in np.ndenumerate(grid):
            place = picture[101 * row : 101 * (row + 1), 101 * column : 101 * (column + 1)]
            if id in test.ids:  # grey, as it is
                assert (place == test.images[test.rows([id])[0]][:, :, None]).all()
            elif id:  # framed in green, its salt washed over in blue
                tile, green = train[train.rows([id])], (0, 158, 115)
                assert all((place[edge] == green).all() for edge in ((0,), (-1,), (np.s_[:], 0), (np.s_[:], -1)))
                inside, salt, grey = place[2:-2, 2:-2], tile.masks[0, 2:-2, 2:-2], tile.images[0, 2:-2, 2:-2, None].astype(int)
                washed = 0.65 * grey[salt] + 0.35 * np.array([86, 180, 233])
                assert (inside[~salt] == grey[~salt]).all() and np.abs(inside[salt] - washed).max(initial=0) <= 1
            else:  # white
                assert (place == 255).all()
    assert beside == set(pd.read_csv(tmp_path / "out/pairs.csv", dtype=str)[PAIR].itertuples(index=False, name=None))
    assert {id for id in train.ids if train.masks[train.rows([id])[0]].any()} & {id for pair in beside for id in pair[:2]}, "no salt was drawn"
    assert "mosaics of" in capsys.readouterr().out
    assert main(["mosaic", "--data", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["default", "published"])
def test_bad_tiles_are_refused_and_nothing_is_placed_blindly(sections, method):
    _, images, _ = sections
    with pytest.raises(SaltError, match="2 tiles or more"):
        find_neighbors(images[:1], method)
    with pytest.raises(SaltError, match=r"\[N, 101, 101\]"):
        find_neighbors(images[:, :100, :100], method)
    broken = images[:10].astype(float)
    broken[3, 50, 50] = np.nan
    with pytest.raises(SaltError, match="Tile 3"):
        find_neighbors(broken, method)
    assert len(find_neighbors(np.full((20, 101, 101), 9, np.uint8), method)) == 0
    assert len(find_neighbors(np.repeat(images[:1], 5, axis=0), method)) == 0


@pytest.fixture
def released(tgs) -> pd.DataFrame:
    "Half of the winners' pairs of neighbours, which lie beside the tiles where this project was written."
    if not (file := tgs.parent / "reference/adjacency_half.csv").is_file():
        pytest.skip(f"needs the winners' pairs of neighbours: {file}")
    return pd.read_csv(file, dtype=str)


def test_the_published_rule_finds_the_published_pairs(tgs, released):
    ids, images = load_all(tgs)
    pairs = find_neighbors(images, "published")
    counts = pairs["direction"].value_counts()
    assert abs(counts["down"] - 3498) <= 3 and abs(counts["right"] - 2855) <= 3  # a direct NumPy version finds so many; processors round differently
    for direction, known in released.groupby("direction"):
        own = pairs[pairs["direction"] == direction]
        follower = dict(zip(ids[own["first"]], ids[own["second"]]))
        assert [] == [(a, b) for a, b in zip(known["first"], known["second"]) if follower.get(a, b) != b]
        found = sum(follower.get(a) == b for a, b in zip(known["first"], known["second"]))
        assert found >= 0.7 * len(known), (direction, found, len(known))


def test_the_default_rule_reaches_further_and_contradicts_nothing(tgs, released):
    ids, images = load_all(tgs)
    default, published = (find_neighbors(images, method) for method in ("default", "published"))
    found = named(default, ids)
    known = set(released[PAIR].itertuples(index=False, name=None))
    assert len(found) > 1.25 * len(published)
    assert len(found & known) >= 0.978 * len(known)  # 0.9806 here; another CPU rounds otherwise
    follower = {(a, d): b for a, b, d in found}
    assert [] == [(a, b, d) for a, b, d in known if follower.get((a, d), b) != b]
    masks = load_tiles(tgs, "train").masks  # rows of the train tiles come first
    new = default.merge(published[PAIR], how="left", indicator=True).query("_merge == 'left_only'")
    disagreement, usual = edge_disagreement(new, masks), edge_disagreement(published, masks)
    assert np.nanmean(disagreement) <= bootstrap_interval(usual)[1]


def test_few_of_the_default_rules_pairs_are_wrong(tgs):
    _, images = load_all(tgs)
    halves, mirrored = mirrored_halves(images)
    found = find_neighbors(halves)
    assert 2 * (mirrored[found["first"]] != mirrored[found["second"]]).sum() <= 0.008 * len(find_neighbors(images))


def test_hardly_a_tile_is_left_that_could_be_placed(tgs):
    "Not all tiles of the mosaics are stretched to 0..255; of the others nearly all are, so few of them come from such sections."
    _, images = load_all(tgs)
    size = np.zeros(len(images), int)
    for grid in assemble(find_neighbors(images), len(images)):
        size[grid[grid >= 0]] = (grid >= 0).sum()
    light = (images.min(axis=(1, 2)) > 0) & ~is_black(images)
    assert (size >= 6).sum() >= 4900
    assert light[size == 0].sum() / light[size >= 6].mean() <= 80


def test_two_into_one_folder_do_not_mix(tmp_path, monkeypatch):
    "While one is at work or writes, a second is refused at once and takes nothing away."
    data, out = make_dataset(tmp_path / "data", n_sections=1, seed=3, height_tiles=2, width_tiles=3), tmp_path / "mosaics"
    alone = mosaic.write_mosaics(data, tmp_path / "alone")

    def beside_another(function):
        def called(*args, **settings):
            with pytest.raises(SaltError, match="mosaics is there already and not empty"):
                mosaic.write_mosaics(data, out)
            return function(*args, **settings)

        return called

    monkeypatch.setattr(mosaic, "find_neighbors", beside_another(find_neighbors))
    monkeypatch.setattr(mosaic, "write_atomic", beside_another(mosaic.write_atomic))
    assert len(mosaic.write_mosaics(data, out)) == len(alone)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
