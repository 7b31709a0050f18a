from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from saltlib.core import SaltError
from saltlib.metrics import (
    bootstrap_interval, boundary_error, calibration_curve, calibration_error, count_bodies, coverage_class, error_table, mean_ap, precision_at_iou,
    scores_by_class, threshold_curve, tile_iou,
)

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))
THRESHOLDS = [Fraction(k, 20) for k in range(10, 20)]


def iou_by_definition(pred, true):
    salt, guess = set(zip(*np.nonzero(true))), set(zip(*np.nonzero(pred)))
    return Fraction(len(salt & guess), len(salt | guess)) if salt | guess else Fraction(1)


def precision_by_definition(pred, true):
    if not true.any():
        return Fraction(int(not pred.any()))
    return Fraction(sum(iou_by_definition(pred, true) > t for t in THRESHOLDS), 10)


@given(PAIRS)
def test_scores_by_definition(pair):
    pred, true = pair
    expected = [precision_by_definition(p, t) for p, t in zip(pred, true)]
    assert precision_at_iou(pred, true).tolist() == [float(e) for e in expected]
    assert tile_iou(pred, true).tolist() == [float(iou_by_definition(p, t)) for p, t in zip(pred, true)]
    assert mean_ap(pred, true) == pytest.approx(float(sum(expected) / len(expected)))
    assert precision_at_iou(true, true).tolist() == [1.0] * len(true)


@given(st.integers(1, 10201), st.integers(1, 10201))
@settings(max_examples=200)
def test_strictly_greater_on_full_tiles(both, either):
    both, either = sorted((both, either))
    true, pred = np.zeros((1, 101, 101), bool), np.zeros((1, 101, 101), bool)
    true[0].flat[:either] = True
    pred[0].flat[:both] = True
    assert precision_at_iou(pred, true)[0] == sum(Fraction(both, either) > t for t in THRESHOLDS) / 10


@pytest.mark.parametrize("k", range(10, 20))
@pytest.mark.parametrize("scale", [1, 7, 100, 510])
def test_exactly_on_a_threshold(k, scale):
    true, pred = np.zeros((1, 101, 101), bool), np.zeros((1, 101, 101), bool)
    true[0].flat[: 20 * scale] = True
    pred[0].flat[: k * scale] = True
    assert precision_at_iou(pred, true)[0] == (k - 10) / 10
    pred[0].flat[k * scale] = True
    assert precision_at_iou(pred, true)[0] == (k - 9) / 10


def test_empty_tiles():
    empty, one = np.zeros((1, 101, 101), bool), np.zeros((1, 101, 101), bool)
    one[0, 50, 50] = True
    for pred, true, score in ((empty, empty, 1), (one, empty, 0), (empty, one, 0), (one, one, 1)):
        assert precision_at_iou(pred, true).tolist() == tile_iou(pred, true).tolist() == [score]


def test_masks_of_numbers():
    rng = np.random.default_rng(0)
    pred, true = rng.random((2, 30, 101, 101)) < 0.5
    assert mean_ap(pred.astype(np.uint8) * 255, true.astype(int)) == mean_ap(pred.astype(float), true) == mean_ap(pred, true)


@pytest.mark.parametrize("pred, true", [
    (np.zeros((2, 5, 5), bool), np.zeros((3, 5, 5), bool)), (np.zeros((5, 5), bool), np.zeros((5, 5), bool)),
    (np.zeros((2, 1, 5, 5), bool), np.zeros((2, 1, 5, 5), bool)), (np.full((2, 5, 5), 0.5, np.float32), np.zeros((2, 5, 5), bool)),
])
def test_bad_masks(pred, true):
    for score in (tile_iou, precision_at_iou, mean_ap, boundary_error):
        with pytest.raises(SaltError):
            score(pred, true)


def test_no_tiles():
    none = np.zeros((0, 101, 101), bool)
    assert len(tile_iou(none, none)) == len(precision_at_iou(none, none)) == len(boundary_error(none, none)) == 0
    with pytest.raises(SaltError):
        mean_ap(none, none)


@given(st.integers(0, 100))
def test_coverage_class(pixels):
    mask = np.zeros((1, 10, 10), bool)
    mask.flat[:pixels] = True
    expected = 0 if pixels == 0 else next(k for k in range(1, 11) if pixels <= 10 * k)
    assert coverage_class(mask).tolist() == [expected]


def test_scores_by_class():
    rng = np.random.default_rng(0)
    true = rng.random((200, 20, 20)) < rng.uniform(0.05, 1, (200, 1, 1))
    true[:20], pred = False, rng.random((200, 20, 20)) < 0.5
    pred[:10] = False
    table, classes = scores_by_class(pred, true), coverage_class(true)
    assert table.index.tolist() == list(range(11)) and table.tiles.sum() == 200
    assert table.tiles[0] == 20 and table.mAP[0] == table.IoU[0] == 0.5
    for k in range(1, 11):
        assert table.IoU[k] == pytest.approx(tile_iou(pred, true)[classes == k].mean())
    few = scores_by_class(pred[:20], true[:20])
    assert few.tiles.tolist() == [20] + [0] * 10 and few.mAP[1:].isna().all()


def test_bodies_are_counted_by_what_touches_them():
    true, pred = np.zeros((3, 20, 20), bool), np.zeros((3, 20, 20), bool)
    true[0, 2:5, 2:5] = true[0, 10:15, 10:15] = True  # two bodies, the second one seen by a single pixel
    pred[0, 14, 14] = True
    true[1, 0, 0] = true[1, 1, 1] = True  # one body: its pixels touch by a corner
    pred[1:, 19, 19] = True  # beside the body, and a false alarm
    bodies, missed = count_bodies(pred, true)
    assert bodies.tolist() == [2, 1, 0] and missed.tolist() == [1, 1, 0]
    table = error_table(pred, true)
    assert table.loc["missed bodies (share)", ["value", "n"]].tolist() == [pytest.approx(2 / 3), 3]
    assert table.loc["false alarms (share)", ["value", "n"]].tolist() == [1, 1]
    assert table.loc["boundary error (pixels)", "n"] == 2 and (table["low"] <= table["value"]).all()
    alone = error_table(pred[2:], true[2:])
    assert alone.loc["missed bodies (share)", "n"] == 0 and np.isnan(alone.loc["missed bodies (share)", "value"])


def test_calibration_by_definition():
    rng = np.random.default_rng(0)
    probs, true = rng.random((6, 5, 5)), rng.random((6, 5, 5)) < 0.3
    probs[0] = 1.0  # belongs to the last bin
    curve = calibration_curve([(probs[:2], true[:2]), (probs[2:], true[2:])])
    bins = [(probs >= k / 10) & ((probs < (k + 1) / 10) | (k == 9)) for k in range(10)]
    assert curve["pixels"].tolist() == [b.sum() for b in bins]
    assert np.allclose(curve["probability"], [probs[b].mean() for b in bins]) and np.allclose(curve["salt"], [true[b].mean() for b in bins])
    assert calibration_error(curve) == pytest.approx(sum(abs(probs[b].mean() - true[b].mean()) * b.mean() for b in bins))


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    wide = bootstrap_interval(values, level=0.99)
    assert wide[0] < low and high < wide[1]
    assert bootstrap_interval([1.0]) == (1.0, 1.0)
    assert bootstrap_interval([*values, np.nan]) == (low, high)
    with pytest.raises(SaltError):
        bootstrap_interval([np.nan])


def test_bootstrap_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 0.5 <= high for low, high in (bootstrap_interval(rng.random(60), n=200, seed=k) for k in range(200))]
    assert 0.88 <= np.mean(inside) <= 0.99


def boundary_by_definition(mask):
    outside = {(y, x) for y, x in zip(*np.nonzero(~mask))}
    return [(y, x) for y, x in zip(*np.nonzero(mask)) if outside & {(y, x + 1), (y + 1, x), (y, x - 1), (y - 1, x)}]


@given(PAIRS)
def test_boundary_error_by_definition(pair):
    for error, pred, true in zip(boundary_error(*pair), *pair):
        a, b = boundary_by_definition(pred), boundary_by_definition(true)
        if not a or not b:
            assert np.isnan(error)
            continue
        distances = np.hypot(*np.moveaxis(np.array(a)[:, None] - np.array(b)[None], -1, 0))
        assert error == pytest.approx(np.concatenate([distances.min(axis=1), distances.min(axis=0)]).mean(), abs=1e-4)


def test_threshold_curve():
    rng = np.random.default_rng(0)
    probs, true = rng.random((20, 11, 11), dtype=np.float32), rng.random((20, 11, 11)) < 0.5
    thresholds = [0.1, 0.5, 0.9]
    assert threshold_curve(probs, true, thresholds).tolist() == [mean_ap(probs > t, true) for t in thresholds]
    assert threshold_curve(np.where(true, 0.5, 0), true, [0.5]).tolist() == [0]  # salt is above the threshold


def test_error_table_has_both_scores():
    true, pred = np.zeros((2, 1, 10, 10), bool)
    true[:, :6], pred[:, :5] = True, True
    assert error_table(pred, true).loc[["mAP", "IoU"], "value"].tolist() == pytest.approx([0.7, 5 / 6])
