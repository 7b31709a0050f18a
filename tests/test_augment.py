"Augmentation: ranges measured on pixels, and random numbers that only seed, epoch and draw decide."

import os
import random
import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from saltlib.augment import AUGMENTATIONS, EpochSampler, TileDataset, augment_tile, seed_transform
from saltlib.core import SaltError


@pytest.fixture(scope="module")
def tiles():
    "12 tiles of noise; the salt of tile k is a bar of 8 k rows."
    masks = np.zeros((12, 101, 101), bool)
    for k in range(12):
        masks[k, 50 - 4 * k : 50 + 4 * k, 20:90] = True
    return np.random.default_rng(0).integers(0, 256, masks.shape, dtype=np.uint8), masks


def parts(name, kind):
    "All transforms of a kind in a set, each made certain."
    todo, found = [AUGMENTATIONS[name]()], []
    while todo:
        part = todo.pop()
        if isinstance(part, A.BaseCompose):
            todo += part.transforms
        elif isinstance(part, kind):
            part.p = 1.0
            found.append(part)
    return found


def draw(transform, image, mask=None, n=300):
    "Image and mask after `transform` alone, under n seeds."
    alone = A.Compose([transform])
    return [augment_tile(seed_transform(alone, seed), image, np.zeros_like(image) if mask is None else mask) for seed in range(n)]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_stay_uint8_and_masks_binary(tiles, name):
    before, data = [part.copy() for part in tiles], TileDataset(*tiles, AUGMENTATIONS[name](), seed=3)
    for number in range(240):
        image, mask, row = data[0, number, number % 12]
        assert image.dtype == mask.dtype == np.uint8 and image.shape == mask.shape == (101, 101) and row == number % 12
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.any() == (row > 0) or name == "bes" and row < 3  # shrunk to 0.4, a bar of 8 rows may pass out of the tile
    assert all(map(np.array_equal, before, tiles))  # the stored tiles are never touched


KINDS = {"0 and 255": lambda m: m * np.uint8(255), "int64": np.int64, "0.0 and 1.0": np.float64, "mirrored": lambda m: m[:, :, ::-1].copy()[:, :, ::-1]}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_masks_of_any_kind_are_the_same_masks(tiles, kind):
    usual, others = TileDataset(*tiles, AUGMENTATIONS["none"]()), TileDataset(tiles[0], kind(tiles[1]), AUGMENTATIONS["none"]())
    plain = TileDataset(tiles[0], kind(tiles[1]))
    for row in range(12):
        assert np.array_equal(usual[0, 0, row][1], others[0, 0, row][1]) and np.array_equal(tiles[1][row], plain[row][1])
        assert torch.from_numpy(plain[row][1]).dtype == torch.uint8
    with pytest.raises(SaltError, match="compare probabilities with a threshold"):
        TileDataset(tiles[0], tiles[1] * 0.5)


@pytest.mark.parametrize("name", ["light", "wide", "bes", "phalanx"])
def test_image_and_mask_move_together(tiles, name):
    "An image painted like its mask still looks like it, whatever the geometry: they differ by half of the contrast at most."
    for transform in parts(name, (A.Affine, A.CropAndPad, A.HorizontalFlip)):
        for image, mask in draw(transform, tiles[1][6] * np.uint8(200), tiles[1][6], n=60):
            assert np.abs(image - 200.0 * mask).max() <= 102


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_up_stays_up(tiles, name):
    "A tile that is dark above and bright below stays so: depth has a direction."
    ramp = np.repeat(np.linspace(0, 200, 101).astype(np.uint8)[:, None], 101, axis=1)
    data = TileDataset(ramp[None], tiles[1][:1], AUGMENTATIONS[name](), seed=0)
    assert all(tile[:30].mean() < tile[-30:].mean() for tile, *_ in (data[0, number, 0] for number in range(100)))


@pytest.mark.parametrize("name, shares", [("bes", [0.5, 0.2, 0.1, 0.7]), ("phalanx", [0.5, 0.5, 0.5]), ("light", [0.5, 0.7, 0.5]), ("wide", [0.5, 0.8, 0.6])])
def test_shares(name, shares):
    """How many of 2,000 tiles each part of a set changes, of the published ones as often as published (method, section 5); tiles of noise,
    which any change shows in."""
    image = np.random.default_rng(0).integers(60, 180, (101, 101), dtype=np.uint8)
    parts = AUGMENTATIONS[name]().transforms
    changed = [np.mean([not np.array_equal(image, tile) for tile, _ in draw(part, image, n=2000)]) for part in parts]
    assert np.abs(np.subtract(changed, shares)).max() < 0.04, changed


def test_bes_grey_values():
    "Brightness multiplies by 0.8 to 1.2; contrast stretches by 0.8 to 1.2 about the mean."
    image = np.full((100, 100), 140, np.uint8)
    image[:, 50:] = 60
    brightness, contrast = parts("bes", A.ColorJitter)[::-1]
    pairs = np.array([tile[0, [0, 99]] for tile, _ in draw(brightness, image)], int)
    assert np.abs(pairs[:, 0] * 60 / 140 - pairs[:, 1]).max() <= 1.5
    assert 111 <= pairs[:, 0].min() <= 114 and 166 <= pairs[:, 0].max() <= 168
    pairs = np.array([tile[0, [0, 99]] for tile, _ in draw(contrast, image)], int)
    assert np.abs(pairs.sum(1) - 200).max() <= 2
    assert 131 <= pairs[:, 0].min() <= 133 and 146 <= pairs[:, 0].max() <= 148


def test_bes_geometry():
    "Scale 0.4 to 1.6, alike in both directions, shift of up to 16 pixels, no rotation."
    (affine,) = parts("bes", A.Affine)
    matrices = []
    for seed in range(400):
        seed_transform(A.Compose([affine]), seed)(image=np.zeros((101, 101), np.uint8))
        matrices.append(affine.params["matrix"])
    matrices = np.array(matrices)
    scale, shift = matrices[:, 0, 0], matrices[:, :2] @ [50, 50, 1] - 50
    assert np.allclose(scale, matrices[:, 1, 1]) and np.allclose(matrices[:, [0, 1], [1, 0]], 0)
    assert 0.4 <= scale.min() < 0.42 and 1.58 < scale.max() <= 1.6
    assert np.allclose([shift.min(), shift.max()], [-16, 16])


@pytest.mark.parametrize("name, low, high, shift", [("light", 0.9, 1.1, 6), ("wide", 0.8, 1.25, 10)])
def test_sets_for_small_networks(name, low, high, shift):
    "How far tiles are scaled, moved, turned and sheared, and their grey values multiplied and stretched."
    (affine,), image = parts(name, A.Affine), np.full((101, 101), 100, np.uint8)
    matrices = []
    for seed in range(400):
        seed_transform(A.Compose([affine]), seed)(image=image)
        matrices.append(affine.params["matrix"])
    scale, moved = np.sqrt(np.linalg.det(np.array(matrices)[:, :2, :2])), np.array(matrices)[:, :2] @ [50, 50, 1] - 50
    assert low <= scale.min() < low + 0.02 and high - 0.02 < scale.max() <= high
    assert np.allclose([moved.min(), moved.max()], [-shift, shift])
    greys = [int(tile[50, 50]) for tile, _ in draw(parts(name, A.ColorJitter)[0], image)]
    assert np.abs(np.subtract([min(greys), max(greys)], {"light": [90, 110], "wide": [88, 112]}[name])).max() <= 1
    a, b, c, d = (np.array(matrices)[:, :2, :2] / scale[:, None, None]).reshape(-1, 4).T
    for degrees in (np.degrees(np.arctan2(c, a)), np.degrees(np.arctan(a * b + c * d))):  # turned; sheared along the rows
        assert np.abs(np.subtract([degrees.min(), degrees.max()], np.multiply([-1, 1], {"light": 5, "wide": 8}[name]))).max() < 0.3
    image[:, :50], image[:, 50:] = 60, 140
    pairs = np.array([tile[0, [0, -1]] for tile, _ in draw(parts(name, A.ColorJitter)[0], image)], int)
    contrast, most = (pairs[:, 1] - pairs[:, 0]) / pairs.mean(axis=1) / 0.8, {"light": 0.1, "wide": 0.15}[name]
    assert np.abs(np.subtract([contrast.min(), contrast.max()], [1 - most, 1 + most])).max() < 0.03


@pytest.mark.parametrize("name, kind", [("bes", "scale"), ("phalanx", "rotate")])
def test_what_comes_in_over_the_border_is_a_mirror_image(name, kind):
    "Border reflect-101, as published."
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (101, 101), dtype=np.uint8), (0, 0), 2)
    affine = next(part for part in parts(name, A.Affine) if kind == "scale" or part.rotate != (0, 0))
    for seed in range(20):
        tile = seed_transform(A.Compose([affine]), seed)(image=image)["image"]
        expected = cv2.warpAffine(image, affine.params["matrix"][:2], (101, 101), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        assert np.abs(tile.astype(int) - expected).max() <= 1


def test_phalanx_shear_moves_top_and_bottom_apart():
    line = np.zeros((101, 101), np.uint8)
    line[:, 50] = 255
    shear = next(part for part in parts("phalanx", A.Affine) if part.shear["x"] != (0, 0))
    shifts = np.array([[row @ np.arange(101) / row.sum() - 50 for row in tile[[0, 50, 100]].astype(float)] for tile, _ in draw(shear, line)])
    assert np.allclose(shifts[:, 0], -shifts[:, 2], atol=0.1) and np.allclose(shifts[:, 1], 0, atol=0.05)
    assert 6.9 < shifts[:, 0].max() < 7.12 and -7.12 < shifts[:, 0].min() < -6.9


def test_phalanx_rotation_and_crop():
    "Rotation 0 to 15 degrees to one side; each side cropped by 0 to 20 of 101 pixels."
    rotation = next(part for part in parts("phalanx", A.Affine) if part.rotate != (0, 0))
    (crop,) = parts("phalanx", A.CropAndPad)
    angles, sides = [], []
    for seed in range(300):
        for transform in (rotation, crop):
            seed_transform(A.Compose([transform]), seed)(image=np.zeros((101, 101), np.uint8))
        angles.append(rotation.params["rotate"])
        sides.append(crop.params["crop_params"])
    left, top, right, bottom = np.array(sides).T
    assert 0 <= min(angles) < 0.3 and 14.7 < max(angles) <= 15
    assert (left != 101 - right).mean() > 0.8 and (top != left).mean() > 0.8  # each by itself: alike in one draw of 21 by chance
    assert {left.min(), top.min(), 101 - right.max(), 101 - bottom.max()} == {0} and max(left.max(), top.max(), 101 - right.min(), 101 - bottom.min()) == 20


def test_phalanx_takes_each_of_a_group_as_often():
    assert [np.round(group.transforms_ps, 6).tolist() for group in AUGMENTATIONS["phalanx"]().transforms[1:]] == [[0.333333] * 3, [0.5, 0.5]]


def test_phalanx_grey_values_are_clipped():
    "Brightness moves by 0.1 of the range or by a factor 0.92 to 1.08, and stops at black and white."
    (shift,), (factor,) = parts("phalanx", A.RandomBrightnessContrast), parts("phalanx", A.ColorJitter)
    for transform, grey, low, high in [(shift, 100, 74, 126), (factor, 100, 92, 108), (shift, 250, 224, 255), (factor, 250, 230, 255), (shift, 5, 0, 31)]:
        values = [int(tile[0, 0]) for tile, _ in draw(transform, np.full((101, 101), grey, np.uint8))]
        assert low <= min(values) <= low + 2 and high - 2 <= max(values) <= high


def test_parts_of_a_set_draw_differently(tiles):
    "Whether a tile is flipped says nothing about whether its grey values change."
    image, mask = tiles[0][0], tiles[1][0]
    transform = A.Compose([A.HorizontalFlip(p=0.5), A.Transpose(p=0.5)])
    four = [image, image[:, ::-1], image.T, image[:, ::-1].T]
    kinds = [
        next(k for k, view in enumerate(four) if np.array_equal(augment_tile(seed_transform(transform, seed), image, mask)[0], view))
        for seed in range(400)
    ]
    assert all(70 < kinds.count(k) < 130 for k in range(4))


def batches(tiles, workers, epochs, seed=7, name="light"):
    sampler = EpochSampler(12, 5, seed)
    loader = DataLoader(TileDataset(*tiles, AUGMENTATIONS[name](), seed), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    found = {}
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found[epoch] = [torch.cat([part.flatten() for part in batch]) for batch in loader]
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def test_batches_depend_on_seed_and_epoch_alone(tiles):
    plain = batches(tiles, 0, [0, 1])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    workers = batches(tiles, 2, [0, 1])
    resumed = batches(tiles, 2, [1])
    assert same(plain[0], workers[0]) and same(plain[1], workers[1]) and same(plain[1], resumed[1])
    assert not same(workers[0], workers[1]) and not same(plain[0], batches(tiles, 0, [0], seed=8)[0])


def test_trainings_of_other_seeds_augment_otherwise(tiles):
    views = {TileDataset(*tiles, AUGMENTATIONS["wide"](), seed)[0, 0, 0][0].tobytes() for seed in range(9)}
    assert len(views) > 4


def test_a_tile_is_augmented_anew_in_each_epoch(tiles):
    "Also with workers, where albumentations alone repeats itself, and when it is drawn twice in an epoch."
    data = TileDataset(*tiles, AUGMENTATIONS["bes"](), seed=0)
    seen = {data[epoch, number, 4][0].tobytes() for epoch in range(5) for number in range(10)}
    assert len(seen) > 30  # 0.5 * 0.8 * 0.9 * 0.3 of the draws leave a tile as it is


def test_collation(tiles):
    images, masks, rows = next(iter(DataLoader(TileDataset(*tiles), batch_size=5)))
    assert images.shape == masks.shape == (5, 101, 101) and images.dtype == masks.dtype == torch.uint8
    assert rows.tolist() == [0, 1, 2, 3, 4] and np.array_equal(images.numpy(), tiles[0][:5]) and np.array_equal(masks.numpy(), tiles[1][:5])


@pytest.mark.parametrize("n, size, lengths", [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (8, 4, [4, 4]), (3, 4, [3]), (3, 1, [1, 1, 1])])
def test_batch_sizes(n, size, lengths):
    sampler = EpochSampler(n, size, seed=0)
    assert [len(batch) for batch in sampler] == lengths and len(sampler) == len(lengths)


def test_order_of_the_rows():
    sampler = EpochSampler(40, 8, seed=0)
    rows = [row for batch in sampler for *_, row in batch]
    assert sorted(rows) == list(range(40)) and rows != list(range(40))
    assert rows != [row for batch in EpochSampler(40, 8, seed=1) for *_, row in batch]
    drawn = [row for batch in EpochSampler(40, 8, seed=0, draws=2) for *_, row in batch]
    assert len(drawn) == 80 and max(drawn.count(row) for row in range(40)) > 3
    sampler.set_epoch(1)
    assert [row for batch in sampler for *_, row in batch] != rows


def test_too_few_tiles_are_refused():
    for n in (0, 1):
        with pytest.raises(SaltError, match="give no batch of 18"):
            EpochSampler(n, 18, seed=0)


def test_import_asks_the_network_for_nothing():
    "albumentations looks for a newer version when it is imported, unless told not to."
    code = "import urllib.request as u; u.build_opener = lambda *handlers: print('asked'); import saltlib.augment"
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout == ""
