"""Clip art: which pictures of the package are taken, what of a picture is, and a folder that is whole or not there."""

import re
import runpy
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_clipart
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tinytwinflow as ttf
from tinytwinflow.data.clipart import drawn, make_clipart
from tinytwinflow.data.images import Images
from tinytwinflow.data.readers import read_picture

RED, CLEAR = (200, 30, 30), (0, 0, 0, 0)


def names(folder):
    """What is in a made folder: class/name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def block(size, box, colour, mode="RGB", ground="white"):
    """A picture (width, height) with one block in it."""
    picture = Image.new(mode, size, ground)
    picture.paste(colour, box)
    return picture


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 40), st.integers(0, 40))
def test_what_is_drawn_fills_the_square_undistorted(tmp_path_factory, width, height, left, top):
    """Whatever the margin: one side is filled, the other in proportion, in the middle, white beside it."""
    path = tmp_path_factory.mktemp("clip") / "x.png"
    block((left + width + 7, top + height + 3), (left, top, left + width, top + height), RED).save(path)
    pixels = np.asarray(drawn(path)).astype(int)
    assert pixels.shape == (32, 32, 3)
    inked = (pixels < 250).any(2)
    rows, columns = inked.any(1).sum(), inked.any(0).sum()
    long, short = max(width, height), min(width, height)
    assert (rows, columns)[width > height] == 32
    assert abs((columns if width <= height else rows) - max(1, 32 * short / long)) <= 0.5
    assert abs(np.argwhere(inked).mean(0) - 15.5).max() <= 0.5
    assert (pixels[inked] == RED).all()


@pytest.mark.parametrize("kind", ["palette", "RGBA", "grey", "16 bits", "tall"])
def test_true_kinds_of_png_are_seen_as_on_white(kind, tmp_path):
    """A block twice as high as wide, from what such files hold, on what is clear or white."""
    box, path = (10, 4, 20, 24), tmp_path / "x.png"
    if kind == "palette":
        picture = block((30, 30), box, 1, "P", 0)
        picture.putpalette([0, 255, 0, *RED])
        picture.save(path, transparency=0)
    elif kind == "16 bits":
        pixels = np.full((30, 30), 65535, np.uint16)
        pixels[4:24, 10:20] = 257 * 90
        Image.fromarray(pixels).save(path)
    else:
        {
            "RGBA": block((30, 30), box, (*RED, 255), "RGBA", CLEAR),
            "grey": block((30, 30), box, 90, "L", 255),
            "tall": block((30, 900), (10, 200, 20, 220), RED),
        }[kind].save(path)
    pixels = np.asarray(drawn(path))
    colour = (90, 90, 90) if kind in ("grey", "16 bits") else RED
    assert (pixels[:, 8:24] == colour).all() and (pixels[:, :8] == 255).all() and (pixels[:, 24:] == 255).all()


def test_what_is_left_out_is_counted_and_said(tmp_path, capsys, monkeypatch):
    package, folder = write_clipart(tmp_path / "package"), tmp_path / "home" / "clipart"
    (package / "animals" / "link.png").symlink_to(package / "animals" / "000.png")
    (package / "animals" / "birds").mkdir()
    for name, lighter in (("000", 0), ("near", 7), ("other", -9)):
        colours = [tuple(level + lighter for level in colour) for colour in (RED, (90, 120, 200))]
        picture = block((64, 64), (0, 0, 64, 20), colours[0], ground=colours[1])
        picture.save(package / "animals" / "birds" / f"{name}.png")
    (package / "animals" / "broken.png").write_bytes((package / "animals" / "000.png").read_bytes()[:60])
    Image.new("RGBA", (50, 50), CLEAR).save(package / "animals" / "nothing.png")
    Image.new("1", (300, 300)).save(package / "animals" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    for outside in ("shapes/stars", "computer/icons/flat-theme/action", "unsorted"):
        (package / outside).mkdir(parents=True)
        block((64, 64), (0, 0, 9, 64), RED).save(package / outside / "x.png")
    make_clipart(folder, package)
    numbers = [f"{i:03}.png" for i in range(4)]
    assert names(folder) == [
        *(f"animals/animals-{name}" for name in numbers),
        "animals/animals-birds-000.png",
        "animals/animals-birds-other.png",
        *(f"flags/signs_and_symbols-flags-{name}" for name in numbers),
        *(f"signs/signs_and_symbols-{name}" for name in numbers),
        *(f"signs/transportation-roadsigns-{name}" for name in numbers),
    ]
    said = capsys.readouterr().err.splitlines()
    summary = next(line for line in said if line.startswith(str(folder)))
    assert "18 pictures in 3 classes" in summary and summary.count(",") == 3
    for part in ("1 links", "3 in folders left out", "1 nearly the same as another", "3 unfit"):
        assert part in summary
    left = [line for line in said if line.startswith("left out:")]
    assert len(left) == 3
    for name, why in (("broken", "cut short"), ("nothing", "blank"), ("large", "90000 pixels")):
        assert sum(f"animals/{name}.png" in line and why in line for line in left) == 1, name
    assert {np.asarray(read_picture(path)).shape for path in folder.rglob("*.png")} == {(32, 32, 3)}
    again, found = tmp_path / "again", Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, kind: reversed(sorted(found(self, kind))))  # a disk has any order
    make_clipart(again, package)
    marks = [[zlib.crc32((home / name).read_bytes()) for name in names(folder)] for home in (folder, again)]
    assert marks[0] == marks[1] and names(again) == names(folder)


def test_the_folder_is_made_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    package, home = write_clipart(tmp_path / "package"), tmp_path / "home"
    saved = []

    def full(self, path, *args):
        saved.append(path)
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        return whole(self, path, *args)

    whole = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        make_clipart(home / "clipart", package)
    assert len(saved) == 5 and list(home.iterdir()) == []
    monkeypatch.undo()
    make_clipart(home / "clipart", package)
    assert [path.name for path in home.iterdir()] == ["clipart"]
    with pytest.raises(ValueError, match="clipart: already there"):
        make_clipart(home / "clipart", package)
    for package, words in (("none", "apt install openclipart-png"), ("empty", "holds no pictures")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=words):
            make_clipart(home / "other", tmp_path / package)
    assert [path.name for path in home.iterdir()] == ["clipart"]


def test_every_fifth_picture_is_kept_from_training(tmp_path):
    make_clipart(tmp_path / "clipart", write_clipart(tmp_path / "package", n=10))
    data = Images("clipart", 32, folder=tmp_path, size=32)
    assert data.shape == (3, 32, 32) and data.classes == 3 and not data.on_disk
    (x, label), tests = data.batch(0), [data.fresh(4, draw) for draw in (0, 1)]
    assert sorted(label.tolist()) == [0] * 8 + [1] * 8 + [2] * 16
    seen = torch.cat([x, *(test for test, _ in tests)])
    assert len(seen) == 40 and len(seen.flatten(1).unique(dim=0)) == 40
    fifth = tmp_path / "clipart" / "flags" / "signs_and_symbols-flags-004.png"
    pixels = torch.from_numpy(np.array(read_picture(fifth)))
    at = ((seen + 1) * 127.5).round().permute(0, 2, 3, 1).eq(pixels).flatten(1).all(1)
    assert at[32:].sum() == 1 and not at[:32].any() and torch.cat([y for _, y in tests])[at[32:]].item() == 1
    Image.new("RGB", (31, 32)).save(tmp_path / "clipart" / "flags" / "mine.png")
    with pytest.raises(ValueError, match="mine.png: not 32 x 32 pixels"):
        Images("clipart", 32, folder=tmp_path, size=32)


def test_fit_makes_the_folder_and_gives_colour_images(tmp_path, monkeypatch, capsys):
    package = write_clipart(tmp_path / "package", n=30)
    monkeypatch.setattr("tinytwinflow.data.clipart.PACKAGE", str(package))
    monkeypatch.chdir(tmp_path)
    how = {"steps": 3, "width": 16, "depth": 1, "heads": 2, "size": 16, "batch_size": 8, "eval_samples": 12}
    model = ttf.fit("clipart", **how, precision="float32")
    assert model.config["recipe"] == "clipart" and len(names(tmp_path / "data" / "clipart")) == 120
    assert capsys.readouterr().err.count("120 pictures in 3 classes") == 1
    x = model.sample(5, cond=2)
    assert x.shape == (5, 3, 16, 16) and x.dtype == torch.uint8 and len(x.unique()) > 10
    assert not torch.equal(x[:, 0], x[:, 1])


def test_the_script_makes_it_and_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(sys, "argv", ["clipart", str(tmp_path / "none" / "clipart")])
    monkeypatch.delitem(sys.modules, "tinytwinflow.data.clipart", raising=False)
    monkeypatch.setattr("pathlib.Path.is_dir", lambda self: False)
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_module("tinytwinflow.data.clipart", run_name="__main__")
    said = capsys.readouterr().err
    assert re.fullmatch("tinytwinflow: clipart: neither .* apt install openclipart-png\n", said)
    assert not (tmp_path / "none").exists() and not recwarn.list
