"""A small share of `make fuzz`, and that it finds what it is there for."""

import pytest

import fuzz
from saltlib.core import SaltError


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_input_is_refused_or_read_right(name):
    taken, refused = fuzz.run(name, 300, seed=2018)
    assert taken + refused == 300 and refused > 0


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_sound_input_is_taken(name, tmp_path):
    for data in fuzz.TARGETS[name].sound:
        if name == "PNG tiles" and data[24] == 16:
            with pytest.raises(SaltError, match="16-bit"):  # a mask may, a tile may not
                fuzz.TARGETS[name].check(data, tmp_path / "input")
        else:
            fuzz.TARGETS[name].check(data, tmp_path / "input")


def test_a_reader_that_raises_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "rle_decode", lambda text: 1 / 0)
    with pytest.raises(AssertionError, match="run-length codes, seed 1, input .* ZeroDivisionError"):
        fuzz.run("run-length codes", 3000, seed=1)
