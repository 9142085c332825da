"""Bytes that are not what a modality promises end as `DecodeError`, whatever they are, and before they take memory."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distkd.data.codec import DecodeError, decode, decode_image, encode, npy_header
from distkd.data.manifest import Modality
from distkd.data.raw.image_file import read_square
from distkd.errors import DataError

VECTOR = Modality(kind="vector", dtype="float32", shape=(3,), codec="npy")
IMAGE = Modality(kind="image", dtype="uint8", shape=(9, 7, 3), codec="png")
JPG = IMAGE.model_copy(update={"codec": "jpg"})


def npy(header: str, values: bytes = b"") -> bytes:
    text = (header + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


def header(shape: str, descr: str = "<f4", order: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"


def png(height: int, width: int, extra: bytes = b"") -> bytes:
    """Grey, with all its pixels 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(width + 1)) for _ in range(height)) + pack.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(header("(100000000000000,)")), r"holds float32 of shape \(100000000000000,\), expected float32"),
        (npy(header("(3,)"), b"\0" * 11), r"is not a readable npy array \(11 bytes of values, expected 12\)"),
        (npy(header("(3,)"), b"\0" * 16), r"is not a readable npy array \(16 bytes of values, expected 12\)"),
        (npy(header("(3,)", descr=">f4"), b"\0" * 12), "holds >f4 of shape"),
        (npy(header("(3,)", descr="|O"), b"\0" * 12), "holds object of shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,"), "is not a readable npy array"),
        (npy("{'descr': '<f4' 'shape'} ) ''' "), "is not a readable npy array"),
        (npy("{[]: 1}"), "is not a readable npy array"),
        (npy("{1: 1, 'a': 2}"), "is not a readable npy array"),
        (npy("-" * 9000 + "1"), "is not a readable npy array"),
        (npy("(" * 9000), "is not a readable npy array"),
        (b"\x93NUMPY\x09\x00", "is not a readable npy array"),
        (b"", "is not a readable npy array"),
    ],
)
def test_an_npy_file_that_is_something_else_is_told(data: bytes, words: str):
    with pytest.raises(DecodeError, match=words) as caught:
        decode(data, VECTOR)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_npy_files_of_other_writers_are_read():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    modality = Modality(kind="vector", dtype="float32", shape=(3, 4), codec="npy")
    for array in (values, np.asfortranarray(values)):
        for version in ((1, 0), (2, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, array, version=version)
            found = decode(file.getvalue(), modality)
            np.testing.assert_array_equal(found, values)
            assert not found.flags.writeable


def test_a_header_takes_no_memory_of_its_values():
    assert b"(1000000000000,)" in npy_header("float64", (10**12,))


def test_an_image_of_another_size_is_refused_before_it_has_pixels(monkeypatch: pytest.MonkeyPatch):
    data = png(3000, 3000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were made"))
    with pytest.raises(
        DecodeError, match=r"holds uint8 of shape \(3000, 3000, 1\), expected uint8 of shape \(9, 7, 3\)"
    ):
        decode(data, IMAGE)


@pytest.mark.parametrize("times", [1.5, 3])  # pillow warns of the first, and refuses the second
@pytest.mark.parametrize("action", ["default", "error"])
def test_a_decompression_bomb_is_no_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: float, action: str):
    data = png(40, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40 * 50 / times))
    (tmp_path / "bomb.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if action == "default" else "error")
        for shape in (None, (9, 7, 3)):
            with pytest.raises(DecodeError, match=r"is not a readable image|is an image of 50 x 40 px|holds uint8 of"):
                decode_image(data, shape=shape)
        with pytest.raises(DataError, match=r"cannot read the image|is 50 x 40 px, expected 9 x 9"):
            read_square(tmp_path / "bomb.png", IMAGE.model_copy(update={"shape": (9, 9, 3)}))


def test_a_png_with_a_torn_header_is_no_image(tmp_path: Path):
    data = png(9, 7).replace(b"\0\0\0\x0dIHDR", b"\0\0\0\x04IHDR")
    (tmp_path / "torn.png").write_bytes(data)
    with pytest.raises(DecodeError, match="is not a readable image"):
        decode(data, IMAGE)
    with pytest.raises(DataError, match=r"cannot read the image .*torn\.png'"):
        read_square(tmp_path / "torn.png", IMAGE)


@pytest.mark.filterwarnings("ignore")  # pillow and numpy may warn of what they find
@pytest.mark.parametrize("modality", [VECTOR, IMAGE, JPG], ids=["npy", "png", "jpg"])
def test_damaged_bytes_decode_or_say_so(modality: Modality):
    draws = np.random.default_rng(5)
    array = draws.integers(0, 256, size=modality.shape).astype(modality.dtype)
    sound = encode(array, modality)
    for _ in range(1500):
        data = bytearray(sound)
        for place in draws.integers(0, min(len(data), int(draws.integers(12, 200))), size=draws.integers(1, 5)):
            data[place] = draws.integers(0, 256)
        cut = len(data) if draws.random() < 0.7 else int(draws.integers(0, len(data)))
        with suppress(DecodeError):
            found = decode(bytes(data[:cut]), modality)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
