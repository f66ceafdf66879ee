"""Points to train on: a named two-dimensional set, or any table of points from a file, dealt into batches."""

from pathlib import Path

import numpy as np

from ..method.draws import seeded
from .batches import mine
from .given import Table
from .toys import TOYS, count_labels, draw_points


def read_points(path):
    """Read a table of points, a row a point, from .npy or .csv (comma, one header line allowed).

    -> array (n, D) of the file's own type. Raises ValueError if the file is missing, of another kind, empty, not
    numeric, not finite, of one row, or if a column never changes.
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
        whole = np.asarray(x, dtype=np.float64)
    except (ValueError, TypeError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table of numbers ({str(error).splitlines()[0]})") from None
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{path}: points must be a table (n, D), got shape {x.shape}")
    if len(x) < 2:
        raise ValueError(f"{path}: needs at least 2 points, got {len(x)}")
    if not np.isfinite(whole).all():
        row = int(np.flatnonzero(~np.isfinite(whole).all(1))[0])
        raise ValueError(f"{path}: row {row} holds NaN or infinity")
    if (whole.std(0) == 0).any():
        raise ValueError(f"{path}: column {int(np.flatnonzero(whole.std(0) == 0)[0])} is constant")
    return x


def _is_number(word):
    try:
        float(word)
        return True
    except ValueError:
        return False


class Points(Table):
    """Points of a named two-dimensional set, drawn afresh at each step, or of a file, a `given.Table`.

    Nothing has to be stored to resume: the position in the data is the step. part = (rank, size): of each batch, one
    process's rows. Raises ValueError for another name, or a file that is no table of points.
    """

    def __init__(self, name, batch_size, seed=0, part=(0, 1)):
        if name not in TOYS and str(name).endswith((".npy", ".csv")):
            super().__init__(read_points(name), batch_size, seed, part)
            self.name = name
            return
        self.name, self.batch_size, self.seed, self.part = name, batch_size, seed, part
        self.table, self.shape, self.classes = None, (2,), count_labels(name)

    def batch(self, step):
        """Points (batch_size, D) and labels (batch_size,) or None of one step."""
        if self.table is not None:
            return super().batch(step)
        whole = draw_points(self.name, self.batch_size, seeded(self.seed, 0, step))
        return tuple(mine(part, self.part) for part in whole)

    def fresh(self, n, draw=0):
        """n real points, and labels or None, to measure against; `draw` tells sets apart."""
        if self.table is not None:
            return super().fresh(n, draw)
        return draw_points(self.name, n, seeded(self.seed, 1, draw))

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"mean": None, "std": None} if self.table is None else super().scaling
