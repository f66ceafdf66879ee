"""Data that a user hands over: an array of rows, a DataLoader or any iterable of batches, or a function of the step.

Each becomes a `batches.DataSet` in float32 of about unit spread, but that an iterable deals in its own order, whatever
the step. Points are brought there column by column, images by one number for all pixels, bytes as -1 ... 1; samples go
back to the units and the type of what was given.
"""

from itertools import chain, count, islice

import numpy as np
import torch

from ..method.conditions import as_pair, join, take
from ..method.draws import seeded
from .batches import mine, rows_of_step

LOOKED_AT = 16  # batches of a stream from which its spread is measured


def as_data_set(data, batch_size=None, seed=0):
    """The data set that a user's data are; what is one already stays as it is. Raises ValueError for anything else.

    batch_size: of rows in memory; a stream has its own, and another is refused.
    """
    if hasattr(data, "batch") and hasattr(data, "fresh"):
        lacking = [name for name in ("shape", "classes", "scaling", "on_disk") if not hasattr(data, name)]
        if lacking:
            raise ValueError(f"a data set has {', '.join(lacking)} too, see data.batches.DataSet")
        return data
    if _is_array(data):
        return Table(data, batch_size, seed)
    if isinstance(data, tuple) and len(data) == 2 and _is_array(data[0]):
        return Table(data[0], batch_size, seed, labels=data[1])
    if callable(data) or hasattr(data, "__iter__"):
        stream = Stream(data)
        if batch_size not in (None, stream.batch_size):
            raise ValueError(f"the batches given have {stream.batch_size} rows, so batch_size cannot be {batch_size}")
        return stream
    raise ValueError(
        f"data is an array, a pair of arrays, an iterable, a function or a name, got {type(data).__name__}"
    )


def _is_array(x):
    return torch.is_tensor(x) or isinstance(x, np.ndarray)


def _tensor(x):
    """An array or tensor of samples, (n, D) or (n, C, H, W), as a tensor on the CPU."""
    if not _is_array(x) or x.ndim not in (2, 4) or 0 in x.shape:
        got = f"shape {tuple(x.shape)}" if _is_array(x) else type(x).__name__
        raise ValueError(f"samples are arrays (n, D) or (n, C, H, W), got {got}")
    if x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        raise ValueError(f"images are (n, C, H, W), got {tuple(x.shape)}: transpose them, x.transpose(0, 3, 1, 2)")
    kind = str(x.dtype)
    if not any(word in kind for word in ("float", "int")) or kind.startswith("complex"):
        raise ValueError(f"samples are real numbers, got {kind}")
    return x.detach().cpu() if torch.is_tensor(x) else torch.from_numpy(np.ascontiguousarray(x))


def _condition(y, n):
    """Labels or another condition of n samples, as tensors, and how many labels there are."""
    if y is None:
        return None, 0
    if isinstance(y, dict):
        return {name: _condition(value, n)[0] for name, value in y.items()}, 0
    if not torch.is_tensor(y):
        y = np.asarray(y)
        if y.dtype.kind not in "iufb":
            raise ValueError(f"labels are whole numbers, other conditions numbers, got {y.dtype}")
        y = torch.from_numpy(np.ascontiguousarray(y))
    y = y.detach().cpu()
    if len(y) != n:
        raise ValueError(f"there are {len(y)} labels for {n} samples")
    if y.ndim != 1 or y.is_floating_point():
        return y.float() if y.is_floating_point() else y, 0
    y = y.long()
    if y.min() < 0:
        raise ValueError(f"labels are whole numbers from 0 on, got {y.min()}")
    return y, int(y.max()) + 1


class Scaled:
    """What all have in common: a standardisation, and the type that samples go back to."""

    on_disk = False

    def measure(self, x, like):
        """Take shape, mean, spread and type from samples. Raises ValueError if one is not finite or never changes."""
        self.shape, whole = tuple(x.shape[1:]), x.double()
        if not whole.isfinite().all():
            raise ValueError(f"row {int((~whole.isfinite().flatten(1).all(1)).nonzero()[0])} holds NaN or infinity")
        if x.dtype == torch.uint8 and x.ndim == 4:
            self.mean = self.std = torch.tensor(127.5, dtype=torch.float64)
        else:
            self.mean, self.std = (whole.mean(0), whole.std(0)) if x.ndim == 2 else (whole.mean(), whole.std())
        if (self.std == 0).any():
            raise ValueError(f"column {int((self.std == 0).flatten().nonzero()[0])} is constant")
        self.units = ["torch" if torch.is_tensor(like) else "numpy", str(like.dtype).removeprefix("torch.")]

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"mean": self.mean, "std": self.std, "units": self.units}

    def standardise(self, x):
        """From the units of the data to spread one, float32."""
        return ((x.double() - self.mean) / self.std).float()


class Table(Scaled):
    """Rows held in memory, (n, D) or (n, C, H, W), shuffled once an epoch, batches running on over its end.

    labels: (n,) whole numbers from 0 on, or another condition of n rows. part = (rank, size): of each batch, one
    process's rows.
    """

    def __init__(self, x, batch_size, seed=0, part=(0, 1), labels=None):
        table = _tensor(x)
        if len(table) < 2:
            raise ValueError(f"needs at least 2 samples, got {len(table)}")
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self.labels, self.classes = _condition(labels, len(table))
        self.measure(table, x)
        self.table = self.standardise(table)

    def batch(self, step):
        """Samples (batch_size, *D) and their condition or None of one step."""
        rows = mine(rows_of_step(len(self.table), self.batch_size, step, self.seed), self.part)
        return self.table[rows], take(self.labels, rows)

    def fresh(self, n, draw=0):
        """n samples to measure against; draws 0 and 1 are disjoint halves. Of points some come twice where the half is
        smaller than n, of images fewer come."""
        half = torch.randperm(len(self.table), generator=seeded(self.seed, 1))[draw % 2 :: 2]
        few = half[: min(n, len(self.table) // 2)]
        rows = few if self.table.ndim == 4 else half[torch.arange(n) % len(half)]
        return self.table[rows], take(self.labels, rows)


class Stream(Scaled):
    """Batches x or (x, condition) of an iterable, which is gone through again and again, or of a function of the step.

    Mean, spread and the number of labels are those of the first few batches. An iterable deals in its own order: a run
    on it goes on with what comes next.
    """

    def __init__(self, source):
        self.source, self.of_step = source, callable(source) and not hasattr(source, "__iter__")
        self.again = self.of_step or iter(source) is not source
        self.kept = [as_pair(item) for item in islice(self._from_the_start(), LOOKED_AT)]
        if not self.kept:
            raise ValueError("the iterable of batches is empty")
        self.measure(torch.cat([_tensor(x) for x, _ in self.kept]), self.kept[0][0])
        self.classes = max(_condition(y, len(x))[1] for x, y in self.kept)
        self.batch_size, self.left, self.seen = len(self.kept[0][0]), None, None

    def _from_the_start(self):
        return map(self.source, count()) if self.of_step else iter(self.source)

    def batch(self, step):
        """The next batch of an iterable, or that of a step."""
        if self.of_step:
            x, y = as_pair(self.source(step))
        else:
            x, y = next(self._left(), (None, None))
            if x is None and self.again:
                self.left = None
                x, y = next(self._left())
            if x is None:
                raise ValueError(f"the iterable ended before step {step + 1}: give one that can be gone through again")
        x = _tensor(x)
        if x.shape[1:] != self.shape:
            raise ValueError(f"step {step + 1}: samples of shape {tuple(x.shape[1:])}, the first had {self.shape}")
        cond, labels = _condition(y, len(x))
        if labels > self.classes > 0:
            raise ValueError(
                f"step {step + 1}: label {labels - 1}, but in the first batches they ended with {self.classes - 1}"
            )
        return self.standardise(x), cond

    def _left(self):
        if self.left is None:
            self.left = map(as_pair, self.source) if self.again else chain(self.kept, map(as_pair, self.source))
        return self.left

    def fresh(self, n, draw=0):
        """Up to n samples to measure against, every second of the first 2 n: draws 0 and 1 share none."""
        if self.seen is None or len(self.seen[0]) < 2 * n and self.again:
            xs, ys, enough = [], [], sum(len(x) for x, _ in self.kept) >= 2 * n
            for x, y in self.kept if enough or not self.again else map(as_pair, self._from_the_start()):
                xs.append(self.standardise(_tensor(x)))
                ys.append(_condition(y, len(x))[0])
                if sum(map(len, xs)) >= 2 * n:
                    break
            self.seen = torch.cat(xs), join(*ys)
        rows = torch.arange(draw % 2, min(2 * n, len(self.seen[0])), 2)
        return self.seen[0][rows], take(self.seen[1], rows)


def in_units(x, about):
    """Samples as the data were: units and type from what a checkpoint says of the data.  (n, *D) -> tensor or array

    Latents stay as they are; images of files become bytes. Whole numbers are rounded, bytes kept in 0 ... 255.
    """
    if "scale" in about:  # latents
        return x
    if about.get("mean") is not None:
        x = x.double() * about["std"].double().to(x.device) + about["mean"].double().to(x.device)
    elif x.ndim == 4:
        x, about = (x + 1) * 127.5, {"units": ["torch", "uint8"]}
    kind, dtype = about.get("units", ["torch", "float32"])
    if "int" in dtype:
        limits = np.iinfo(dtype)
        x = x.round().clamp(limits.min, limits.max)
    return x.numpy().astype(dtype) if kind == "numpy" else x.to(getattr(torch, dtype))
