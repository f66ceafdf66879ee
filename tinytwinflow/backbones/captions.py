"""Captions: prompts as they are written, in lines, records or files, and images with captions beside them."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import functional as tv

from ..data.readers import Folder, hidden, read_picture, refuse_small
from ..files import damage_named

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SOURCES = "source"  # the folder, inside that of the images, of the pictures to edit
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9)  # of the sides of buckets, which lie or stand, the commonest first


def _text(path):
    """What a text file says. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text") from error


def _seen(folder):
    """The files of a folder by name, but hidden ones."""
    return sorted(file for file in folder.iterdir() if not hidden(file.name))


def _pictures(files):
    return [file for file in files if file.suffix.lower() in PICTURES]


def read_prompts(path):
    """Prompts from a .txt (one a line), a .jsonl (key "prompt") or a folder of NAME.txt (one each), hidden ones aside.

    -> list of dicts with the key "prompt", all other keys of the line, and from a folder "name". Blank lines at the end
    do not count. Raises ValueError that names the line if another is empty or no such thing.
    """
    path, records = Path(path), []
    if path.is_dir():
        files = [file for file in _seen(path) if file.suffix.lower() == ".txt"]
        places, records = files, [{"prompt": _text(file).strip(), "name": file.stem} for file in files]
    elif path.suffix.lower() in (".txt", ".jsonl") and path.is_file():
        text = _text(path)
        lines = text.rstrip().split("\n") if text.strip() else []  # splitlines() would cut a prompt at U+2028
        places = [f"{path}, line {i}" for i in range(1, len(lines) + 1)]
        for place, line in zip(places, lines):
            try:
                records.append(json.loads(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()})
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: no JSON") from error
    elif path.exists():
        raise ValueError(f"{path}: prompts are read from .txt, .jsonl or a folder of .txt")
    else:
        raise ValueError(f"{path}: no such .txt, .jsonl or folder of .txt")
    for place, record in zip(places, records):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{place}: no prompt")
    if not records:
        raise ValueError(f"{path}: holds no prompts")
    return records


def bucket_sides(size, count=1, unit=1):
    """Widths and heights of pictures, a square, of 4:3, 3:4 and so on: multiples of unit, about size^2 pixels each.

    Raises ValueError if size or count do not fit.

    >>> bucket_sides(512, 3, 16)
    [(512, 512), (592, 448), (448, 592)]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if size % unit:
        raise ValueError(f"size must be a multiple of {unit} for this pipeline, got {size}")
    known = range(1, 2 * len(RATIOS), 2)
    if count not in known:
        raise ValueError(f"buckets must be one of {', '.join(map(str, known))}, got {count}")
    lying = [tuple(unit * round(size * ratio**k / unit) for k in (0.5, -0.5)) for ratio in RATIOS[: count // 2 + 1]]
    sides = list(dict.fromkeys(side for one in lying for side in (one, one[::-1])))
    if len(sides) < count:
        raise ValueError(f"size {size} is too small for {count} buckets of sides that are multiples of {unit}")
    return sides


def _upright(path):
    """Width and height of a picture, turned as `read_picture` turns it."""
    with damage_named(path, "cut short, or not an image"), Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


class Pairs(Folder):
    """A folder of images NAME.png (or .jpg, .jpeg, .webp), and beside each its caption, NAME.txt.

    Hidden files do not count. Read as a `Folder` is, with a caption, `prompts`, in place of a class, and made as small
    as the one of `sides` (width, height) whose ratio is nearest, by default a square: `buckets` says which rows have
    which, the most frequent first. Rows that are read together must be of one.

    To learn edits a picture to edit, source/NAME.png, belongs to each: NAME.txt says what is to be done to it, and
    NAME.png is what has become of it, or there is none of these at all, for training without data. It is read in the
    size of that image, or as its own ratio asks. Raises ValueError if one is without the others, a caption is empty, or
    an image is smaller than it is to be.
    """

    def __init__(self, folder, size, sides=None):
        files, source = _seen(Path(folder)) if Path(folder).is_dir() else [], Path(folder) / SOURCES
        paths, captions = _pictures(files), [file for file in files if file.suffix.lower() == ".txt"]
        sources = _pictures(_seen(source)) if source.is_dir() else []
        if not sources and (source.is_dir() or not paths):
            raise ValueError(f"{source if source.is_dir() else folder}: holds no images ({', '.join(PICTURES)})")
        parts = {"image": paths, f"picture to edit, {SOURCES}/NAME.png": sources, "caption, NAME.txt": captions}
        named = {what: Counter(file.stem for file in part) for what, part in parts.items() if part or part is captions}
        odd = [name for name in set().union(*named.values()) if any(part[name] != 1 for part in named.values())]
        if odd:
            wanted = " and ".join(f"one {what}" for what in named)
            raise ValueError(f"{folder}: needs {wanted}, of each name, {min(odd)} has not")
        said = {file.stem: _text(file).strip() for file in captions}
        for file in captions:
            if not said[file.stem]:
                raise ValueError(f"{file}: no prompt")
        sides, self.wanted = sides or bucket_sides(size), []
        self.paths, edited = paths, {file.stem: file for file in sources}
        self.sources = [edited[path.stem] for path in paths or sources] if sources else []
        for path in paths or sources:  # all, before hours of encoding
            width, height = _upright(path)
            self.wanted.append(min(sides, key=lambda side: abs(math.log(width / height * side[1] / side[0]))))
            refuse_small(path, (width, height), self.wanted[-1])
        for path, wanted in zip(self.sources, self.wanted):
            refuse_small(path, _upright(path), wanted)
        rows = {side: [row for row, wanted in enumerate(self.wanted) if wanted == side] for side in sides}
        most = sorted(filter(rows.get, rows), key=lambda side: -len(rows[side]))
        self.buckets = {side: torch.tensor(rows[side]) for side in most}
        self.prompts = [said[path.stem] for path in paths or sources]
        self.labels = torch.arange(len(self.prompts))
        self.folder, self.size, self.shape, self.pool = folder, size, (3, size, size), ThreadPoolExecutor()

    def __len__(self):
        return len(self.prompts)

    def to_edit(self, rows):
        """The pictures to edit of some rows, cut as their images are.  -> list of PIL images"""
        return list(self.pool.map(lambda row: self._cut(self.sources[row], row), rows.tolist()))

    def _cut(self, path, row):
        image = read_picture(path)
        refuse_small(path, image.size, self.wanted[row])
        return ImageOps.fit(image, self.wanted[row])

    def _one(self, row):
        return tv.pil_to_tensor(self._cut(self.paths[row], row))
