"Pictures: every function copes with the edges of its data, and the files stay small."

import io

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from saltlib import plots
from saltlib.metrics import scores_by_class
from saltlib.synthetic import cut_tiles, make_section


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tiles():
    "12 tiles of a synthetic section, the first painted free of salt, with smooth predictions and ids."
    image, mask = make_section(seed=4, height_tiles=3, width_tiles=4)
    masks, probs = cut_tiles(mask), cut_tiles(cv2.GaussianBlur(mask.astype("float32"), (0, 0), 5))
    masks[0] = probs[0] = 0
    return cut_tiles(image), masks, probs, np.array([f"{k:010x}" for k in range(12)])


def png(figure) -> int:
    "Size of the picture in bytes."
    figure.savefig(stored := io.BytesIO())
    return stored.getbuffer().nbytes


def texts(figure) -> str:
    "All that is written in a picture."
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def history(epochs: int) -> pd.DataFrame:
    rows = np.arange(epochs)
    return pd.DataFrame(
        {"epoch": rows, "train_loss": 1 / (rows + 1), "valid_loss": 1.1 / (rows + 1), "mAP": rows / 100, "lr": 1e-3, "tiles_per_second": 30.0, "seconds": 60.0}
    )


def test_grid_of_12_tiles_stays_small(tiles):
    images, masks, probs, ids = tiles
    figure = plots.plot_tiles(images, masks, probs, ids, np.linspace(0, 1, 12))
    assert png(figure) < 200_000
    written = texts(figure)
    assert all(name in written for name in ids) and "0.09" in written and "true salt" in written and "predicted salt" in written


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("with_probs", [False, True])
def test_tiles_of_any_number_and_kind(tiles, n, with_masks, with_probs, recwarn):
    images, masks, probs, ids = (part[:n] for part in tiles)
    figure = plots.plot_tiles(images, masks if with_masks else None, probs if with_probs else None, ids)
    png(figure)
    assert len([ax for ax in figure.axes if ax.images]) == n
    assert ("true salt" in texts(figure)) == with_masks and ("predicted salt" in texts(figure)) == with_probs
    assert not [warning for warning in recwarn if "contour" in str(warning.message).lower()]


def test_empty_and_full_masks_are_drawn_without_a_warning(tiles, recwarn):
    images = tiles[0][:3]
    masks = np.stack([np.zeros((101, 101), bool), np.ones((101, 101), bool), np.eye(101, dtype=bool)])
    png(plots.plot_tiles(images, masks, masks.astype("float16")))
    assert not list(recwarn)


def test_outline_follows_the_mask(tiles):
    "The outline of a square lies half-way between the pixels inside and outside, and closes along the tile's edge."
    mask = np.zeros((1, 101, 101), bool)
    mask[0, 20:60, 30:] = True
    figure = plots.plot_tiles(tiles[0][:1], mask)
    (outline,) = [path for artist in figure.axes[0].collections for path in artist.get_paths()]
    x, y = outline.vertices.T
    assert (y.min(), y.max(), x.min(), x.max()) == (19.5, 59.5, 29.5, 100.5)
    assert np.array_equal(outline.vertices[0], outline.vertices[-1])


@pytest.mark.parametrize("shape", [(101, 101), (202, 808), (505, 101)])
def test_section_of_any_shape(shape):
    image, mask = np.full(shape, 128, np.uint8), np.zeros(shape, bool)
    for probs in (None, np.full(shape, 0.7)):
        figure = plots.plot_section(image, mask, probs)
        png(figure)
        assert figure.axes[0].get_xlabel() == "trace" and figure.axes[0].yaxis_inverted()  # depth grows downwards


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_history(epochs):
    figure = plots.plot_history(history(epochs))
    png(figure)
    assert f"best {(epochs - 1) / 100:.3f} (epoch {epochs - 1})" in texts(figure) and f"{epochs:.1f} min" in texts(figure)


def test_history_shows_where_finished_cycles_end():
    ends = [[line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in plots.plot_history(history(7), cycle=3).axes]
    assert ends == [[2, 5]] * 3
    assert all(line.get_linestyle() != ":" for ax in plots.plot_history(history(7)).axes for line in ax.lines)


def test_phases_of_a_run_follow_one_another_on_one_axis():
    names = [(f"round1 {phase}", f"fold {k}") for phase in ("a", "b") for k in (0, 1)]
    figure = plots.plot_runs({"one": {name: history(4) for name in names}, "two": {names[0]: history(2)}})
    png(figure)
    (ax,) = figure.axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2 + [[0, 1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"] and ax.lines[0].get_color() != ax.lines[-1].get_color()


@pytest.mark.parametrize("n", [0, 1, 2, 12])
def test_predictions_show_image_outlines_and_probability(tiles, n):
    images, masks, probs, ids = (part[:n] for part in tiles)
    figure = plots.plot_predictions(images, masks, probs, ids, np.linspace(0, 1, n))
    assert png(figure) < 400_000 and all(name in texts(figure) for name in ids)
    assert len([ax for ax in figure.axes if ax.images]) == 3 * n
    assert len(figure.axes) == 3 * max(n, 1) + (n > 0)  # a bar beside them, no room left blank
    named = [text.get_text() for ax in figure.axes if ax.images for text in ax.texts]
    assert sorted(named) == sorted(["image", "outlines", "probability"] * -(-n // 6))  # a name a row of pictures, each once


def test_each_tile_is_drawn_with_its_own(tiles):
    images, ids, masks = tiles[0][:2], tiles[3][:2], np.zeros((2, 101, 101), bool)
    masks[0, 10:40, 5:50], masks[1, 20:50, 10:50] = True, True
    figure = plots.plot_predictions(images, masks, masks * 0.4, ids, np.array([0.25, 0.75]), threshold=0.3)
    assert all(np.array_equal(ax.images[0].get_array(), shown) for ax, shown in zip(figure.axes, [*images, *images, *(masks * 0.4)]))
    assert [ax.get_title()[-4:] for ax in figure.axes[:2]] == ["0.25", "0.75"]
    outlines = [[line.get_paths()[0].get_extents().bounds for line in ax.collections] for ax in figure.axes[2:4]]
    assert [len(lines) for lines in outlines] == [2, 2] and outlines[0][0] != outlines[1][0] and outlines[0][1] != outlines[1][1]
    few = plots.plot_tiles(images, masks).axes
    assert all(np.array_equal(ax.images[0].get_array(), image) and ax.images[0].get_clim() == (0, 255) for ax, image in zip(few, images))
    assert few[0].collections[0].get_paths()[0].get_extents().bounds != few[1].collections[0].get_paths()[0].get_extents().bounds
    assert len(plots.plot_section(images[0], masks[0]).axes[0].collections) == 1


def test_curves_and_bars_are_those_of_their_data():
    lines = {line.get_label(): list(line.get_ydata()) for line in plots.plot_history(history(3)).axes[0].lines}
    assert lines == {"training": list(history(3)["train_loss"]), "validation": list(history(3)["valid_loss"])}
    figure = plots.plot_scores_by_class(pd.DataFrame({"class": [0, 5], "tiles": [3, 1], "mAP": [1.0, 0.2]}))
    assert "all 4 tiles, 0.800" in texts(figure) and figure.axes[0].lines[0].get_ydata()[0] == 0.8
    curve = plots.plot_confidence(np.array([0.5, 0.9, 0.95, 1.0]), 0.9).axes[0].lines[0].get_ydata()
    assert (curve[0], curve[-1]) == (1, 0)
    legend = plots.plot_histories({("round1 compact", f"fold {k}"): history(3) for k in (1, 3)}).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["fold 1", "fold 3"]
    bins = pd.DataFrame({"probability": [0.1, np.nan, 0.9], "salt": [0.3, np.nan, 0.8], "pixels": [7, 0, 90]})
    assert np.allclose([bar.get_x() for bar in plots.plot_calibration(bins, 0.1).axes[1].patches], [0, 1 / 3, 2 / 3])
    bars = {round(bar.get_x()): bar.get_height() for bar in plots.plot_coverage(np.array([0, 0, 0.52])).axes[0].patches}
    assert bars[50] == 1 and bars[0] == 0


def test_histories_have_a_panel_a_phase_and_a_line_a_fold():
    names = [(f"round{r} {phase}", f"fold {k}") for r in (1, 2) for phase in ("compact", "v4") for k in range(3)]
    figure = plots.plot_histories({name: history(3) for name in names})
    png(figure)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["round1 compact", "round1 v4", "round2 compact", "round2 v4"]
    assert all(len(ax.lines) == 3 for ax in shown)


def test_threshold_curve_names_the_threshold_in_use_and_the_best():
    figure = plots.plot_threshold_curve(np.array([0.3, 0.4, 0.5, 0.6]), np.array([0.70, 0.75, 0.74, 0.60]))
    png(figure)
    assert "in use: 0.5, mAP 0.740" in texts(figure) and "best here: 0.4, mAP 0.750" in texts(figure)


def test_calibration_shows_every_bin_that_has_pixels():
    curve = pd.DataFrame({"probability": [0.1, np.nan, 0.9], "salt": [0.3, np.nan, 0.8], "pixels": [7, 0, 90]})
    figure = plots.plot_calibration(curve, 0.1074)
    png(figure)
    assert "Calibration error 0.107" in texts(figure)
    assert np.array_equal(figure.axes[0].lines[1].get_ydata(), curve["salt"], equal_nan=True)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [7, 0.5, 90]


def test_spread_of_networks_is_a_fourth_row(tiles):
    images, masks, probs, ids = (part[:2] for part in tiles)
    figure = plots.plot_predictions(images, masks, probs, ids, np.ones(2), spread=np.full(probs.shape, 0.2))
    png(figure)
    assert len([ax for ax in figure.axes if ax.images]) == 8 and "spread of the networks" in texts(figure)


def test_tiles_are_laid_out_by_id_in_their_places():
    places = pd.DataFrame({"id": ["a", "b", "gone"], "row": [5, 6, 6], "column": [2, 2, 3]})
    tiles = np.stack([np.full((101, 101), 7), np.full((101, 101), 9)])
    section = plots.lay_out(places, np.array(["b", "a"]), tiles, -1)
    assert section.shape == (202, 202)
    assert [section[0, 0], section[101, 0], section[101, 101], section[0, 101]] == [9, 7, -1, -1]


def test_scores_by_class_match_by_class_not_by_order(tiles):
    _, masks, probs, _ = tiles
    full = scores_by_class(probs > 0.5, masks)
    some = full[full["tiles"] > 0].reset_index()[["class", "tiles", "mAP"]]  # only classes that have tiles, in a column
    heights = [[bar.get_height() for bar in plots.plot_scores_by_class(table).axes[0].patches] for table in (full, some, some[::-1])]
    assert np.allclose(heights[0], heights[1], equal_nan=True) and np.allclose(heights[0], heights[2], equal_nan=True)
    assert heights[0][0] == full['mAP'][0]
    assert [label.get_text().split("\n")[1] for label in plots.plot_scores_by_class(some).axes[0].get_xticklabels()] == [str(n) for n in full["tiles"]]
    png(plots.plot_scores_by_class(full.assign(tiles=0, mAP=np.nan)))


@pytest.mark.parametrize(
    "confidence, title",
    [(np.array([0.5, 0.9, 0.95, 1.0]), "3 of 4 tiles"), (np.ones(3), "3 of 3 tiles"), (np.zeros(2), "0 of 2 tiles"), (np.array([]), "0 of 0 tiles")],
)
def test_confidence_counts_the_threshold_itself(confidence, title):
    figure = plots.plot_confidence(confidence, 0.9)
    png(figure)
    assert title in texts(figure)


def test_each_threshold_of_the_next_round_is_drawn_and_none_after_the_last():
    confidence = np.array([0.5, 0.9, 0.95, 1.0])
    two, none = plots.plot_confidence(confidence, 0.9, 0.97), plots.plot_confidence(confidence)
    assert "3 of 4 tiles reach a confidence of 0.9\n1 of 4 tiles reach a confidence of 0.97" in texts(two)
    assert "how sure 4 tiles are" in texts(none) and len(none.axes[0].patches) == 0


@pytest.mark.parametrize(
    "coverages, title",
    [
        (np.array([0, 0, 0.5]), "2 of 3 tiles hold no salt, the others 50 %"), (np.zeros(4), "4 of 4 tiles hold no salt"),
        (np.array([0.01, 1.0]), "0 of 2 tiles"), (np.array([]), "0 of 0 tiles"),
    ],
)
def test_coverage_counts_every_tile(coverages, title):
    figure = plots.plot_coverage(coverages)
    png(figure)
    assert title in texts(figure) and sum(bar.get_height() for bar in figure.axes[0].patches) == len(coverages)


def test_curves_are_those_of_the_map(tiles):
    _, score, rate = plots.plot_history(history(3)).axes
    one = {("round1 a", "fold 0"): history(3)}
    for ax in (score, plots.plot_histories(one).axes[0], plots.plot_runs({"x": one}).axes[0]):
        assert list(ax.lines[0].get_ydata()) == [0, 0.01, 0.02]
    assert list(rate.lines[0].get_ydata()) == [1e-3] * 3


def test_tiles_share_the_colours_of_their_bar(tiles):
    images, masks, probs, ids = (part[:2] for part in tiles)
    axes = plots.plot_predictions(images, masks, probs * 0.4, ids, np.ones(2), spread=probs * 0.1).axes
    assert [ax.images[0].get_clim() for ax in axes[4:8]] == [(0, 1)] * 2 + [(0, 0.5)] * 2
