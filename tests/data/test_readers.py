"""Pictures of any kind: levels, orientation and transparency as they were written, or one line; which files are one."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tinytwinflow.backbones.captions import Pairs
from tinytwinflow.data.readers import Folder, find_pictures, read_picture
from tinytwinflow.runs.choice import recipe_for_name

EXAMPLES = int(os.environ.get("TINYTWINFLOW_FUZZ", 100))  # 2,000 where there is time
RAMP = np.arange(32).reshape(4, 8) * 8  # levels of 8 bits

UPRIGHT = {  # EXIF: what is seen from what is stored, by where its row 0 and column 0 belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def oriented(number):
    exif = Image.Exif()
    exif[0x112] = number
    return exif


def png(kind, depth, raw, *chunks):
    """A PNG of four pixels in a row, written by hand.  kind: 0 grey, 2 colours"""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">2I5B", 4, 1, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("16-bit.png", (257 * RAMP).astype(np.uint16)),
        ("16-bit.tif", (257 * RAMP).astype(np.uint16)),
        ("big-endian.tif", (257 * RAMP).astype(">u2")),
        ("32-bit.tif", (257 * RAMP).astype(np.int32)),
        ("float.tif", (RAMP / 255).astype(np.float32)),
        ("8-bit.png", RAMP.astype(np.uint8)),
    ],
)
def test_levels_are_kept_whatever_the_depth(tmp_path, name, pixels):
    """32 levels stay 32 levels, the same ones, in training and encoding, with captions, where a size is looked for."""
    Image.fromarray(pixels).save(tmp_path / name)
    expected = np.broadcast_to(RAMP[:, :, None], (4, 8, 3))
    assert np.array_equal(read_picture(tmp_path / name), expected)
    for make in (Folder, Pairs)[: 2 if name.endswith("png") else 1]:
        (tmp_path / name).with_suffix(".txt").write_text("a ramp") if make is Pairs else None
        x = make(tmp_path, 4).read(torch.tensor([0]), None)[0]
        assert ((x + 1) * 127.5).round()[0].permute(1, 2, 0).tolist() == expected[:, 2:6].tolist()
        (tmp_path / name).with_suffix(".txt").unlink(missing_ok=True)
    assert recipe_for_name(str(tmp_path))[1]["size"] == 4


def test_levels_between_those_of_8_bits_go_to_the_nearest(tmp_path):
    for pixels in (
        np.array([[0, 128, 129, 385, 386, 65535]], np.uint16),
        np.array([[0, 0.49, 0.51, 1.49, 1.51, 255]]) / 255,
    ):
        Image.fromarray(pixels.astype(np.float32) if pixels.dtype == float else pixels).save(tmp_path / "a.tif")
        assert np.asarray(read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_of_colours_of_16_bits_the_upper_8_are_kept(tmp_path):
    """Pillow does so itself: v // 256, never more than one level from v / 257."""
    raw = np.array([0, 255, 256, 257, 383, 32767, 32768, 65279, 65280, 65535, 4660, 1], ">u2")
    (tmp_path / "a.png").write_bytes(png(2, 16, raw.tobytes()))
    read = np.asarray(read_picture(tmp_path / "a.png")).ravel()
    assert read.tolist() == [0, 0, 1, 1, 1, 127, 128, 254, 255, 255, 18, 0]
    assert np.abs(read - raw / 257).max() < 1


@pytest.mark.parametrize(
    "pixels, match",
    [
        (np.array([[0, 65536]], np.int32), r"must lie in 0 ... 65535, as I they are 0 ... 65536"),
        (np.array([[-1, 5]], np.int32), r"must lie in 0 ... 65535, as I they are -1 ... 5"),
        (np.array([[0, 1.5]], np.float32), r"must lie in 0 ... 1, as F they are 0 ... 1.5"),
        (np.array([[-0.5, 1]], np.float32), r"must lie in 0 ... 1, as F they are -0.5 ... 1"),
        (np.array([[0, np.nan]], np.float32), r"must lie in 0 ... 1, as F they are nan"),
        (np.array([[0, np.inf]], np.float32), r"must lie in 0 ... 1, as F they are 0 ... inf"),
    ],
)
def test_numbers_that_are_no_levels_are_refused(tmp_path, pixels, match):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif: its pixels {match}"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "grey.tif", "a.webp", "a.jpg"])
def test_pictures_stand_upright_before_their_middle_square_is_cut(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    if name == "grey.tif":
        image = Image.fromarray(pixels[:, :, 0])
        pixels = np.repeat(pixels[:, :, :1], 3, 2)
    for number, turn in UPRIGHT.items():
        image.save(tmp_path / name, exif=oriented(number), lossless=True)
        upright = turn(np.asarray(Image.open(tmp_path / name)) if name == "a.jpg" else pixels)
        middle = upright[:, 8:24] if number < 5 else upright[8:24]
        x = Folder(tmp_path, 16).read(torch.tensor([0]), None)[0][0]
        assert np.array_equal(((x + 1) * 127.5).round().permute(1, 2, 0), middle), number


def test_what_is_transparent_lies_on_white(tmp_path):
    """Colours that a picture hides, and half of those that show half, in every way in which it may say so."""

    def read(image, **how):
        image.save(tmp_path / "a.png", **how)
        return np.asarray(read_picture(tmp_path / "a.png"))[0].tolist()

    colours = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 100, 50, 51]]], np.uint8)
    assert read(Image.fromarray(colours)) == [[255] * 3, [200, 0, 0], [204, 224, 214]]
    assert read(Image.frombytes("LA", (3, 1), colours[:, :, [0, 3]].tobytes())) == [[255] * 3, [200] * 3, [204] * 3]
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    assert read(palette) == [[200, 0, 0], [0, 100, 0], [0, 0, 50]]
    assert read(palette, transparency=1) == [[200, 0, 0], [255] * 3, [0, 0, 50]]
    assert read(palette, transparency=bytes([0, 51, 255])) == [[255] * 3, [204, 224, 204], [0, 0, 50]]
    assert read(Image.fromarray(colours[:, :, 0]), transparency=200) == [[255] * 3, [255] * 3, [0] * 3]
    assert read(Image.fromarray(colours[:, :, :3]), transparency=(0, 100, 50)) == [[200, 0, 0], [200, 0, 0], [255] * 3]
    deep = np.array([0, 257, 256, 65278], ">u2").tobytes()
    for hidden, levels in [(257, [0, 255, 1, 254]), (0, [255, 1, 1, 254])]:
        (tmp_path / "a.png").write_bytes(png(0, 16, deep, (b"tRNS", struct.pack(">H", hidden))))
        assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == levels
    for kind, depth, raw, hidden in [(0, 2, b"\x1b", b"\0\3"), (2, 16, bytes(range(24)), bytes(6))]:
        (tmp_path / "a.png").write_bytes(png(kind, depth, raw, (b"tRNS", hidden)))
        with pytest.raises(ValueError, match="a.png: a transparent colour is read in PNG of 8 bits, others need"):
            read_picture(tmp_path / "a.png")


def test_hidden_folders_are_no_classes_and_empty_ones_are_named(tmp_path):
    """Labels and pictures are what they are without them."""
    write_folder(tmp_path / "own", classes=2, n=2)
    expected = find_pictures(tmp_path / "own")
    assert [len(expected[0]), *expected[1:]] == [4, [0, 0, 1, 1], 2]
    for hidden in (".ipynb_checkpoints", "__MACOSX", "class-0/.thumbnails", "class-1/__MACOSX/class-1"):
        (tmp_path / "own" / hidden).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "own" / hidden / "0.png")
    for name in (".DS_Store", "class-0/._0.png"):
        (tmp_path / "own" / name).write_bytes(b"\0")
    assert find_pictures(tmp_path / "own") == expected and recipe_for_name(str(tmp_path / "own"))[1]["conditional"]
    (tmp_path / ".cache").mkdir()
    flat = (tmp_path / "own" / "class-1").rename(tmp_path / ".cache" / "flat")
    assert find_pictures(flat)[1:] == ([0, 0], 0) and recipe_for_name(str(flat))[1]["size"] == 24
    for content in ({}, {".x.png": b""}):
        (tmp_path / "own" / "none").mkdir(exist_ok=True)
        for name in content:
            (tmp_path / "own" / "none" / name).touch()
        with pytest.raises(ValueError, match="own/none: holds no images"):
            find_pictures(tmp_path / "own")


def test_endings_that_are_not_read_are_answered_with_those_that_are(tmp_path):
    """As torchvision has them; a folder of .gif holds no images, one beside others is none."""
    told = r".jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp are read$"
    Image.new("P", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match=f"holds no images; it needs images, .*; {told}"):
        find_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=f"a.gif: not an image; {told}"):
        find_pictures(tmp_path)


MODES = {  # what files of each kind hold; JPEG keeps no pixel as it is
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I", "F", "CMYK", "YCbCr", "LAB"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("L", "P"),
    "jpg": ("L", "RGB", "CMYK", "YCbCr"),
}
KINDS = {"I;16": np.uint16, "I;16B": ">u2", "I": np.int32, "F": np.float32}
COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)


def seen(mode, pixels):
    """What one sees of pixels of a mode, by hand: 8 bits, three colours, on white."""
    a = np.asarray(pixels, np.float64)
    if mode in ("I;16", "I;16B", "I"):
        a = a / 257
    elif mode == "F":
        a = a * 255
    elif mode == "P":
        a = COLOURS[pixels].astype(np.float64)
    elif mode == "CMYK":
        a = (255 - a[:, :, :3]) * (255 - a[:, :, 3:]) / 255
    elif mode in ("LA", "RGBA"):
        a = 255 + (a[:, :, :-1] - 255) * a[:, :, -1:] / 255
    a = a[:, :, None] if a.ndim == 2 else a
    return np.broadcast_to(a, (*a.shape[:2], 3))


@st.composite
def pictures(draw):
    """A picture in a file.  -> ending, mode, pixels as they are stored, orientation, how much of the file is there"""
    ending = draw(st.sampled_from(sorted(MODES)))
    mode, (height, width) = draw(st.sampled_from(MODES[ending])), (draw(st.integers(1, 40)) for _ in range(2))
    bands = () if mode in KINDS or len(mode) == 1 else (len(Image.new(mode, (1, 1)).getbands()),)
    wild = {"I": st.integers(-9, 65540), "F": st.floats(-0.125, 1.125, width=32) | st.just(np.nan)}
    right = st.floats(0, 1, width=32) if mode == "F" else st.integers(0, 65535 if mode in KINDS else 255)
    known = wild[mode] if mode in wild and draw(st.booleans()) else right
    pixels = draw(hnp.arrays(KINDS.get(mode, np.uint8), (height, width, *bands), elements=known))
    part = draw(st.sampled_from([1.0, 1.0, 0.0, 0.5, -1, 1]) | st.floats(0, 1))
    return ending, mode, 255 * (pixels > 127).astype(np.uint8) if mode == "1" else pixels, draw(st.integers(1, 8)), part


@settings(max_examples=EXAMPLES)
@given(pictures())
def test_a_picture_is_read_as_it_was_written_or_refused_in_one_line(tmp_path_factory, picture):
    ending, mode, pixels, number, part = picture
    path = tmp_path_factory.mktemp("pictures") / f"a.{ending}"
    if mode in KINDS:
        image = Image.fromarray(pixels)
    else:
        bytes_of = Image.frombytes("L" if mode == "1" else mode, pixels.shape[1::-1], pixels.tobytes())
        image = bytes_of.convert("1") if mode == "1" else bytes_of
    if mode == "P":
        image.putpalette(COLOURS.tobytes())
    turned = {"exif": oriented(number)} if ending not in ("bmp", "gif") else {}
    image.save(path, lossless=True, exact=True, **turned)
    raw = path.read_bytes()
    stored = seen(mode, pixels)
    if ending == "jpg" or mode in ("YCbCr", "LAB"):
        stored = np.asarray(Image.open(path).convert("RGB")) if ending == "jpg" else np.asarray(image.convert("RGB"))
    expected = UPRIGHT[number if turned else 1](stored)
    path.write_bytes(raw[: int(part * len(raw))] if part >= 0 else raw[:-1])
    whole = part == 1.0
    try:
        read = np.asarray(read_picture(path), np.float64)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert not whole or mode in ("I", "F") and "its pixels must lie in" in str(error)
        assert not whole or not 0 <= pixels.min() <= pixels.max() <= (1 if mode == "F" else 65535)
    else:
        assert read.shape == expected.shape and np.abs(read - expected).max() <= (0.5001 if mode in KINDS else 1)
