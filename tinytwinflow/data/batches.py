"""Batches: what a data set is to a training step, and how rows are dealt out so that nothing has to be stored."""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from ..method.draws import seeded
from ..ranges import plain


class DataSet(Protocol):
    """The contract of a data set: training data as a function of the step. No base class, no registry.

    shape     of one sample, (D,) or (C, H, W)
    classes   how many labels there are, 0 without; the null label, "no class", is `classes` itself
    scaling   dict kept in checkpoints, by which samples go back to the units of the data: mean and std, tensors, and
              units, a pair such as ["numpy", "float64"]; {} for points as they are and for images in [-1, 1]
    on_disk   whether a batch takes time to read, so that the next one is read while a step is taken
    batch     step -> x (B, *shape) in float32 of about unit spread, and labels (B,), other conditions, or None.
              The same step gives the same batch whenever and wherever it is asked, so that a run resumes where it was
    fresh     n, draw -> x, labels to measure against, not more than n; draws 0 and 1 have no sample in common

    It may also have batch_size, for the record, null, a condition of one row that stands for none, see
    `conditions.apart`, held_out, False where `fresh` gives samples that are trained on, too, which is said beside what
    is measured, shapes, all there are where batches differ, `shape` the most frequent, and count and mark, how many
    samples there are and a fingerprint of them, by which a run knows its data again. And neighbours, n -> up to n
    samples, none of draw 1: the nearest of a sample is looked for among them, instead of among those of draw 0.

    A set of your own, given to `fit` or to `runs.run.begin`:

    >>> class Ring:
    ...     shape, classes, scaling, on_disk = (2,), 0, {}, False
    ...     def draw(self, n, *key):
    ...         angle = 6.2832 * torch.rand(n, generator=seeded(*key))
    ...         return torch.stack([angle.cos(), angle.sin()], 1), None
    ...     def batch(self, step):
    ...         return self.draw(64, 0, step)
    ...     def fresh(self, n, draw=0):
    ...         return self.draw(n, 1, draw)
    """

    shape: tuple
    classes: int
    scaling: dict
    on_disk: bool

    def batch(self, step): ...

    def fresh(self, n, draw=0): ...


def null_of(data):
    """What stands for no condition of a data set: its own null, the label `classes`, or None where there is neither."""
    return getattr(data, "null", data.classes or None)


def known_of(data):
    """What a checkpoint says of a data set: enough to sample without it, and to know it again."""
    found = {name: getattr(data, name, None) for name in ("count", "mark")}
    known = {name: plain(value) for name, value in found.items() if value is not None and not callable(value)}
    return {"shape": [int(n) for n in data.shape], "classes": int(data.classes), **known, **data.scaling}


def mark_of(*parts):
    """A short fingerprint of texts, bytes and arrays, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def spread(n, most=1024):
    """Rows for a fingerprint: all of n, or so many of them at even distances.  -> (m,) whole numbers"""
    return torch.arange(n)[:: max(1, -(-n // most))]


@contextmanager
def read_ahead(data):
    """data.batch, the next batch of a set on disk being read while a step is taken."""
    if not data.on_disk:
        yield data.batch
        return
    pool, coming = ThreadPoolExecutor(1), {}

    def batch(step):
        now = coming.pop(step).result() if step in coming else data.batch(step)
        coming[step + 1] = pool.submit(data.batch, step + 1)
        return now

    try:
        yield batch
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=16)  # two a bucket
def _shuffled(n, seed, epoch):
    return torch.randperm(n, generator=seeded(seed, 0, epoch))


def rows_of_step(n, batch_size, step, seed):
    """Which of n rows make up the batch of a step: shuffled once an epoch, batches run on over its end."""
    index = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = index.div(n, rounding_mode="floor")
    return torch.cat([_shuffled(n, seed, epoch)[index[epochs == epoch] % n] for epoch in epochs.unique().tolist()])


@functools.lru_cache(maxsize=2)
def _turns(counts):
    """The order of sum(counts) turns: turn i of n of a group is due at (i + 1/2) / n of the way.  -> groups, turns"""
    groups = np.repeat(np.arange(len(counts)), counts)
    turns = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort((turns + 0.5) / np.repeat(counts, counts), kind="stable")
    return groups[order], turns[order]


def group_of_step(counts, step):
    """Whose turn a step is, of groups of so many rows, and how many turns the group has had.  -> group, turns

    Among any sum(counts) steps from a multiple of it on each group has as many as it has rows, spread evenly.
    """
    if len(counts) == 1:
        return 0, step
    groups, turns = _turns(tuple(counts))
    rounds, at = divmod(step, len(groups))
    return int(groups[at]), int(rounds * counts[groups[at]] + turns[at])


def kept_apart(n, drawn=False):
    """Which of n rows are kept from training to be measured against: one in twenty.  -> (n,) bool

    Every twentieth, as of pictures that lie sorted in folders; or drawn, the same for all runs: the rows of a table
    may come in turns, each twentieth of one kind.
    """
    order = torch.randperm(n, generator=seeded(n)) if drawn else torch.arange(n)
    return order % 20 == 19


def half_of(rows, n, draw, seed):
    """Up to n of some rows: those of draws 0 and 1 are equally many and none the same."""
    order = rows[torch.randperm(len(rows), generator=seeded(seed, 1))]
    return order[: len(order) // 2 * 2][draw % 2 :: 2][:n]


def mine(rows, part):
    """The rows that fall to one process, part = (rank, size): an equal run of them.

    Raises ValueError if they do not divide.
    """
    rank, size = part
    if len(rows) % size:
        raise ValueError(f"batch_size {len(rows)} must be a multiple of the {size} processes")
    return rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]
