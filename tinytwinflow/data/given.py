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
from .batches import half_of, kept_apart, mark_of, mine, rows_of_step, spread

LOOKED_AT = 16  # batches of a stream from which its spread is measured
FEWEST = 6  # rows in each half of those that are held out: more than the five neighbours that are looked for


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
    return _real(x, "samples are real numbers")


def _real(x, what, kinds="iuf"):
    """An array or tensor as a tensor on the CPU. Raises ValueError unless its numbers are of some kinds of numpy's."""
    if np.ma.is_masked(x):
        raise ValueError(f"{what}, some are masked")
    if torch.is_tensor(x) and x.layout != torch.strided:
        raise ValueError(f"{what} in a dense tensor, got {x.layout}: x.to_dense() is one")
    if torch.is_tensor(x):
        fits = not (x.is_complex() or x.is_quantized or x.dtype == torch.bool and "b" not in kinds)
    else:
        fits = x.dtype.kind in kinds and x.dtype.itemsize <= 8
    if not fits:
        raise ValueError(f"{what} of at most 64 bits, got {x.dtype}")
    if torch.is_tensor(x):
        return x.detach().cpu()
    return torch.from_numpy(np.ascontiguousarray(x, x.dtype.newbyteorder("=")))


def _condition(y, n):
    """Labels or another condition of n samples, as tensors, and how many labels there are."""
    if y is None:
        return None, 0
    if isinstance(y, dict):
        return {name: _condition(value, n)[0] for name, value in y.items()}, 0
    y = _real(y if _is_array(y) else np.asarray(y), "labels are whole numbers, other conditions numbers", "iufb")
    if len(y) != n:
        raise ValueError(f"there are {len(y)} labels for {n} samples")
    if y.ndim != 1 or y.is_floating_point():
        return y.float() if y.is_floating_point() else y, 0
    y = y.long()
    if y.min() < 0:
        raise ValueError(f"labels are whole numbers from 0 on, got {y.min()}")
    return y, int(y.max()) + 1


def _double(x):
    """Samples in float64. Raises ValueError for whole numbers that it does not tell apart."""
    whole = x.double()
    if x.dtype in (torch.int64, torch.uint64) and (whole.abs() >= 2**53).any():
        raise ValueError("whole numbers must lie between -2^53 and 2^53 to be told apart: subtract a constant first")
    return whole


class Scaled:
    """What all have in common: a standardisation, and the type that samples go back to."""

    on_disk, held_out = False, False

    def measure(self, x, like):
        """Take shape, mean, spread and type from samples.

        Raises ValueError if one is not finite, or beyond 2^53 as a whole number, or a spread is below the rounding of
        the numbers or beyond float64.
        """
        self.shape, whole = tuple(x.shape[1:]), _double(x)
        if not whole.isfinite().all():
            raise ValueError(f"row {int((~whole.isfinite().flatten(1).all(1)).nonzero()[0])} holds NaN or infinity")
        if x.dtype == torch.uint8 and x.ndim == 4:
            self.mean = self.std = torch.tensor(127.5, dtype=torch.float64)
        else:
            self.mean, self.std = (whole.mean(0), whole.std(0)) if x.ndim == 2 else (whole.mean(), whole.std())
        kind = x.dtype if x.dtype.is_floating_point else torch.float64
        finest = max(torch.finfo(kind).eps / 2, torch.finfo(torch.float64).eps)  # the mean is rounded, too
        rounding = finest * (whole.abs().amax(0) if x.ndim == 2 else whole.abs().max())
        for fits, fault in (
            (self.std.isfinite(), "spreads too far: its squares are beyond float64"),
            (self.std > rounding, f"is constant, as far as {str(kind)[6:]} tells"),
        ):
            if not fits.all():
                raise ValueError(f"column {int((~fits).flatten().nonzero()[0])} {fault}")
        self.units = ["torch", str(like.dtype)[6:]] if torch.is_tensor(like) else ["numpy", like.dtype.name]

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"mean": self.mean, "std": self.std, "units": self.units}

    def standardise(self, x):
        """From the units of the data to spread one, float32."""
        return ((_double(x) - self.mean) / self.std).float()


class Table(Scaled):
    """Rows held in memory, (n, D) or (n, C, H, W), shuffled once an epoch, batches running on over its end.

    One in twenty is held out, to be measured against, from 240 rows on, with many classes from more. Of fewer, or where
    a class would not be trained on, all are trained on, and measured against. labels: (n,) whole numbers from 0 on
    without gaps, or another condition of n rows. part = (rank, size): of each batch, one process's rows.
    """

    def __init__(self, x, batch_size, seed=0, part=(0, 1), labels=None):
        table = _tensor(x)
        if len(table) < 4:
            raise ValueError(f"needs at least 4 samples, got {len(table)}")
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self.labels, self.classes = _condition(labels, len(table))
        self._refuse_gaps()
        self.measure(table, x)
        self.table = self.standardise(table)
        some = spread(len(table))
        told = take(self.labels, some) if isinstance(self.labels, dict) else {"label": self.labels}
        self.count = len(table)
        self.mark = mark_of(table[some].double(), *(told[name] for name in sorted(told) if told[name] is not None))
        self.rows = self.apart = torch.arange(len(table))
        apart = kept_apart(len(table), drawn=True)
        self.held_out = int(apart.sum()) // 2 >= max(FEWEST, self.classes + 1)  # so that two are of one class
        if self.classes:  # and none is never trained on
            self.held_out &= len(self.labels[~apart].unique()) == len(self.labels.unique())
        if self.held_out:
            self.rows, self.apart = self.rows[~apart], self.rows[apart]

    def _refuse_gaps(self):
        """Raise ValueError if a label is missing: nothing would be trained on it."""
        there = self.labels.unique() if self.classes else ()
        if len(there) < self.classes:
            missing = int((there != torch.arange(len(there))).nonzero()[0])
            raise ValueError(
                f"labels run from 0 to {self.classes - 1}, but {missing} is missing: "
                "np.unique(y, return_inverse=True)[1] numbers them without gaps"
            )

    def batch(self, step):
        """Samples (batch_size, *D) and their condition or None of one step."""
        rows = self.rows[mine(rows_of_step(len(self.rows), self.batch_size, step, self.seed), self.part)]
        return self.table[rows], take(self.labels, rows)

    def fresh(self, n, draw=0):
        """Up to n samples to measure against, half of what there is at most; draws 0 and 1 have none in common."""
        rows = half_of(self.apart, n, draw, self.seed)
        return self.table[rows], take(self.labels, rows)

    def neighbours(self, n):
        """Up to n rows to look for the nearest among, none of draw 1: those trained on, of few rows those of draw 0."""
        if not self.held_out:
            return self.fresh(n, 0)[0]
        return self.table[self.rows[torch.randperm(len(self.rows), generator=seeded(self.seed, 2))][:n]]


class Stream(Scaled):
    """Batches x or (x, condition) of an iterable, which is gone through again and again, or of a function of the step.

    Mean, spread and the number of labels are those of the first few batches. An iterable deals in its own order: a run
    on it goes on with what comes next, in the units that it began with, see `keep_units`.
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

    def keep_units(self, known):
        """Standardise as a run began to, whose first batches were others; known: what its checkpoint says of them."""
        self.mean, self.std, self.units, self.seen = known["mean"].cpu(), known["std"].cpu(), known["units"], None
        self.classes = known["classes"]

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
