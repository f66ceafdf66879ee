"""Points to train on: a named two-dimensional set, or any table of points from a file, dealt into batches."""

import csv
import functools
import math
import sys
import textwrap
from array import array
from pathlib import Path

import numpy as np

from ..method.draws import seeded
from .batches import mine
from .given import Table
from .toys import TOYS, count_labels, draw_points

WITHOUT = "write the table without them (pandas: index=False)"


def is_table(name):
    """Whether a name is that of a file of points."""
    return Path(name).suffix.lower() in (".npy", ".csv")


def read_points(path):
    """Read a table of points, a row a point, from .npy, or .csv: commas between numbers, and one line of names at most.

    -> array (n, D) of the file's own type. The names are said on stderr. Raises ValueError that names the file, and of
    a .csv the line, if it is missing, of another kind, or anything but a whole table of numbers.
    """
    path = Path(path)
    if not is_table(path):
        raise ValueError(f"{path}: points are read from .npy, or from .csv with commas between numbers")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    with open(path, "rb") as file:
        try:
            x = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise ValueError(f"{path}: not a table of numbers ({str(error).partition(chr(10))[0]})") from error
    if x.ndim != 2:
        raise ValueError(f"{path}: points are a table (n, D), got shape {x.shape} of {x.dtype}")
    return x


def _read_csv(path):
    """The numbers of a .csv.  -> array (n, D)"""
    values, width, names, first, line, blank = array("d"), 0, (), 0, 1, 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        try:
            for cells in lines:
                if not cells:
                    blank = blank or line
                elif blank and width < 2 and len(cells) == 1:  # in a table of one column it is a gap
                    line = blank
                    raise ValueError("an empty cell")
                else:
                    if not width:
                        width, first, names = len(cells), line, _names(cells)
                    if len(cells) != width:
                        raise ValueError(f"{len(cells)} cells, but line {first} has {width}")
                    if line > first or not names:
                        values.extend(_numbers(cells))
                line = lines.line_num + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: no UTF-8 text") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    if not values:
        raise ValueError(f"{path}: holds no numbers")
    x = np.array(values).reshape(-1, width)
    if names:
        if np.array_equal(x[:, 0], np.arange(len(x))):
            raise ValueError(f"{path}: column {names[0]!r} counts 0, 1, 2 ... as row numbers do: {WITHOUT}")
        _say_names(path, first, names)
    return x


def _names(cells):
    """The names that the first line of a .csv holds, none where a cell is a number."""
    if not cells[0].strip(" "):
        raise ValueError(f"the first cell is empty, as above row numbers: {WITHOUT}")
    if cells == [str(i) for i in range(len(cells))]:
        raise ValueError("counts 0, 1 ... as a program names columns: remove it, or write 0.0 if it is a point")
    for cell in cells:
        if ";" in cell or "\t" in cell:
            raise ValueError(f"{textwrap.shorten(cell, 40)!r}: commas separate cells, and numbers have a decimal point")
    return () if any(map(_is_number, cells)) else tuple(cells)


def _numbers(cells):
    """The finite numbers that the cells of a line are."""
    try:
        row = list(map(float, cells))
    except ValueError:
        row = [math.nan]
    if all(map(math.isfinite, row)) and not any("_" in cell for cell in cells):
        return row
    bad = next(cell for cell in cells if not (_is_number(cell) and math.isfinite(float(cell))))
    if not bad.strip():
        raise ValueError("an empty cell")
    raise ValueError(f"{textwrap.shorten(bad, 40)!r} is not a finite number")


def _is_number(word):
    try:
        float(word)
        return "_" not in word  # Python's own way to write thousands
    except ValueError:
        return False


@functools.cache  # a run reads its data more than once
def _say_names(path, line, names):
    print(f"{path}: line {line} is taken for names: {textwrap.shorten(', '.join(names), 200)}", file=sys.stderr)


class Points(Table):
    """Points of a named two-dimensional set, drawn afresh at each step, or of a file, a `given.Table`.

    Nothing has to be stored to resume: the position in the data is the step. part = (rank, size): of each batch, one
    process's rows. Raises ValueError for another name, or a file that is no table of points.
    """

    def __init__(self, name, batch_size, seed=0, part=(0, 1)):
        if name not in TOYS and Path(name).suffix:
            x = read_points(name)
            try:
                super().__init__(x, batch_size, seed, part)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self.name = name
            return
        self.name, self.batch_size, self.seed, self.part = name, batch_size, seed, part
        self.table, self.shape, self.classes, self.held_out = None, (2,), count_labels(name), True

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

    def neighbours(self, n):
        """n real points to look for the nearest among, others than those of `fresh`; of a file up to n."""
        if self.table is not None:
            return super().neighbours(n)
        return draw_points(self.name, n, seeded(self.seed, 1, 2))[0]

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"mean": None, "std": None} if self.table is None else super().scaling
