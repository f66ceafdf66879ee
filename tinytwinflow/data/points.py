"""Points to train on: a named two-dimensional set, or any table of points from a file, dealt into batches."""

from pathlib import Path

import numpy as np
import torch

from ..method.draws import seeded
from .batches import mine, rows_of_step
from .toys import TOYS, count_labels, draw_points


def read_points(path):
    """Read a table of points, a row a point, from .npy or .csv (comma, one header line allowed).

    -> (n, D) float32. Raises ValueError if the file is missing, of another kind, empty, not numeric,
    not finite, of one row, or if a column never changes.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"{path}: points are read from .npy or .csv files")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        if path.suffix == ".npy":
            x = np.load(path, allow_pickle=False)
        else:
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            if lines and not all(map(_is_number, lines[0].split(","))):
                lines = lines[1:]
            x = np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.empty((0, 1))
        x = np.asarray(x, dtype=np.float64)
    except (ValueError, TypeError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table of numbers ({str(error).splitlines()[0]})") from None
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{path}: points must be a table (n, D), got shape {x.shape}")
    if len(x) < 2:
        raise ValueError(f"{path}: needs at least 2 points, got {len(x)}")
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
        raise ValueError(f"{path}: row {row} holds NaN or infinity")
    if (x.std(0) == 0).any():
        raise ValueError(f"{path}: column {int(np.flatnonzero(x.std(0) == 0)[0])} is constant")
    return torch.from_numpy(x).float()


def _is_number(word):
    try:
        float(word)
        return True
    except ValueError:
        return False


def restore(x, mean, std):
    """Undo a standardisation; points of a named set (mean None) were not standardised."""
    return x if mean is None else x * std.to(x) + mean.to(x)


class Points:
    """Training data as a function of the step: batch(i) is the same whenever and wherever it is asked.

    A named set is drawn afresh at each step; a file's points are standardised, shuffled once an
    epoch and cut into batches that run on over the end of an epoch. Nothing has to be stored to
    resume: the position in the data is the step. part = (rank, size): of each batch, one process's rows.
    """

    on_disk = False

    def __init__(self, name, batch_size, seed=0, part=(0, 1)):
        self.name, self.batch_size, self.seed, self.part = name, batch_size, seed, part
        self.table, self.mean, self.std = None, None, None
        if name in TOYS:
            self.shape, self.classes = (2,), count_labels(name)
        elif str(name).endswith((".npy", ".csv")):
            self.table = read_points(name)
            self.mean, self.std = self.table.mean(0), self.table.std(0)
            self.shape, self.classes = tuple(self.table.shape[1:]), 0
        else:
            draw_points(name, 1)

    def batch(self, step):
        """Points (batch_size, D) and labels (batch_size,) or None of one step."""
        if self.table is None:
            return tuple(
                mine(x, self.part) for x in draw_points(self.name, self.batch_size, seeded(self.seed, 0, step))
            )
        rows = mine(rows_of_step(len(self.table), self.batch_size, step, self.seed), self.part)
        return self.standardise(self.table[rows]), None

    def fresh(self, n, draw=0):
        """n real points, and labels or None, to measure against; `draw` tells sets apart.

        Two draws of a file without replacement are disjoint halves if the file has 2 n points.
        """
        if self.table is None:
            return draw_points(self.name, n, seeded(self.seed, 1, draw))
        half = torch.randperm(len(self.table), generator=seeded(self.seed, 1))[draw % 2 :: 2]
        return self.standardise(self.table[half[torch.arange(n) % len(half)]]), None

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"mean": self.mean, "std": self.std}

    def standardise(self, x):
        """From the units of the data to spread one."""
        return x if self.mean is None else (x - self.mean) / self.std
