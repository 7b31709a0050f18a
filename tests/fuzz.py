"""Throw damaged input at everything that reads a file: `make fuzz`, which takes some minutes.

Each target starts from sound input, changes it at random and hands it to a reader. Whatever comes out must be a
refusal in a sentence (`SaltError`) or an answer that an independent reading confirms. A process that needs more than
its limit of memory, or `SECONDS` for one input, has failed. test_fuzz.py runs a small share of it.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import PIL.Image
import torch

from saltlib.cli import make_parser, predict_settings
from saltlib.core import SaltError, StepRecord, read_record
from saltlib.data import ID, LARGEST_FILE, decode_png, open_split, parse_depth, read_by_id, read_folds, rle_decode, rle_encode
from saltlib.ensemble import decode_masks, read_pseudo_labels
from saltlib.models import load_weights
from saltlib.published import Source, fill, from_keras, keras_tensors
from saltlib.recipes import Recipe, parse_recipe, read_recipe

MEMORY = 6 << 30  # bytes of address space, most of it torch's and OpenCV's own code
SECONDS = 20  # for one input; far above what a starved machine needs


def mutate(data: bytes, words: list[bytes], rng: random.Random) -> bytes:
    "One to four changes: bits, bytes, pieces left out, doubled, exchanged, words put in, the end cut off."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 16])
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])
            case 4:
                data[at : at + length] = rng.choice([b"\0", b"\xff", b"\x7f", b"9", b"\n", b'"', b"[", b"{"]) * length
            case 5 if words:
                data[at:at] = rng.choice(words)
            case 6 if words:
                data[at : at + length] = rng.choice(words)
            case 7 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


class Target:
    "Sound inputs, words that belong into them, and a check that raises SaltError for what is refused and anything else for a fault."

    def __init__(self, share: float, sound: list[bytes], words: str, check: Callable[[bytes, Path], None], mend: Callable[[bytes], bytes] = lambda data: data):
        self.share, self.sound, self.words, self.check, self.mend = share, sound, [word.encode() for word in words.split("~")], check, mend

    def input(self, rng: random.Random) -> bytes:
        data = mutate(rng.choice(self.sound), self.words, rng)
        return self.mend(data) if rng.random() < 0.8 else data


# Run-length codes and tables

def check_rle(data, path):
    text = data.decode("utf-8", "replace")
    mask, salt = rle_decode(text), set()
    for start, length in zip(*[iter(map(int, text.split()))] * 2):
        run = set(range(start, start + length))
        assert run and not salt & run, "runs that overlap were taken"
        salt |= run
    assert set((np.flatnonzero(mask.ravel(order="F")) + 1).tolist()) == salt
    assert (rle_decode(rle_encode(mask)) == mask).all()


def check_table(data, path):
    path.write_bytes(data)
    values, problems = read_by_id(path, "z")
    text = data.decode("utf-8-sig", "replace")
    assert all(ID.fullmatch(id) and id in text for id in values) and len(values) <= len(text.splitlines()) + text.count("\r")
    assert all(depth is None or 0 <= depth < 10**9 for depth in map(parse_depth, values.values()))
    if problems:
        raise SaltError(problems[0])


def check_folds(data, path):
    path.write_bytes(data)
    folds = read_folds(path, ["aa", "b-1"])
    assert sorted(set(folds.tolist())) == list(range(len(set(folds.tolist()))))


def check_pseudo_labels(data, path):
    path.write_bytes(data)
    table = read_pseudo_labels(path)
    assert len(decode_masks(table)) == len(table) < len(data)


# PNG and zip

def tile(seed=0):
    return np.random.default_rng(seed).integers(0, 8, (101, 101), dtype=np.uint8) * 9


def png(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def mend_png(data):
    "Right checksums, so that the damage reaches the decoder."
    good, position = bytearray(data), 8
    while position + 12 <= len(good):
        end = position + 12 + int.from_bytes(good[position : position + 4])
        if end > len(good):
            break
        good[end - 4 : end] = struct.pack(">I", zlib.crc32(good[position + 4 : end - 4]))
        position = end
    return bytes(good)


def check_png(data, path):
    pixels = decode_png(data, "x.png")
    assert pixels.shape == (101, 101) and pixels.dtype == np.uint8
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.size == (101, 101)


def check_mask(data, path):
    mask = decode_png(data, "x.png", mask=True)
    assert mask.shape == (101, 101) and mask.dtype == bool


def zipped(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for k in range(2):
            archive.writestr(f"images/t{k}.png", png(tile(k)))
        archive.writestr("images/bomb.png", bytes(2 * LARGEST_FILE))
    return buffer.getvalue()


def check_zip(data, path):
    path.with_name("test.zip").write_bytes(data)
    with open_split(path.parent, "test") as files:
        for id in files["images"].entries:
            assert ID.fullmatch(id)
            with contextlib.suppress(SaltError):
                assert len(files["images"].read(id)) <= LARGEST_FILE
        if files["images"].problems:
            raise SaltError(files["images"].problems[0])


# Recipes, settings, records

RECIPE = (Path(__file__).parents[1] / "nbs/runs/recipes/demo.yaml").read_bytes()


def check_recipe(data, path):
    path.write_bytes(data)
    recipe = read_recipe(path)
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe and isinstance(recipe, Recipe)
    assert all(name.isidentifier() and name.isascii() for name in (recipe.name, *recipe.rounds))


def check_settings(data, path):
    path.write_bytes(data)
    given = predict_settings(make_parser().parse_args(["predict", "--settings", str(path)]))
    assert set(given) == {"images", "models", "out"} and all(isinstance(value, str) and b"\0" not in os.fsencode(value) for value in given.values())


def a_record():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "result").write_text("result")
        StepRecord(Path(folder), "train", {"fold": 0, "epochs": 3}).finish({"mAP": 0.5}, ["result"])
        return Path(folder, "record.json").read_bytes()


RECORD = a_record()


def check_record(data, path):
    path.with_name("record.json").write_bytes(data)
    path.with_name("result").write_text("result")
    record = read_record(path.parent, verify=True)
    assert {k: v for k, v in json.loads(RECORD).items() if k != "checksum"} == record


# Checkpoints: a network of two tensors stands for the whole ones

def network():
    net = torch.nn.Linear(3, 2)
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    return net


def torch_file(new):
    buffer = io.BytesIO()
    torch.save({"w": torch.full((2, 3), 0.5), "b": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def safetensors_file():
    with tempfile.TemporaryDirectory() as folder:
        from saltlib.models import save_weights

        save_weights(network(), Path(folder, "w.safetensors"))
        return Path(folder, "w.safetensors").read_bytes()


def keras_file():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["layer_names"] = np.array([b"a", b"relu"])
        for name, weights in {"a": ["kernel:0", "bias:0"], "relu": []}.items():
            file.create_group(name).attrs["weight_names"] = np.array([f"{name}/{w}".encode() for w in weights], dtype="S")
        file["a"].create_dataset("a/kernel:0", data=np.ones((3, 2), np.float32))
        file["a"].create_dataset("a/bias:0", (2,), np.float32, chunks=True, compression="gzip")
    return buffer.getvalue()


def sound_weights(net):
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in net.state_dict().values())


def check_torch(data, path):
    path.write_bytes(data)
    from saltlib.published import read_tensors

    net = network()
    sources = {"weight": Source(["w"], (2, 3), lambda values: values[0]), "bias": Source(["b"], (2,), lambda values: values[0])}
    fill(net, sources, read_tensors(path), set(), path)
    sound_weights(net)


def check_safetensors(data, path):
    path.write_bytes(data)
    load_weights(net := network(), path)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {"weight": (2, 3), "bias": (2,)}


def check_keras(data, path):
    path.write_bytes(data)
    net = torch.nn.Linear(3, 2)
    sources = {"weight": Source(["a/kernel:0"], (3, 2), lambda values: from_keras(values)[:, :, 0, 0]), "bias": Source(["a/bias:0"], (2,), from_keras)}
    try:
        with h5py.File(path) as file:
            fill(net, sources, keras_tensors(file), set(), path)
    except SaltError:
        raise
    except MemoryError:
        raise AssertionError("unbounded allocation") from None
    except Exception as error:  # as load_bes does
        raise SaltError(str(error)) from None
    sound_weights(net)


TABLE = b"id,z\r\naa,100\nb-1,200\n\"c_2\",300\nD3,0\n"
LABELS = b"id,unique_pixels,mask_pixels,confidence,rle_mask\naa,7,3,0.95,1 3\nb-1,1,0,1.0,\n"
TARGETS = {  # share of all inputs
    "run-length codes": Target(0.42, [b"1 3 10 5 200 40", b"", b"10201 1", b"1 10201"], " ~ 0~-1~+~99999999999999999999~1e3~\u0661~\t~ 1 1", check_rle),
    "tables": Target(0.2, [TABLE], "\r~\n~,~\"~../~id~z~\0~\ufeff~aa,1\n~é", check_table),
    "fold files": Target(0.08, [b"id,fold\naa,0\nb-1,1\n", b",fold,id\n0,1,aa\n1,0,b-1\n"], "0~1~999~-~1.0~\n~,~id", check_folds),
    "pseudo-labels": Target(0.01, [LABELS], "\n~,~\"~nan~inf~1e999~-1~99999999999999999999~1 1", check_pseudo_labels),
    "PNG tiles": Target(
        0.07, [png(tile()), png(np.stack([tile()] * 3, -1)), png(tile().astype(np.uint16))], "IHDR~IDAT~IEND~PLTE~tRNS~acTL~iCCP", check_png, mend_png,
    ),
    "PNG masks": Target(
        0.07, [png((tile() > 30) * np.uint8(255)), png((tile() > 30) * np.uint16(65535))], "IHDR~IDAT~IEND~PLTE~tRNS~sBIT", check_mask, mend_png,
    ),
    "zips": Target(0.02, [zipped(zipfile.ZIP_STORED), zipped(zipfile.ZIP_DEFLATED)], "PK\x01\x02~PK\x03\x04~PK\x05\x06~images/~../~\0~.png", check_zip),
    "recipes": Target(0.01, [RECIPE], "[~{~&a ~*a~: ~- ~!!python/name:os.system ~!!int ~.inf~.nan~null~~~1e400~0~-1~on~\t~\n~round2~'~\"", check_recipe),
    "settings files": Target(
        0.02, [b'{"images": "tiles", "models": "nets", "out": "new.csv"}'], "[~{~\"~,~null~1e999~\\ud800~\\u0000~true~images", check_settings,
    ),
    "records": Target(0.04, [RECORD], "[~{~\"~,~null~NaN~Infinity~1e999~true~../../etc/passwd~files~checksum", check_record),
    "torch files": Target(
        0.02, [torch_file(True), torch_file(False)], "PK\x01\x02~cposix\nsystem\n~cos\nsystem\n~R.~archive/~torch\nFloatStorage\n", check_torch,
    ),
    "safetensors": Target(0.03, [safetensors_file()], "F64~I64~BOOL~F8_E4M3~F4~[~{~\"~999999999999~weight~data_offsets", check_safetensors),
    "Keras files": Target(0.01, [keras_file()], "HDF\r\n~TREE~HEAP~SNOD~OHDR~\xff\xff\xff\xff\xff\xff\xff\xff", check_keras),
}


def run(name: str, n: int, seed: int, at=None) -> tuple[int, int]:
    "How many inputs were taken and refused. Raises what a reader raised, with the input's number; `at` gets the number before."
    target, taken = TARGETS[name], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "input"
        for k in range(n):
            data = target.input(random.Random(f"{seed} {name} {k}"))
            if at:
                at.value = k
            signal.alarm(SECONDS)  # ends the process: a loop inside a library would not let Python raise anything
            try:
                target.check(data, path)
                taken += 1
            except SaltError as error:
                assert 0 < len(str(error)) < 5000, "the message is too long"
            except BaseException as error:
                shutil.copy(path, keep := f"fuzz-{k}") if path.exists() else Path(keep := f"fuzz-{k}").write_bytes(data)
                raise AssertionError(f"{name}, seed {seed}, input {k} (kept as {keep}): {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    return taken, n - taken


def work(name: str, n: int, seed: int, queue, at) -> None:
    "A process of its own for each target: what it allocates is limited, and a crash or a hang (the alarm ends it) is seen."
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say about each input
    try:
        queue.put((name, run(name, n, seed, at), None))
    except BaseException:
        queue.put((name, (0, 0), traceback.format_exc()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=TARGETS)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    context, total, faults = multiprocessing.get_context("fork"), 0, 0
    queue = context.Queue()
    for name in [args.only] if args.only else TARGETS:
        n, began = round(args.inputs * (1 if args.only else TARGETS[name].share)), time.time()
        at = context.Value("q")
        process = context.Process(target=work, args=(name, n, args.seed, queue, at))
        process.start()
        process.join()
        if process.exitcode:
            Path(keep := f"fuzz-{at.value}").write_bytes(TARGETS[name].input(random.Random(f"{args.seed} {name} {at.value}")))
            what = f"took more than {SECONDS} s" if process.exitcode == -signal.SIGALRM else f"ended the process ({process.exitcode})"
            print(f"{name}, seed {args.seed}, input {at.value} (kept as {keep}): {what}", flush=True)
            faults += 1
            continue
        _, (taken, refused), fault = queue.get()
        print(fault or f"{name}: {taken + refused} inputs, {refused} refused, {taken} taken, {time.time() - began:.0f} s", flush=True)
        total, faults = total + taken + refused, faults + bool(fault)
    print(f"{total} inputs, {faults} faults (seed {args.seed})")
    return int(faults > 0 or total < args.inputs * 0.99)


if __name__ == "__main__":
    sys.exit(main())
