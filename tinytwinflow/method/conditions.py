"""Conditions: labels or prompts, None, a tensor or a dict of tensors and Nones, a row a sample."""

import numpy as np
import torch

from ..ranges import plain

KEPT = {"source"}  # the picture to edit
ROW_NULL = "null_"  # and the name of a condition: what stands for none of it in a row


def check_rows(cond, n):
    """Raise ValueError unless a condition is None, a tensor of n rows or a dict of such."""
    for name, value in cond.items() if isinstance(cond, dict) else [("cond", cond)]:
        if value is not None and (not torch.is_tensor(value) or value.ndim == 0):
            got = "a tensor of no axes" if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"{name} must be None or a tensor of {n} rows, or cond a dict of these, got {got}")
        if value is not None and len(value) != n:
            raise ValueError(f"{name} has {len(value)} rows, x has {n}")


def count_rows(cond):
    """How many rows a condition has that is not None."""
    return next(len(v) for v in (cond.values() if isinstance(cond, dict) else [cond]) if v is not None)


def each(function, cond, *others):
    """A function of tensors on those of a condition and of others of its kind; what is None stays None.

    Raises ValueError if they are not of one kind: tensors, or dicts with tensors of the same names.
    """
    for other in others:
        if _kind(other) != _kind(cond):
            raise ValueError(f"conditions must be of one kind, got {_kind(cond)} and {_kind(other)}")
    if isinstance(cond, dict):
        return {name: each(function, value, *(other.get(name) for other in others)) for name, value in cond.items()}
    return None if cond is None else function(cond, *others)


def _kind(cond):
    if isinstance(cond, dict):
        return f"a dict of {', '.join(sorted(name for name, value in cond.items() if value is not None))}"
    return "None" if cond is None else "a tensor"


def take(cond, rows):
    """Rows of a condition."""
    return each(lambda value: value[rows], cond)


def join(*conds):
    """Concatenate conditions of one kind along the batch."""
    return each(lambda *values: torch.cat(values), *conds)


def repeat(cond, n):
    """A condition that stands for none, of leading dimension 1, for n rows; one of leading dimension n as it is."""

    def of_rows(value):
        if value.ndim == 0 or len(value) not in (1, n):
            raise ValueError(f"null has shape {tuple(value.shape)}, but x has {n} rows: it needs 1 or as many")
        return value.expand(n, *value.shape[1:])

    return each(of_rows, cond)


def take_null(null, rows):
    """Rows of a condition that stands for none; what stands for it in all rows stays one row."""
    return each(lambda value: value[rows] if value.ndim and len(value) > 1 else value, null)


def place(value, device):
    """A tensor, array or list as a tensor on a device; nobody waits until a GPU has got it.  -> tensor"""
    value, device = torch.as_tensor(value), torch.device(device)
    if device.type == "cuda" and value.device.type == "cpu":
        # from ordinary memory a copy waits for all work before it; what its owner pinned he may soon write over
        return value.pin_memory().to(device, non_blocking=not value.is_pinned())
    return value.to(device)


def move(cond, device):
    """A condition, of tensors, arrays or lists, as tensors on a device. Raises ValueError if it is of none of these."""

    def moved(value):
        try:
            return place(value, device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"a condition is of numbers, got {type(value).__name__} ({error})") from error

    return each(moved, cond)


def as_null(null, device):
    """What stands for no condition, a label or a condition of one row, as such a condition on a device."""
    null = plain(null)
    return move([null] if isinstance(null, int) else null, device)


def replace(cond, null, rows):
    """A condition with some rows, (B,) bool, made null, a condition of leading dimension 1 or B."""
    return each(lambda value, none: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), none, value), cond, null)


def apart(cond, null):
    """Conditions as a network takes them, and what stands for none of them, row by row where they differ.

    What is KEPT stays as it is where the rest is dropped, unless null names it. A row may bring what stands for none of
    its own NAME as `null_NAME`, which no network is shown.  -> cond, null

    Raises ValueError if there is nothing to put in the place of another condition.
    """
    if not isinstance(cond, dict):
        return cond, null
    own = {name.removeprefix(ROW_NULL): value for name, value in cond.items() if name.startswith(ROW_NULL)}
    cond = {name: value for name, value in cond.items() if not name.startswith(ROW_NULL)}
    if not isinstance(null, dict):
        return cond, null
    for name in cond.keys() - null.keys() - own.keys() - KEPT:
        raise ValueError(f"null says nothing of {name}, and only {', '.join(KEPT)} is kept where the rest is dropped")
    return cond, {**cond, **null, **own}


def as_pair(item):
    """A batch, x, (x,) or (x, condition), as a pair. Raises ValueError if x is no array or tensor."""
    pair = (*item, None)[:2] if isinstance(item, tuple | list) and len(item) in (1, 2) else (item, None)
    if not isinstance(pair[0], torch.Tensor | np.ndarray):
        raise ValueError(f"a batch is x or a pair (x, condition) of arrays, got {type(item).__name__}")
    return pair
