"""Clip art: small colour pictures in classes, made once of Debian's openclipart-png, which is in the public domain.

python -m tinytwinflow.data.clipart [FOLDER]
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps

from ..bars import bar
from .readers import CLIPART_SIDE, GET, read_picture

PACKAGE = "/usr/share/openclipart/png"
LEFT_OUT = "folders left out"
CLASS_OF = {  # the class of the pictures in a folder of the package; of two folders the inner one decides
    "animals": "animals",
    "buildings": "buildings",
    "computer": "computer",
    "computer/icons/flat-theme": LEFT_OUT,  # 845 of one grey frame
    "containers": "things",
    "education": "things",
    "electronics": "things",
    "food": "food",
    "office": "things",
    "people": "people",
    "plants": "plants",
    "recreation": "recreation",
    "science": "things",
    "signs_and_symbols": "signs",
    "signs_and_symbols/flags": "flags",
    "tools": "things",
    "transportation": "transportation",
    "transportation/roadsigns": "signs",
}  # without outlines of maps, 1,378 thin grey stars, patterns, ornaments, logos, three buttons and what is unsorted
ALIKE = 8  # of 255, the mean difference of pixels below which two pictures of a class are one


def make_clipart(folder, package=None):
    """Make a folder a class of small PNG images of the package's; where it is already, or cannot be made, ValueError.

    Links are left out, and pictures that are broken, larger than Pillow takes for safe, blank, or nearly the same as
    one before them in their class. How many of each is said. The folder is there as a whole or not at all.
    """
    folder, package = Path(folder), Path(package or PACKAGE)
    if folder.exists():
        raise ValueError(f"{folder}: already there, it is made once")
    if not package.is_dir():
        raise ValueError(f"clipart: neither {folder} nor {package} is there; get it by {GET['clipart']}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    counts, unfit = Counter(), []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        new, kept = Path(place) / folder.name, {}
        for path in bar(sorted(package.rglob("*.png")), "clip art", unit="pictures"):
            inside = path.relative_to(package)
            kind = next((CLASS_OF[str(part)] for part in inside.parents if str(part) in CLASS_OF), LEFT_OUT)
            if path.is_symlink() or kind == LEFT_OUT:
                counts["links" if path.is_symlink() else f"in {LEFT_OUT}"] += 1
                continue
            try:
                picture = drawn(path)
            except ValueError as error:
                unfit.append(str(error))
                continue
            pixels, seen = np.asarray(picture, np.int16), kept.setdefault(kind, [])
            if seen and np.abs(np.stack(seen) - pixels).mean((1, 2, 3)).min() < ALIKE:
                counts["nearly the same as another"] += 1
                continue
            seen.append(pixels)
            (new / kind).mkdir(parents=True, exist_ok=True)
            picture.save(new / kind / "-".join(inside.parts))
        if not kept:
            raise ValueError(f"{package}: holds no pictures in folders such as {', '.join(list(CLASS_OF)[:3])}")
        if not folder.exists():  # another process of the same run may have been first
            new.rename(folder)
    left = ", ".join(f"{n:,} {what}" for what, n in {**counts, "unfit": len(unfit)}.items())
    print(
        f"{folder}: {sum(map(len, kept.values())):,} pictures in {len(kept)} classes; left out: {left}", file=sys.stderr
    )
    for line in unfit:
        print(f"left out: {line}", file=sys.stderr)


def drawn(path):
    """What is drawn in a file, cut out of its white margin, made small and square with white.  -> PIL image, RGB

    Raises ValueError that names the file if it cannot be read, is larger than Pillow takes for safe, or blank.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = read_picture(path)
    box = ImageChops.invert(picture).getbbox()
    if box is None:
        raise ValueError(f"{path}: blank")
    picture = picture.crop(box)
    sides = [max(1, round(side * CLIPART_SIDE / max(picture.size))) for side in picture.size]
    small = picture.resize(sides, Image.Resampling.LANCZOS)
    return ImageOps.pad(small, (CLIPART_SIDE, CLIPART_SIDE), color="white")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the pictures of data set clipart of Debian's openclipart-png.")
    parser.add_argument("folder", nargs="?", default="data/clipart", help="a new folder, by default %(default)s")
    try:
        make_clipart(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"tinytwinflow: {error}\n")
