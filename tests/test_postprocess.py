"""Mosaic rules: as their words say, blind to withheld masks and to order; right where they speak."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from saltlib.data import PredictionStore, Tiles, load_tiles, make_folds
from saltlib.ensemble import Ensemble, Group
from saltlib.metrics import bootstrap_interval, precision_at_iou
from saltlib.mosaic import assemble, find_neighbors, mosaic_table
from saltlib.postprocess import RULES, find_sources, rule_effects, straight_masks, straight_rows, withheld_sources


def random_mask(rng) -> np.ndarray:
    "Straight from some row down, or not at all; sometimes empty, or full at the bottom."
    mask = rng.random((101, 101)) < 0.5
    start = rng.choice([0, 1, 40, 51, 52, 90, 96, 97, 100])
    mask[start:] = [rng.random(101) < 0.5, np.zeros(101, bool), np.ones(101, bool)][rng.choice(3, p=[0.6, 0.2, 0.2])]
    return mask


def invent(seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    "Grids of ids ('' for none), ids in random order (some in no grid), and a mask of each."
    rng = np.random.default_rng(seed)
    ids = np.array([f"{k:03}" for k in rng.permutation(100)])
    left, grids = list(ids[:-10]), []
    while len(left) > 40:
        grid = np.full(rng.integers(1, 7, 2), "", dtype="<U3")
        for at in np.ndindex(grid.shape):
            if rng.random() < 0.8:
                grid[at] = left.pop()
        grids.append(grid)
    return grids, ids, np.array([random_mask(rng) for _ in ids])


def table(grids, ids) -> pd.DataFrame:
    row = {id: k for k, id in enumerate(ids)} | {"": -1}
    return mosaic_table([np.vectorize(row.get, otypes=[int])(grid) for grid in grids], ids)


def sources(grids, ids, masks, known, rules):
    return find_sources(table(grids, ids), dict(zip(ids[known], straight_rows(masks[known]))), rules)


def brute_published(grids, mask_of: dict) -> dict:
    "Word for word: tile by tile, down each column, the first that is vertical or soft vertical decides."
    changed = {}
    for grid in grids:
        for column in range(grid.shape[1]):
            decided = False
            for row in range(grid.shape[0]):
                if decided or grid[row, column] not in mask_of:
                    continue
                mask = mask_of[grid[row, column]]
                vertical = all((line == mask[0]).all() for line in mask) and mask.any() and not mask.all()
                soft = all((line == mask[100]).all() for line in mask[51:]) and mask[100].any() and not mask[100].all()
                if vertical or soft:
                    decided = True
                    for below in range(row + 1, grid.shape[0]):
                        changed[grid[below, column]] = mask[100]
                    if vertical and row >= 3:
                        changed[grid[row - 1, column]] = mask[100]
    return {id: line for id, line in changed.items() if id and id not in mask_of}


def brute_continued(grids, mask_of: dict) -> dict:
    changed = {}
    for grid in grids:
        straight = lambda mask, rows: (mask[-rows:] == mask[-1]).all() and mask[-1].any() and not mask[-1].all()
        vertical = [row for (row, _), id in np.ndenumerate(grid) if id in mask_of and straight(mask_of[id], 101)]
        for (row, column), id in np.ndenumerate(grid):
            above = [a for a in grid[:row, column] if a in mask_of]
            if vertical and row >= min(vertical) and above and straight(mask_of[above[-1]], 5):
                changed[id] = mask_of[above[-1]][-1]
    return {id: line for id, line in changed.items() if id and id not in mask_of}


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_rules_do_what_their_words_say(seed, share):
    grids, ids, masks = invent(seed)
    known = np.random.default_rng(seed).random(len(ids)) < share
    for rule, brute in (("published", brute_published), ("continued", brute_continued)):
        expected = brute(grids, dict(zip(ids[known], masks[known])))
        found = sources(grids, ids, masks, known, (rule,))
        given = straight_masks(found, Tiles(ids, masks, masks, np.zeros(len(ids), int)))
        assert set(given) == set(expected)
        assert all((given[id] == expected[id]).all() for id in given)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_known_tiles_and_tiles_in_no_mosaic_keep_their_masks_and_order_does_not_matter(seed):
    grids, ids, masks = invent(seed)
    rng = np.random.default_rng(seed)
    known, order, rules = rng.random(len(ids)) < 0.5, rng.permutation(len(ids)), tuple(rng.permutation(list(RULES)))
    found = sources(grids, ids, masks, known, rules)
    assert not set(found) & {*ids[known], *ids[-10:]} and set(found.values()) <= set(ids[known])
    assert found == sources(grids[::-1], ids[order], masks[order], known[order], rules)
    shuffled = table(grids, ids).sample(frac=1, random_state=0)
    assert found == find_sources(shuffled, dict(zip(ids[known], straight_rows(masks[known]))), rules)
    assert found == {**sources(grids, ids, masks, known, rules[1:]), **sources(grids, ids, masks, known, rules[:1])}


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_withheld_masks_have_no_influence_on_tiles_of_their_fold(seed):
    grids, ids, masks = invent(seed)
    rng = np.random.default_rng(seed)
    folds, other = rng.integers(0, 3, len(ids)), masks.copy()
    for k in np.flatnonzero(folds == 1):
        other[k] = random_mask(rng)
    train, changed = (Tiles(ids, m, m, np.zeros(len(ids), int)) for m in (masks, other))
    own = lambda found: {id: source for id, source in found.items() if id in set(ids[folds == 1])}
    mosaics = table(grids, ids)
    found = withheld_sources(mosaics, train, folds, tuple(RULES))
    assert own(found) == own(withheld_sources(mosaics, changed, folds, tuple(RULES)))
    fold_of = dict(zip(ids, folds))
    assert not any(fold_of[id] == fold_of[source] for id, source in found.items())


def test_effects_count_the_folds_that_were_run_alone(tmp_path):
    "Tile by tile, by hand; fold 1 was not run."
    grids, ids, masks = invent(3)
    folds, mosaics = np.random.default_rng(3).integers(0, 3, len(ids)), table(grids, ids)
    train, store = Tiles(ids, masks, masks, np.zeros(len(ids), int)), PredictionStore.create(tmp_path / "probs.zarr", ids)
    for rows in store.pending():
        store.write(rows, np.where(masks[rows], 0.9, 0.1)[:, ::-1])  # upside down
    effects = rule_effects(Ensemble([Group({0: [(store, 1.0)], 2: [(store, 1.0)]})], ids), mosaics, train, folds, ("continued",)).set_index("rules")
    run = np.isin(folds, (0, 2))
    for rule in RULES:
        given = straight_masks(withheld_sources(mosaics, train, folds, (rule,)), train)
        pairs = {id: (masks[ids == id][0], masks[ids == id][0][::-1]) for id in given if run[ids == id][0]}
        change = [(precision_at_iou(given[id][None], true[None]) - precision_at_iou(seen[None], true[None]))[0] for id, (true, seen) in pairs.items()]
        row = effects.loc[rule]
        assert (
            row["in use"] == (rule == "continued") and row["tiles"] == run.sum()
            and row["changed"] == sum((given[id] != seen).any() for id, (_, seen) in pairs.items()) > 0
        )
        assert (row["better"], row["worse"]) == (sum(c > 0 for c in change), sum(c < 0 for c in change))
        by_id = dict(zip(pairs, change))
        interval = bootstrap_interval(np.array([by_id.get(id, 0) for id in ids[run]]))
        assert np.isclose(row["change of mAP"], sum(change) / run.sum()) and np.allclose(row[["low", "high"]].astype(float), interval)
        assert len(given) > len(pairs), "a tile of fold 1 has to be among those that the rule speaks of"


def test_what_the_rules_give_is_right_on_the_competitions_tiles(tgs):
    train, test = load_tiles(tgs, "train"), load_tiles(tgs, "test")
    ids, images = np.concatenate([train.ids, test.ids]), np.concatenate([train.images, test.images])
    mosaics = mosaic_table(assemble(find_neighbors(images), len(ids)), ids)
    folds = make_folds(ids, np.concatenate([train.depths, test.depths]))[: len(train)]
    for rule in RULES:
        given = straight_masks(withheld_sources(mosaics, train, folds, (rule,)), train)
        scores = precision_at_iou(np.array(list(given.values())), train.masks[train.rows(list(given))])
        assert len(scores) >= 12 and scores.mean() > 0.85
