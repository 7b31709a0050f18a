import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from saltlib.core import SaltError
from saltlib.data import (
    LARGEST_FILE, PredictionStore, check_data, deal_groups, decode_png, encode_masks, is_black, load_images, load_tiles, make_folds, read_by_id,
    read_folds, read_rle_csv, refuse_bad_data, rle_decode, rle_encode, unique_pixels, write_folds, write_rle_csv,
)

TRAIN, TEST = ["aa", "b-1", "c_2", "D3"], ["t0", "t1", "t2"]


def png(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def image_of(id):
    return np.random.default_rng(len(id) * ord(id[-1])).integers(0, 256, (101, 101), dtype=np.uint8)


def mask_of(id):
    return (np.add.outer(np.arange(101), np.arange(101)) > 20 * (TRAIN.index(id) + 5))


@pytest.fixture
def root(tmp_path):
    "A sound data folder of seven tiles, unpacked; tests damage it."
    return write_root(tmp_path / "data")


def write_root(root):
    for folder in ("train/images", "train/masks", "test/images"):
        (root / folder).mkdir(parents=True)
    for k, id in enumerate(TRAIN):
        (root / f"train/images/{id}.png").write_bytes(png(np.stack([image_of(id)] * 3, -1) if k % 2 else image_of(id)))
        (root / f"train/masks/{id}.png").write_bytes(png(mask_of(id) * (np.uint16(65535) if k % 2 else np.uint8(255))))
    for id in TEST:
        (root / f"test/images/{id}.png").write_bytes(png(image_of(id)))
    (root / "depths.csv").write_text("id,z\n" + "".join(f"{id},{100 + k}\n" for k, id in enumerate(TEST + TRAIN)))
    write_rle_csv(root / "train.csv", TRAIN, encode_masks(np.stack([mask_of(id) for id in TRAIN])))
    (root / "sample_submission.csv").write_text("id,rle_mask\n" + "".join(f"{id},1 1\n" for id in TEST))
    return root


def zip_split(root, split, method=zipfile.ZIP_STORED, extra=()):
    "Put a split into a zip; `extra` are members (name, content) behind its own."
    with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
        for file in sorted((root / split).rglob("*.png")):
            archive.write(file, file.relative_to(root / split))
        for name, content in extra:
            archive.writestr(name, content)
    shutil.rmtree(root / split)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# Loading

@pytest.mark.parametrize("packed", [(), ("train",), ("test",), ("train", "test")])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folder_and_zip_give_the_same(root, packed, method):
    for split in packed:
        zip_split(root, split, method)
    assert check_data(root) == []
    refuse_bad_data(root)
    train, test = load_tiles(root, "train"), load_tiles(root, "test")
    assert train.ids.tolist() == sorted(TRAIN) and test.ids.tolist() == sorted(TEST)
    for tiles in (train, test):
        assert (tiles.images == np.stack([image_of(id) for id in tiles.ids])).all() and tiles.images.dtype == np.uint8
        assert tiles.depths.tolist() == [100 + (TEST + TRAIN).index(id) for id in tiles.ids]
    assert (train.masks == np.stack([mask_of(id) for id in train.ids])).all() and train.masks.dtype == bool
    assert test.masks is None


@pytest.mark.parametrize("pixels", [
    np.full((101, 101), 255, np.uint8), np.full((101, 101), 65535, np.uint16), np.ones((101, 101), np.uint8),
    np.zeros((101, 101), np.uint8), np.full((101, 101, 3), 255, np.uint8),
])
def test_masks_in_8_and_16_bits(pixels):
    pixels[:50] = 0
    assert (decode_png(png(pixels), "m.png", mask=True) == (pixels if pixels.ndim == 2 else pixels[..., 0]).astype(bool)).all()


def test_one_bit_mask():
    bits = np.packbits(mask_of("aa"), axis=1)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 101, 101, 1, 0, 0, 0, 0)) \
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in bits))) + chunk(b"IEND", b"")
    assert (decode_png(data, "m.png", mask=True) == mask_of("aa")).all()


def test_tiles_by_row_and_by_id(root):
    tiles = load_tiles(root, "train")
    assert tiles[1:3].ids.tolist() == tiles.ids[1:3].tolist() and len(tiles[1:3]) == 2
    some = tiles[tiles.rows(["c_2", "D3"])]
    assert some.ids.tolist() == ["c_2", "D3"] and (some.masks[1] == mask_of("D3")).all()
    assert tiles[tiles.ids == "aa"].depths.tolist() == [103]
    with pytest.raises(SaltError, match="'nobody'"):
        tiles.rows(["aa", "nobody"])


def test_load_images(root):
    ids, images = load_images(root / "test/images")
    assert ids.tolist() == TEST and (images[1] == image_of("t1")).all()
    (root / "test/images/t1.png").write_bytes(b"")
    with pytest.raises(SaltError, match="t1.png is not a PNG"):
        load_images(root / "test/images")
    with pytest.raises(SaltError, match="is missing"):
        load_images(root / "nowhere")


# Damage: what check_data must say

def damage_png(name, change):
    def damage(root):
        (root / name).write_bytes(change((root / name).read_bytes()))
    return damage


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claim_size(width, height):
    "A PNG whose header is sound and claims that size."
    return lambda data: data[:8] + chunk(b"IHDR", struct.pack(">2I", width, height) + data[24:29]) + data[33:]


def replace(name, old, new):
    return lambda root: edit(root / name, old, new)


def write(name, content):
    return lambda root: (root / name).write_bytes(content)


def unlink(name):
    return lambda root: (root / name).unlink()


DAMAGE = {
    "truncated": (damage_png("train/images/aa.png", lambda d: d[:-30]), ["train/images/aa.png is truncated"]),
    "a wrong checksum": (
        damage_png("train/images/aa.png", lambda d: d[:29] + bytes([d[29] ^ 1]) + d[30:]), ["train/images/aa.png is damaged (a checksum is wrong)"],
    ),
    "truncated in the header": (damage_png("train/images/aa.png", lambda d: d[:20]), ["train/images/aa.png is truncated"]),
    "empty file": (write("train/masks/aa.png", b""), ["train/masks/aa.png is not a PNG"]),
    "a JPEG": (write("test/images/t0.png", cv2.imencode(".jpg", image_of("t0"))[1].tobytes()), ["test/images/t0.png is not a PNG"]),
    "a flipped bit": (damage_png("test/images/t1.png", lambda d: d[:300] + bytes([d[300] ^ 4]) + d[301:]), ["test/images/t1.png is damaged"]),
    "another size": (write("test/images/t1.png", png(np.zeros((101, 100), np.uint8))), ["test/images/t1.png is 100 x 101 pixels"]),
    "a PNG bomb": (damage_png("test/images/t1.png", claim_size(2**31 - 1, 2**31 - 1)), ["test/images/t1.png is 2147483647 x 2147483647 pixels"]),
    "unequal channels": (
        write("train/images/aa.png", png(np.dstack([image_of("aa"), image_of("aa"), image_of("D3")]))), ["aa.png has 3 channels that are not"],
    ),
    "alpha": (write("train/images/aa.png", png(np.dstack([image_of("aa")] * 4))), ["aa.png has 4 channels that are not"]),
    "16-bit image": (write("train/images/aa.png", png(image_of("aa").astype(np.uint16))), ["aa.png is a 16-bit image"]),
    "a grey mask": (write("train/masks/aa.png", png(image_of("aa"))), ["train/masks/aa.png is a mask with values other than 0"]),
    "too large": (write("test/images/t1.png", bytes(LARGEST_FILE + 1)), ["test/images/t1.png is larger than"]),
    "image without a mask": (unlink("train/masks/aa.png"), ["train/images has aa, train/masks lacks it"]),
    "mask without an image": (
        unlink("train/images/aa.png"), ["train/masks has aa, train/images lacks it", "train.csv has aa, train/images lacks it", "depths.csv has aa"],
    ),
    "test tile missing": (unlink("test/images/t2.png"), ["sample_submission.csv has t2, test/images lacks it", "depths.csv has t2, the set of tiles lacks it"]),
    "test tile too many": (
        write("test/images/new.png", png(image_of("t0"))),
        ["test/images has new, sample_submission.csv lacks it", "the set of tiles has new, depths.csv lacks it"],
    ),
    "not in train.csv": (replace("train.csv", "D3", "D4"), ["train/images has D3, train.csv lacks it", "train.csv has D4, train/images lacks it"]),
    "both train and test": (write("test/images/aa.png", png(image_of("aa"))), ["aa is both a train and a test tile", "test/images has aa"]),
    "other mask than its code": (
        write("train/masks/b-1.png", png(mask_of("aa") * np.uint8(255))), ["train/masks/b-1.png and its run-length code in train.csv differ in"],
    ),
    "a mask shifted by a row": (
        write("train/masks/b-1.png", png(np.roll(mask_of("b-1"), 1, axis=0) * np.uint8(255))),
        ["train/masks/b-1.png and its run-length code in train.csv differ in"],
    ),
    "code without its mask's salt": (lambda root: write_rle_csv(root / "train.csv", TRAIN, [""] * 4), [f"train/masks/{id}.png and its" for id in TRAIN]),
    "malformed code": (replace("train.csv", "aa,", "aa,x "), ["train.csv, tile aa: The run-length code", "not made of pairs"]),
    "overlapping code": (replace("train.csv", "aa,", "aa,1 99 2 1 "), ["train.csv, tile aa: The run-length code", "overlap"]),
    "code out of range": (replace("train.csv", "aa,", "aa,0 1 "), ["train.csv, tile aa: The run-length code", "outside pixels 1 to 10201"]),
    "duplicate in depths": (replace("depths.csv", "id,z\n", "id,z\naa,5\n"), ["depths.csv row 6 has aa a second time"]),
    "duplicate in train.csv": (replace("train.csv", "\n", "\naa,\n"), ["train.csv row 3 has aa a second time", "aa.png and its run-length code"]),
    "duplicate in the sample": (replace("sample_submission.csv", "t0", "t1"), ["sample_submission.csv row 3 has t1 a second time", "test/images has t0"]),
    "depth missing": (replace("depths.csv", "t0,100\n", ""), ["the set of tiles has t0, depths.csv lacks it"]),
    "depth no number": (replace("depths.csv", "t0,100", "t0,"), ["depths.csv has '' as the depth of t0"]),
    "depth a fraction": (replace("depths.csv", "t0,100", "t0,nan"), ["depths.csv has 'nan' as the depth of t0"]),
    "no depths.csv": (unlink("depths.csv"), ["depths.csv is missing"]),
    "no train.csv": (unlink("train.csv"), ["train.csv is missing"]),
    "no sample": (unlink("sample_submission.csv"), ["sample_submission.csv is missing"]),
    **{
        f"only the header of {name}": (
            lambda root, name=name: write(name, (root / name).read_bytes().split(b"\n")[0])(root), [f"{name} has no row below its header"],
        )
        for name in ("depths.csv", "train.csv", "sample_submission.csv")
    },
    "column missing": (
        replace("train.csv", "rle_mask", "rle"),
        ["train.csv must have one column rle_mask, named in its first line and separated by commas; that line is 'id,rle'"],
    ),
    "column twice": (replace("depths.csv", "id,z", "id,z,z"), ["depths.csv must have one column z"]),
    "semicolons": (replace("train.csv", ",", ";"), ["that line is 'id;rle_mask'"]),
    "both columns missing": (write("depths.csv", b""), ["depths.csv must have one column id and one column z"]),
    "table of bytes": (write("depths.csv", bytes(range(256))), ["depths.csv can't be read"]),
    "quote left open": (replace("depths.csv", "t0", '"t0'), ["depths.csv can't be read"]),
    "too many cells": (replace("depths.csv", "t0,100", "t0,100,7"), ["depths.csv row 2 has 3 cells", "the set of tiles has t0"]),
    "id that is a path": (replace("depths.csv", "t0", "../t0"), ["depths.csv row 2: '../t0' is no id", "the set of tiles has t0"]),
    "id that tables take for a missing value": (replace("depths.csv", "t0", "NA"), ["depths.csv row 2: 'NA' is no id", "the set of tiles has t0"]),
    "file named as a missing value": (write("test/images/null.png", b""), ["test/images: 'null.png' is not named as a tile"]),
    "link to itself": (lambda root: (root / "test/images/x.png").symlink_to("x.png"), ["test/images/x.png is a link to nothing"]),
    "link to nothing": (lambda root: (root / "test/images/x.png").symlink_to("gone.png"), ["test/images/x.png is a link to nothing"]),
    "file not named as a tile": (write("test/images/t 9.png", b""), ["test/images: 't 9.png' is not named as a tile"]),
    "foreign file": (write("test/images/notes.txt", b""), ["test/images: 'notes.txt' is not named as a tile"]),
    "folder among tiles": (lambda root: (root / "test/images/x.png").mkdir(), ["test/images: 'x.png/' is not named as a tile"]),
    "FIFO among tiles": (lambda root: os.mkfifo(root / "test/images/x.png"), ["test/images: 'x.png/' is not named as a tile"]),
    "FIFO for a table": (
        lambda root: ((root / "sample_submission.csv").unlink(), os.mkfifo(root / "sample_submission.csv")), ["sample_submission.csv is no file"],
    ),
    "no masks at all": (lambda root: shutil.rmtree(root / "train/masks"), ["train/masks is missing"]),
    "no test at all": (lambda root: shutil.rmtree(root / "test"), ["test.zip is missing, and so is test/"]),
    "empty folder": (lambda root: [p.unlink() for p in (root / "test/images").iterdir()], ["test/images has no ID.png"]),
    "zip beside the folder": (write("test.zip", b""), ["test.zip and test/ are both there"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(root, kind):
    damage, expected = DAMAGE[kind]
    damage(root)
    problems = check_data(root)
    for words in expected:
        assert sum(words in problem for problem in problems) == 1, problems
    assert all(any(words in problem for words in expected) for problem in problems), "a problem that isn't there"
    with pytest.raises(SaltError, match=f"{len(problems)} problem"):
        refuse_bad_data(root)


def test_what_is_hidden_is_passed_over(root):
    (root / "test/images/.#t0.png").symlink_to("somebody@host.123")  # as Emacs locks a file
    (root / "test/images/.DS_Store").write_bytes(b"")
    assert check_data(root) == []


def test_a_place_that_cannot_be_looked_at(root):
    "Path.exists raises there, before Python 3.12 at least."
    place = root / ("x" * 300)
    assert check_data(place) == [f"{place} is missing."]
    for split in ("train", "test"):
        with pytest.raises(SaltError, match=f"{split}.zip is missing"):
            load_tiles(place, split)


@pytest.mark.parametrize("kind, split, words", [
    ("truncated", "train", "train/images/aa.png is truncated"), ("a flipped bit", "test", "test/images/t1.png is damaged"),
    ("image without a mask", "train", "train/masks/aa.png is missing"), ("a PNG bomb", "test", "test/images/t1.png is 2147483647"),
    ("depth missing", "test", "no depth for t0"), ("depth no number", "test", "no depth for t0"), ("no depths.csv", "test", "depths.csv is missing"),
    ("no test at all", "test", "test.zip is missing"), ("zip beside the folder", "test", "both there"), ("empty folder", "test", "no ID.png"),
    ("unequal channels", "train", "aa.png has 3 channels"), ("foreign file", "test", "notes.txt"),
])
def test_load_tiles_refuses(root, kind, split, words):
    DAMAGE[kind][0](root)
    with pytest.raises(SaltError, match=re.escape(words)):
        load_tiles(root, split)


def test_all_damage_is_listed_at_once(root):
    together = ["truncated", "a flipped bit", "malformed code", "depth no number", "foreign file"]
    for kind in together:
        DAMAGE[kind][0](root)
    problems = check_data(root)
    for kind in together:
        assert any(DAMAGE[kind][1][0] in problem for problem in problems)


def test_message_stays_short(root):
    for k in range(500):
        (root / f"test/images/{k}{'x' * 150}.txt").write_bytes(b"")
    with pytest.raises(SaltError, match="500 problems") as error:
        refuse_bad_data(root)
    assert len(str(error.value)) < 5000 and "and 480 more" in str(error.value)


# Zips

@pytest.mark.parametrize("name, words", [
    ("../evil.png", "would land outside"), ("images/../../evil.png", "would land outside"), ("/etc/evil.png", "would land outside"),
    ("C:\\evil.png", "would land outside"), ("..\\evil.png", "would land outside"), ("images/sub/e.png", "not named as a tile"),
    ("images/t0.png", "test.zip/images/t0.png is there twice"), ("images/e\x00.png", "not named as a tile"), ("images/e.gif", "not named as a tile"),
])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_member_names(root, name, words):
    zip_split(root, "test")
    with zipfile.ZipFile(root / "test.zip", "a") as archive:
        info = zipfile.ZipInfo("x" * len(name))
        info.filename = info.orig_filename = name  # the constructor would mend it
        archive.writestr(info, png(image_of("t0")))
    problems = check_data(root)
    assert len(problems) == 1 and words in problems[0]
    with pytest.raises(SaltError, match="test.zip"):
        load_tiles(root, "test")


def test_hidden_members_and_other_folders_are_passed_over(root):
    zip_split(
        root, "test",
        extra=[("images/.DS_Store", b"x"), ("images/._t0.png", b"x"), ("__MACOSX/images/._t0.png", b"x"), ("images/", b""), ("readme.txt", b"x")],
    )
    assert check_data(root) == []


def test_zip_bomb_is_not_unpacked(root):
    zip_split(root, "test", zipfile.ZIP_DEFLATED, [("images/bomb.png", bytes(300_000_000))])
    data = bytearray((root / "test.zip").read_bytes())
    small = struct.pack("<I", 5000)  # the directory claims a small file
    while (at := data.find(struct.pack("<I", 300_000_000))) >= 0:
        data[at : at + 4] = small
    (root / "test.zip").write_bytes(data)
    tracemalloc.start()
    problems = check_data(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any("test.zip/images/bomb.png can't be read" in p for p in problems) and peak < 20e6
    with pytest.raises(SaltError, match="bomb.png"):
        load_tiles(root, "test")


def test_member_sizes_are_limited(root):
    zip_split(root, "test", zipfile.ZIP_DEFLATED, [("images/bomb.png", bytes(300_000_000))])
    tracemalloc.start()
    assert any("test.zip/images/bomb.png is larger than" in p for p in check_data(root))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_packing_is_refused(root, method):
    zip_split(root, "test", method)
    assert sum("packed by a method other than" in p for p in check_data(root)) == len(TEST)


def test_damaged_zip(root):
    zip_split(root, "train")
    whole = (root / "train.zip").read_bytes()
    (root / "train.zip").write_bytes(whole[: len(whole) // 2])
    assert any("train.zip can't be read" in p for p in check_data(root))
    with pytest.raises(SaltError, match="train.zip can't be read"):
        load_tiles(root, "train")


def test_folder_at_the_top_of_a_zip(root):
    with zipfile.ZipFile(root / "test.zip", "w") as archive:
        for file in sorted((root / "test").rglob("*.png")):
            archive.write(file, file.relative_to(root))
    shutil.rmtree(root / "test")
    assert check_data(root)[0] == "test.zip has no images/ID.png at its top."


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.integers(0, 255), tail=st.booleans())
def test_any_byte_of_a_zip_may_be_wrong(tmp_path, place, value, tail):
    root = tmp_path / "data"
    if not (root / "sound.zip").exists():
        zip_split(write_root(root), "test", zipfile.ZIP_DEFLATED)
        (root / "test.zip").rename(root / "sound.zip")
    data = bytearray((root / "sound.zip").read_bytes())
    at = len(data) - 1 - int(place * 300) if tail else int(place * (len(data) - 1))
    data[at] = value
    (root / "test.zip").write_bytes(data)
    assert isinstance(check_data(root), list)
    try:
        found = load_tiles(root, "test")
    except SaltError:
        return
    assert all((image == image_of(id)).all() for id, image in zip(found.ids, found.images))  # refused, or right


@given(st.binary(max_size=300))
def test_any_bytes_may_be_called_png(data):
    for content in (data, b"\x89PNG\r\n\x1a\n" + data):
        with pytest.raises(SaltError, match="x.png"):
            decode_png(content, "x.png")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: b"id,z\n" + text.encode("utf8", "replace"))))
def test_any_bytes_may_be_called_table(tmp_path, data):
    (tmp_path / "any.csv").write_bytes(data)
    values, problems = read_by_id(tmp_path / "any.csv", "z")
    assert all(re.fullmatch("[A-Za-z0-9_-]+", id) for id in values) and all(isinstance(p, str) for p in problems)


def test_a_byte_order_mark_is_no_part_of_the_header(root):
    (root / "depths.csv").write_bytes(b"\xef\xbb\xbf" + (root / "depths.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert check_data(root) == []


# Run-length codes

def encode_slowly(mask):
    "By the definition, pixel by pixel."
    runs, before = [], False
    for position, salt in enumerate((bool(mask[row, column]) for column in range(mask.shape[1]) for row in range(mask.shape[0])), 1):
        if salt and not before:
            runs.append([position, 0])
        if salt:
            runs[-1][1] += 1
        before = salt
    return " ".join(f"{start} {length}" for start, length in runs)


MASKS = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: arrays(bool, shape))


@given(MASKS)
def test_codes_by_definition_and_back(masks):
    codes = encode_masks(masks)
    assert codes == [encode_slowly(mask) for mask in masks] == [rle_encode(mask) for mask in masks]
    for mask, code in zip(masks, codes):
        assert (rle_decode(code, mask.shape) == mask).all()


def test_many_masks_cross_the_blocks():
    masks = np.random.default_rng(0).random((700, 8, 5)) < 0.4
    masks[::7] = False
    masks[::11] = True
    assert encode_masks(masks) == [encode_slowly(mask) for mask in masks]
    assert encode_masks(masks.astype(np.uint8) * 255) == encode_masks(masks)
    assert encode_masks(np.asfortranarray(masks)) == encode_masks(masks)


@given(st.lists(st.integers(-2, 30), max_size=8))
def test_decoding_takes_exactly_the_sorted_disjoint_runs(numbers):
    runs = list(zip(numbers[::2], numbers[1::2]))
    sound = len(numbers) % 2 == 0 and all(start >= 1 and length >= 1 and start + length - 1 <= 20 for start, length in runs) \
        and all(a + length <= b for (a, length), (b, _) in zip(runs, runs[1:]))
    code = " ".join(map(str, numbers))
    if sound:
        covered = {pixel for start, length in runs for pixel in range(start, start + length)}
        assert rle_decode(code, (4, 5)).ravel(order="F").tolist() == [pixel in covered for pixel in range(1, 21)]
    else:
        with pytest.raises(SaltError, match="run-length code"):
            rle_decode(code, (4, 5))


@given(st.text(max_size=30))
def test_any_text_may_be_called_code(code):
    try:
        assert rle_decode(code).shape == (101, 101)
    except SaltError as error:
        assert len(str(error)) < 300


@pytest.mark.parametrize("code", ["1" * 5000 + " 1", "1 " * 100_001, "١ 1", "1,1", "1e3 1", "+1 1", None, True, 3.0])
def test_malformed_codes(code):
    with pytest.raises(SaltError, match="pairs of whole numbers"):
        rle_decode(code)


def test_submission_by_id(tmp_path):
    masks = np.random.default_rng(0).random((3, 101, 101)) < 0.5
    path = write_rle_csv(tmp_path / "s.csv", ["x", "y", "z"], encode_masks(masks))
    assert path.read_text().startswith("id,rle_mask\nx,")
    assert (read_rle_csv(path, ["z", "x"]) == masks[[2, 0]]).all()
    with pytest.raises(SaltError, match="'w'"):
        read_rle_csv(path, ["w"])
    edit(path, "y,", "y,7 ")
    with pytest.raises(SaltError, match="tile y"):
        read_rle_csv(path, ["x", "y"])
    with pytest.raises(ValueError):
        write_rle_csv(tmp_path / "s.csv", ["x"], encode_masks(masks))


# Grey values

@given(arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 3)))
def test_grey_values(images):
    assert unique_pixels(images).tolist() == [len(np.unique(image)) for image in images]
    assert is_black(images).tolist() == [len(np.unique(image)) == 1 for image in images]


# Folds

@given(st.lists(st.integers(0, 5), min_size=5, max_size=60), st.integers(2, 5), st.randoms(use_true_random=False))
def test_folds_by_depth(depths, n, random):
    ids, depths = np.array([f"i{k}" for k in range(len(depths))]), np.array(depths)
    folds = make_folds(ids, depths, n)
    by_hand = {id: k % n for k, (_, id) in enumerate(sorted(zip(depths, ids)))}
    assert folds.tolist() == [by_hand[id] for id in ids]
    shuffle = random.sample(range(len(ids)), len(ids))
    assert (make_folds(ids[shuffle], depths[shuffle], n) == folds[shuffle]).all()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 8), st.one_of(st.just(float("nan")), st.floats(0, 1))), min_size=5, max_size=80),
       st.integers(2, 5), st.randoms(use_true_random=False))
def test_folds_by_group(tiles, n, random):
    ids = np.array([f"i{k}" for k in range(len(tiles))])
    depths, groups, coverage = (np.array(column) for column in zip(*tiles))
    folds = make_folds(ids, depths, n, groups, coverage)
    assert all(len(set(folds[groups == group])) == 1 for group in set(groups[groups >= 0]))
    assert set(folds) <= set(range(n))
    shuffle, other_names = random.sample(range(len(ids)), len(ids)), np.array([5, 3, 8, 0, 2, 7, 1, 6, 4, -1])
    assert (make_folds(ids[shuffle], depths[shuffle], n, other_names[groups[shuffle]], coverage[shuffle]) == folds[shuffle]).all()
    sizes = np.bincount(make_folds(ids, depths, n, groups), minlength=n)
    assert np.ptp(sizes) <= max(1, np.unique(groups[groups >= 0], return_counts=True)[1].max(initial=1))


def test_coverage_is_balanced():
    rng = np.random.default_rng(0)
    coverage = np.where(rng.random(3000) < 0.4, 0, rng.random(3000))
    coverage[rng.permutation(3000)[:2000]] = np.nan
    for groups in (None, np.where(np.arange(3000) < 1000, np.arange(3000) // 20, -1)):
        folds = make_folds([f"i{k}" for k in range(3000)], rng.integers(0, 900, 3000), 5, groups, coverage)
        known = ~np.isnan(coverage)
        assert np.ptp(np.bincount(folds)) <= 10 and np.ptp(np.bincount(folds[known])) <= 10
        assert np.ptp(np.bincount(folds[coverage == 0])) <= 4
        assert np.ptp([coverage[known & (folds == k)].mean() for k in range(5)]) < 0.03


def test_groups_are_dealt_by_shares_of_each_class():
    "By hand: a rare class counts as much as a common one, and the largest group comes first."
    groups, strata = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 0, 0, 1, 1, 0, 0, 1, 0])
    # Shares of the six tiles of class 0, the three of class 1, and of all nine: group 0 (1/2, 0, 1/3), 1 (0, 2/3, 2/9), 2 (1/3, 0, 2/9), 3 (1/6, 1/3, 2/9).
    # 0 goes to fold 0; 1 to the empty fold 1; 2 would meet 1/6 + 2/27 in fold 0 and 4/81 in fold 1; 3 then 1/12 + 2/27 in fold 0 and
    # 1/18 + 2/9 + 8/81 in fold 1.
    assert deal_groups(groups, strata, 2).tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    # Two tiles of each class are dealt; of the two that are left, each goes where its class is not.
    assert deal_groups(np.array([0, 0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 1, 0]), 2).tolist() == [0, 0, 1, 1, 0, 1]


def test_fold_files(tmp_path):
    path = write_folds(tmp_path / "folds.csv", ["b", "a", "c"], [1, 0, 2], [7, 1, 200])
    assert path.read_text() == "id,fold,unique_pixels\nb,1,7\na,0,1\nc,2,200\n"
    assert read_folds(path, ["a", "b", "c"]).tolist() == [0, 1, 2]
    own = tmp_path / "own.csv"
    own.write_text(",fold,id\n0,1,b\n1,0,a\n2,0,not_a_train_tile\n")
    assert read_folds(own, ["a", "b"]).tolist() == [0, 1]
    for content, words in {
        "id,fold\na,0\n": "lacks 1 of 2", "id,fold\na,0\nb,x\n": "'x', not a whole number", "id,fold\na,0\nb,1\nb,1\n": "b a second time",
        "id,fold\na,1\nb,2\n": r"folds \[1, 2\]", "id,folds\na,1\n": "one column fold", "id,fold\na,-1\nb,0\n": "not a whole number",
    }.items():
        own.write_text(content)
        with pytest.raises(SaltError, match=words):
            read_folds(own, ["a", "b"])
    with pytest.raises(SaltError, match="nowhere.csv"):
        read_folds(tmp_path / "nowhere.csv", ["a"])


@pytest.mark.parametrize("ids, depths, n", [(["a", "a"], [1, 2], 2), (["a", "b"], [1, 2], 3), (["a", "b"], [1, 2], 1), ([], [], 2), (["a", "b"], [1], 2)])
def test_folds_refuse(ids, depths, n):
    with pytest.raises(SaltError):
        make_folds(ids, depths, n)


# The store

IDS = np.array([f"t{k:03}" for k in range(200)])
PROBS = np.random.default_rng(0).random((200, 9, 9), dtype=np.float32)


def test_store_reads_any_order(tmp_path):
    store = PredictionStore.create(tmp_path / "a" / "p.zarr", IDS, size=9)
    for rows in store.pending():
        assert store.pending()
        store.write(rows, PROBS[rows])
    again = PredictionStore(tmp_path / "a" / "p.zarr")
    order = np.random.default_rng(1).permutation(200)[:120]
    assert again.pending() == []
    assert np.allclose(again.read(IDS[order]), PROBS[order], atol=5e-4) and again.read().dtype == np.float32
    assert again.read([]).shape == (0, 9, 9)
    assert os.listdir(tmp_path / "a") == ["p.zarr"]


def test_store_keeps_tiles_without_any_salt(tmp_path):
    store = PredictionStore.create(tmp_path / "p.zarr", IDS[:100], size=9)
    for rows, probs in zip(store.pending(), (np.zeros((64, 9, 9)), np.ones((36, 9, 9)))):
        store.write(rows, probs)
    again = PredictionStore.create(tmp_path / "p.zarr", IDS[:100], size=9)
    assert again.pending() == [] and not again.read(IDS[:64]).any() and (again.read(IDS[64:100]) == 1).all()
    again.write(slice(64, 100), np.full((36, 9, 9), 1e-6))  # rounded to 0
    assert not PredictionStore(tmp_path / "p.zarr").read().any()


def test_store_after_a_kill(tmp_path):
    "Killed by the system between the data of a chunk and its flag: that chunk is written again, nothing else is."
    path = tmp_path / "p.zarr"
    code = f"""
import os, signal
import numpy as np
from saltlib.data import PredictionStore
store = PredictionStore.create({str(path)!r}, [f"t{{k:03}}" for k in range(200)], size=9)
store.write(slice(64, 128), np.full((64, 9, 9), 0.25))
class Kill:
    def __setitem__(self, key, value): os.kill(os.getpid(), signal.SIGKILL)
store._written = Kill()
store.write(slice(0, 64), np.full((64, 9, 9), 0.75))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = PredictionStore.create(path, IDS, size=9)
    assert store.pending() == [slice(0, 64), slice(128, 192), slice(192, 200)]
    assert (store.read(IDS[64:128]) == 0.25).all()
    with pytest.raises(SaltError, match="lacks the predictions of 64 of 128"):
        store.read(IDS[:128])
    for rows in store.pending():
        store.write(rows, PROBS[rows])
    assert np.allclose(PredictionStore(path).read(IDS[:64]), PROBS[:64], atol=5e-4)


def test_store_after_a_kill_while_it_is_made(tmp_path):
    (tmp_path / ".p.zarr.part").mkdir()
    (tmp_path / ".p.zarr.part" / "zarr.json").write_text("{")
    assert len(PredictionStore.create(tmp_path / "p.zarr", IDS, size=9).pending()) == 4
    assert os.listdir(tmp_path) == ["p.zarr"]


def test_store_refuses(tmp_path):
    path = tmp_path / "p.zarr"
    store = PredictionStore.create(path, IDS, size=9, attributes={"model": "compact", "fold": 0})
    assert PredictionStore(path).attributes == {"model": "compact", "fold": 0}
    for ids, size, attributes in (
        (IDS[:-1], 9, store.attributes), (IDS[::-1], 9, store.attributes), (IDS, 8, store.attributes), (IDS, 9, {"model": "compact", "fold": 1}),
    ):
        with pytest.raises(SaltError, match="other tiles or by another model"):
            PredictionStore.create(path, ids, size=size, attributes=attributes)
    for rows, probs in (
        (slice(1, 65), PROBS[1:65]), (slice(0, 63), PROBS[:63]), (slice(0, 64), PROBS[:63]), (slice(0, 64), PROBS[:64, :8]),
        (slice(192, 256), PROBS[:64]),
    ):
        with pytest.raises(SaltError, match="whole chunks"):
            store.write(rows, probs)
    for value in (np.nan, np.inf, -0.1, 1.1):
        with pytest.raises(SaltError, match="not all between 0 and 1"):
            store.write(slice(0, 64), np.full((64, 9, 9), value, np.float32))
    assert len(store.pending()) == 4
    with pytest.raises(SaltError, match="'x'"):
        store.read(["x"])
    with pytest.raises(SaltError, match="lacks the predictions"):
        store.read()
    for ids in (["a", "a"], []):
        with pytest.raises(SaltError, match="needs ids"):
            PredictionStore.create(tmp_path / "q.zarr", ids)


@pytest.mark.parametrize("damage", [
    lambda path: shutil.rmtree(path), lambda path: (path / "zarr.json").write_text("{"), lambda path: (path / "zarr.json").unlink(),
    lambda path: shutil.rmtree(path / "probs"), lambda path: (path / "written" / "zarr.json").write_text("[]"),
])
def test_damaged_store(tmp_path, damage):
    path = tmp_path / "p.zarr"
    PredictionStore.create(path, IDS, size=9)
    damage(path)
    with pytest.raises(SaltError, match="is no store of predictions"):
        PredictionStore(path)


# The competition's own tiles

def test_real_folder_is_sound(tgs):
    assert check_data(tgs) == []


def test_real_codes(tgs):
    train = load_tiles(tgs, "train")
    codes, _ = read_by_id(tgs / "train.csv", "rle_mask")
    assert encode_masks(train.masks) == [codes[id] for id in train.ids.tolist()]
    assert 0 < is_black(train.images).sum() < 0.05 * len(train)


def test_real_tiles_fit_in_600_mb(tgs):
    code = f"""
from saltlib.core import process_memory
from saltlib.data import load_tiles
train, test = load_tiles({str(tgs)!r}, "train"), load_tiles({str(tgs)!r}, "test")
print(len(train) + len(test), int(process_memory()["VmHWM"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    tiles, peak = map(int, done.stdout.split())
    assert tiles == 22_000 and peak < 600
