"""Images in files: Fashion-MNIST, MNIST and CIFAR-10 in their own formats, clip art, and any folder of images.

Each is a table of rows that is read a few rows at a time: pixels in [-1, 1], and labels.
"""

import gzip
import io
import math
import os
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as tv

from .batches import mark_of, spread

DEBIAN = {"fashion": "/usr/share/datasets/fashion-mnist"}
GET = {
    "fashion": "apt install dataset-fashion-mnist, or torchvision.datasets.FashionMNIST({0!r}, download=True)",
    "mnist": "torchvision.datasets.MNIST({0!r}, download=True)",
    "cifar10": "torchvision.datasets.CIFAR10({0!r}, download=True)",
    "clipart": "apt install openclipart-png",
}
IMAGE_SETS = tuple(GET)
CLIPART_SIDE = 32  # pixels
READ = f"{', '.join(IMG_EXTENSIONS)} are read"


def to_unit(pixels):
    """Bytes 0..255 to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read_idx(path):
    """Read a file of the MNIST format, plain or .gz.  -> uint8 tensor. Raises ValueError if it is another."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cut short or not gzip") from error
    axes = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if not axes or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path}: not a whole idx file of bytes")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).copy()).view(*shape)


def _find(name, folder, roots, files):
    """Paths of files, plain or .gz, that lie together in one of several folders; a ValueError says where we looked."""
    for root in roots:
        found = {file: [p for p in (root / f"{file}.gz", root / file) if p.is_file()] for file in files}
        if all(found.values()):
            return [paths[0] for paths in found.values()]
        if any(found.values()):
            missing = next(file for file, paths in found.items() if not paths)
            raise ValueError(f"{name}: {root / missing} is missing, next to others of the set")
    looked = ", ".join(str(root / files[0]) for root in roots)
    raise ValueError(f"{name}: none of {looked} or their .gz is there; get it by {GET[name].format(str(folder))}")


def _mnist(name, folder, train):
    raw = folder / {"fashion": "FashionMNIST", "mnist": "MNIST"}[name] / "raw"
    roots = [folder, raw, *([Path(DEBIAN[name])] if name in DEBIAN else [])]
    kinds = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths = _find(name, folder, roots, kinds)
    pixels, labels = map(read_idx, paths[:2] if train else paths[2:])
    return pixels[:, None], labels.long(), 10


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain data; a pickle that names anything else, which it could run, is refused."""

    def find_class(self, module, name):
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _cifar10(name, folder, train):
    parts, pixels, labels = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], [], []
    paths = _find(name, folder, [folder / "cifar-10-batches-py", folder], parts)
    for path in paths[:5] if train else paths[5:]:
        try:
            content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            pixels.append(torch.from_numpy(np.asarray(content[b"data"], np.uint8)).view(-1, 3, 32, 32))
            labels.append(torch.tensor(content[b"labels"]).long())
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise ValueError(f"{path}: cut short, or no CIFAR-10 batch") from error
    return torch.cat(pixels), torch.cat(labels), 10


def _clipart(name, folder, train):
    """Its folder, see `clipart`; every fifth picture is of the test part."""
    paths, labels, classes = find_pictures(folder / name)
    rows = [row for row in range(len(paths)) if (row % 5 != 4) == train]
    pictures = [read_picture(paths[row]) for row in rows]
    for row, picture in zip(rows, pictures):
        if picture.size != (CLIPART_SIDE, CLIPART_SIDE):
            raise ValueError(f"{paths[row]}: not {CLIPART_SIDE} x {CLIPART_SIDE} pixels, so not of this set")
    return torch.stack(list(map(tv.pil_to_tensor, pictures))), torch.tensor(labels)[rows], classes


_READ = {"fashion": _mnist, "mnist": _mnist, "cifar10": _cifar10, "clipart": _clipart}


class Pixels:
    """Images held in memory, made smaller where asked.  pixels uint8 (n, C, H, W), labels (n,)."""

    def __init__(self, name, folder, size, train=True):
        self.pixels, self.labels, self.classes = _READ[name](name, Path(folder), train)
        self.count, some = len(self.pixels), spread(len(self.pixels), 64)
        self.mark = mark_of(self.pixels[some], self.labels)
        native = self.pixels.shape[-1]
        if size > native:
            raise ValueError(f"size must be at most {native} for {name}, got {size}")
        if size < native:
            self.pixels = tv.resize(self.pixels, [size, size], antialias=True)
        if len(self.pixels) != len(self.labels) or not len(self.labels):
            raise ValueError(f"{name}: {len(self.pixels)} images but {len(self.labels)} labels")
        self.shape = tuple(self.pixels.shape[1:])
        if not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ValueError(f"{name}: labels must lie in [0, {self.classes - 1}], got up to {self.labels.max()}")

    def __len__(self):
        return len(self.labels)

    def read(self, rows, generator):
        return to_unit(self.pixels[rows]), self.labels[rows]


def read_picture(path):
    """A picture in a file as upright RGB of 8 bits.  -> PIL image

    It is turned as its EXIF orientation says, and what is transparent lies on white. Grey of 16 bits, also in integers
    of 32, becomes v / 257, grey in floats from 0 to 1 becomes 255 v; of colours of 16 bits Pillow keeps the upper 8.
    Raises ValueError that names the file if it is cut short, no image, or its numbers lie elsewhere.
    """
    raw = io.BytesIO(Path(path).read_bytes())  # of a file by name, Pillow maps a TIFF on its side with wrong rows
    try:
        with Image.open(raw) as image:
            other_depth = image.format == "PNG" and image.mode in ("L", "RGB") and image.tile[0][3] != image.mode
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise ValueError(f"{path}: cut short, or not an image") from error
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(path, image).convert("RGB")
    if other_depth and "transparency" in image.info:  # Pillow compares it with levels that it has brought to 8 bits
        raise ValueError(f"{path}: a transparent colour is read in PNG of 8 bits, others need an alpha channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def refuse_small(path, sides, wanted):
    """Raise ValueError if a picture is smaller than what is to be cut of it.  sides, wanted: width, height"""
    if sides[0] < wanted[0] or sides[1] < wanted[1]:
        raise ValueError(f"{path}: {sides[0]} x {sides[1]} pixels, smaller than {wanted[0]} x {wanted[1]}")


def _grey(path, image):
    """Grey of 16 bits or of floats as grey of 8 bits."""
    pixels, top = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
    low, high = pixels.min(), pixels.max()
    if not 0 <= low <= high <= top:  # nor is NaN
        raise ValueError(f"{path}: its pixels must lie in 0 ... {top}, as {image.mode} they are {low:g} ... {high:g}")
    pixels[pixels == image.info.get("transparency")] = top
    return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))


def find_pictures(folder):
    """The pictures in a folder, or in its folders, a folder a class, by name.  -> paths, labels, number of classes

    Hidden files and folders, and __MACOSX, do not count. Raises ValueError if there are none, in a class or at all, or
    anything else is there.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    there = sorted(entry for entry in Path(folder).iterdir() if not hidden(entry.name))
    classes = [entry for entry in there if entry.is_dir()]
    loose = [str(entry) for entry in there if entry not in classes]
    parts = [_files_in(entry) for entry in classes] or [loose]
    for place, part in zip(classes or [folder], parts):
        if not any(map(_is_picture, part)):
            raise ValueError(
                f"{place}: holds no images; it needs images, or a folder for each class with images in it; {READ}"
            )
    paths = [path for part in parts for path in part]
    odd = [*(loose if classes else []), *(path for path in paths if not _is_picture(path))]
    if odd:
        raise ValueError(f"{odd[0]}: not an image{' in a folder of a class' if classes else ''}; {READ}")
    return paths, [label for label, part in enumerate(parts) for _ in part], len(classes)


def hidden(name):
    """Whether a file or a folder of this name does not count."""
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(path):
    return path.lower().endswith(IMG_EXTENSIONS)


def _files_in(folder):
    """All files in a folder and the folders inside, but hidden ones."""
    walk = sorted(os.walk(folder, followlinks=True))
    seen = [(here, names) for here, _, names in walk if not any(map(hidden, Path(here).relative_to(folder).parts))]
    return [os.path.join(here, name) for here, names in seen for name in sorted(names) if not hidden(name)]


class Folder:
    """Images in a folder a class, or all in one folder without classes, read from disk by `read_picture`, their middle
    square made size x size.

    Raises ValueError if the folder is missing, holds no images, or anything that is no image.
    """

    def __init__(self, folder, size):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.paths, labels, self.classes = find_pictures(folder)
        self.labels = torch.tensor(labels)
        self.folder, self.size, self.shape, self.pool = folder, size, (3, size, size), ThreadPoolExecutor()
        names = [os.path.relpath(path, folder) for path in self.paths]
        sizes = [str(os.path.getsize(self.paths[row])) for row in spread(len(names))]
        read = [Path(self.paths[row]).read_bytes() for row in spread(len(names), 16)]
        self.count, self.mark = len(names), mark_of(*names, *sizes, *read)

    def __len__(self):
        return len(self.paths)

    def _one(self, row):
        path = self.paths[row]
        image = read_picture(path)
        refuse_small(path, image.size, (self.size, self.size))
        return tv.pil_to_tensor(tv.center_crop(tv.resize(image, self.size, antialias=True), self.size))

    def read(self, rows, generator):
        return to_unit(torch.stack(list(self.pool.map(self._one, rows.tolist())))), self.labels[rows]
