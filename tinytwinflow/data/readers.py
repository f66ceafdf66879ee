"""Images in files: Fashion-MNIST, MNIST and CIFAR-10 in their own formats, and any folder of images.

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
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as tv

DEBIAN = {"fashion": "/usr/share/datasets/fashion-mnist"}
GET = {
    "fashion": "apt install dataset-fashion-mnist, or torchvision.datasets.FashionMNIST({0!r}, download=True)",
    "mnist": "torchvision.datasets.MNIST({0!r}, download=True)",
    "cifar10": "torchvision.datasets.CIFAR10({0!r}, download=True)",
}
IMAGE_SETS = tuple(GET)


def to_unit(pixels):
    """Bytes 0..255 to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read_idx(path):
    """Read a file of the MNIST format, plain or .gz.  -> uint8 tensor. Raises ValueError if it is another."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{path}: cut short or not gzip") from None
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
    return pixels[:, None], labels.long()


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
        except Exception:  # whatever a damaged file makes the reader raise
            raise ValueError(f"{path}: cut short, or no CIFAR-10 batch") from None
    return torch.cat(pixels), torch.cat(labels)


class Pixels:
    """Images held in memory, made smaller where asked.  pixels uint8 (n, C, H, W), labels (n,)."""

    def __init__(self, name, folder, size, train=True):
        self.pixels, self.labels = (_cifar10 if name == "cifar10" else _mnist)(name, Path(folder), train)
        native = self.pixels.shape[-1]
        if size > native:
            raise ValueError(f"size must be at most {native} for {name}, got {size}")
        if size < native:
            self.pixels = tv.resize(self.pixels, [size, size], antialias=True)
        if len(self.pixels) != len(self.labels) or not len(self.labels):
            raise ValueError(f"{name}: {len(self.pixels)} images but {len(self.labels)} labels")
        self.shape, self.classes = tuple(self.pixels.shape[1:]), 10
        if not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ValueError(f"{name}: labels must lie in [0, {self.classes - 1}], got up to {self.labels.max()}")

    def __len__(self):
        return len(self.labels)

    def read(self, rows, generator):
        return to_unit(self.pixels[rows]), self.labels[rows]


class Folder:
    """Images in a folder a class, or all in one folder without classes, read from disk as RGB, their middle square made
    size x size.

    Raises ValueError if the folder is missing, holds no images, or anything that is no image.
    """

    def __init__(self, folder, size):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
        there = sorted(entry for entry in Path(folder).iterdir() if not entry.name.startswith("."))
        flat = any(entry.suffix.lower() in IMG_EXTENSIONS for entry in there) and all(map(Path.is_file, there))
        if flat:
            odd = next((entry for entry in there if entry.suffix.lower() not in IMG_EXTENSIONS), None)
            if odd is not None:
                raise ValueError(f"{odd}: not an image")
            self.paths, labels, self.classes = [str(entry) for entry in there], [0] * len(there), 0
        else:
            self.paths, labels, self.classes = self._in_classes(folder)
        self.labels = torch.tensor(labels)
        self.folder, self.size, self.shape, self.pool = folder, size, (3, size, size), ThreadPoolExecutor()

    @staticmethod
    def _in_classes(folder):
        try:
            found = ImageFolder(folder)
        except FileNotFoundError:
            raise ValueError(f"{folder}: needs images, or a folder for each class with images in it") from None
        paths, labels = zip(*found.samples)
        known = set(paths)
        for here, _, files in os.walk(folder):
            for name in files:
                if os.path.join(here, name) not in known and not name.startswith("."):
                    raise ValueError(f"{os.path.join(here, name)}: not an image in a folder of a class")
        return paths, labels, len(found.classes)

    def __len__(self):
        return len(self.paths)

    def _one(self, row):
        path = self.paths[row]
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception:  # whatever a damaged file makes the reader raise
            raise ValueError(f"{path}: cut short, or not an image") from None
        if min(image.size) < self.size:
            raise ValueError(f"{path}: {image.width} x {image.height} pixels, smaller than size {self.size}")
        return tv.pil_to_tensor(tv.center_crop(tv.resize(image, self.size, antialias=True), self.size))

    def read(self, rows, generator):
        return to_unit(torch.stack(list(self.pool.map(self._one, rows.tolist())))), self.labels[rows]
