"""Image sets: Fashion-MNIST, MNIST, CIFAR-10, any folder of images in a folder a class, and folders of latents.

Each is a table of rows that is read a few rows at a time: pixels in [-1, 1] or latents, and labels. `Images`
deals the rows out to training steps.
"""

import gzip
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as tv

from . import latents
from .data import seeded

DEBIAN = {"fashion": "/usr/share/datasets/fashion-mnist"}
GET = {
    "fashion": "apt install dataset-fashion-mnist, or torchvision.datasets.FashionMNIST({0!r}, download=True)",
    "mnist": "torchvision.datasets.MNIST({0!r}, download=True)",
    "cifar10": "torchvision.datasets.CIFAR10({0!r}, download=True)",
}
NAMES = tuple(GET)


def to_unit(pixels):
    """Bytes 0..255 to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(x):
    """Floats to bytes, [-1, 1] to 0..255; what lies outside is cut off, as every display does."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_idx(path):
    """Read a file of the MNIST format, plain or .gz.  -> uint8 tensor. Raises ValueError if it is another."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        raise ValueError(f"{path}: cut short or not gzip") from None
    axes = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if not axes or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path}: not a whole idx file of bytes")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).copy()).view(*shape)


def _find(name, folder, places):
    """The first of several files that exists; a ValueError that says where we looked and how to get it."""
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(map(str, places))
    raise ValueError(f"{name}: none of {looked} is there; get it by {GET[name].format(str(folder))}")


def _mnist(name, folder, train):
    part, names = ("train" if train else "t10k"), {"fashion": "FashionMNIST", "mnist": "MNIST"}
    roots = [folder, folder / names[name] / "raw", *map(Path, [DEBIAN[name]] if name in DEBIAN else [])]
    pixels, labels = (
        read_idx(_find(name, folder, [root / f"{part}-{kind}-ubyte{end}" for root in roots for end in (".gz", "")]))
        for kind in ("images-idx3", "labels-idx1")
    )
    return pixels[:, None], labels.long()


def _cifar10(name, folder, train):
    pixels, labels = [], []
    for part in [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]:
        path = _find(name, folder, [folder / "cifar-10-batches-py" / part, folder / part])
        try:
            content = pickle.loads(path.read_bytes(), encoding="bytes")
            pixels.append(torch.from_numpy(np.asarray(content[b"data"], np.uint8)).view(-1, 3, 32, 32))
            labels += content[b"labels"]
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError):
            raise ValueError(f"{path}: cut short, or no CIFAR-10 batch") from None
    return torch.cat(pixels), torch.tensor(labels)


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
    """Images in a folder a class, read from disk as RGB, their middle square made size x size.

    Raises ValueError if the folder is missing, holds no images, or anything that is no image.
    """

    def __init__(self, folder, size):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
        try:
            found = ImageFolder(folder)
        except FileNotFoundError:
            raise ValueError(f"{folder}: needs a folder for each class with images in it") from None
        self.paths, labels = zip(*found.samples)
        known = set(self.paths)
        for here, _, files in os.walk(folder):
            for name in files:
                if os.path.join(here, name) not in known and not name.startswith("."):
                    raise ValueError(f"{os.path.join(here, name)}: not an image in a folder of a class")
        self.labels, self.classes = torch.tensor(labels), len(found.classes)
        self.folder, self.size, self.shape, self.pool = folder, size, (3, size, size), ThreadPoolExecutor()

    def __len__(self):
        return len(self.paths)

    def _one(self, row):
        path = self.paths[row]
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (UnidentifiedImageError, OSError):
            raise ValueError(f"{path}: cut short, or not an image") from None
        if min(image.size) < self.size:
            raise ValueError(f"{path}: {image.width} x {image.height} pixels, smaller than size {self.size}")
        return tv.pil_to_tensor(tv.center_crop(tv.resize(image, self.size, antialias=True), self.size))

    def read(self, rows, generator):
        return to_unit(torch.stack(list(self.pool.map(self._one, rows.tolist())))), self.labels[rows]


@lru_cache(maxsize=2)
def _shuffled(n, seed, epoch):
    return torch.randperm(n, generator=seeded(seed, 0, epoch))


class Images:
    """Training data as a function of the step: batch(i) is the same whenever and wherever it is asked.

    data: a name, a folder of images or one of latents; `size` as trained on, `flip` mirrors half of
    the images at random, `subset` > 0 keeps the first so many of each class, for a machine without a GPU.
    Rows are shuffled once an epoch and cut into batches that run on over its end, so the position in
    the data is the step. Raises ValueError, in one line, for data that is missing or does not fit.
    """

    def __init__(self, data, batch_size, seed=0, folder="data", size=32, flip=False, subset=0):
        self.name, self.batch_size, self.seed, self.flip = data, batch_size, seed, flip
        self.latents = latents.is_latents(data)
        if self.latents:
            self.train = self.test = latents.Latents(data, mirrored=flip)
        elif data in NAMES:
            self.train, self.test = Pixels(data, folder, size), Pixels(data, folder, size, train=False)
        elif Path(data).is_dir():
            self.train = self.test = Folder(data, size)
        else:
            raise ValueError(
                f"{data}: no such folder; data is one of {', '.join(NAMES)}, a folder with a folder of images "
                "for each class, or one of latents, made by `python -m tinytwinflow encode`"
            )
        self.on_disk = data not in NAMES
        self.shape, self.classes = self.train.shape, self.train.classes
        if self.shape[-1] != size:
            raise ValueError(f"{data}: size is {self.shape[-1]} there, not {size}: --set size={self.shape[-1]}")
        self.rows = torch.arange(len(self.train))
        if subset:
            of_class = [(self.train.labels == label).nonzero()[:subset, 0] for label in range(self.classes)]
            self.rows = torch.cat(of_class)

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"scale": self.train.scale, "shift": self.train.shift} if self.latents else {}

    def batch(self, step):
        """Images (batch_size, C, H, W) and labels (batch_size,) of one step."""
        n, index = len(self.rows), torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = index.div(n, rounding_mode="floor")
        rows = torch.cat([_shuffled(n, self.seed, e)[index[epochs == e] % n] for e in epochs.unique().tolist()])
        generator = seeded(self.seed, 2, step)
        x, label = self.train.read(self.rows[rows], generator)
        if self.flip and not self.latents:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, label

    def fresh(self, n, draw=0):
        """n real images with labels to measure against: draw 0 from the test part, 1 from the training part.

        A folder has no test part: both are drawn from it, as disjoint halves. Fewer than n come back
        where a part has fewer.
        """
        generator = seeded(self.seed, 1, draw)
        if self.train is self.test:
            rows = torch.randperm(len(self.rows), generator=seeded(self.seed, 1))[draw % 2 :: 2][:n]
            return self.train.read(self.rows[rows], generator)
        if draw == 0:
            return self.test.read(torch.randperm(len(self.test), generator=generator)[:n], generator)
        return self.train.read(self.rows[torch.randperm(len(self.rows), generator=generator)[:n]], generator)
