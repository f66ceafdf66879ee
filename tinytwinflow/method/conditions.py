"""Conditions: labels or prompts, None, a tensor or a dict of tensors, a row a sample."""

import torch


def check_rows(cond, n):
    """Raise ValueError unless every tensor of a condition has n rows."""
    for name, value in cond.items() if isinstance(cond, dict) else [("cond", cond)]:
        if value is not None and len(value) != n:
            raise ValueError(f"{name} has {len(value)} rows, x has {n}")


def take(cond, rows):
    """Rows of a condition: None, a tensor, or a dict of tensors."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: value[rows] for name, value in cond.items()}
    return cond[rows]


def join(*conds):
    """Concatenate conditions of one kind along the batch."""
    if conds[0] is None:
        return None
    if isinstance(conds[0], dict):
        return {name: torch.cat([c[name] for c in conds]) for name in conds[0]}
    return torch.cat(conds)


def repeat(cond, n):
    """A condition that stands for none, of leading dimension 1, for n rows; one of leading dimension n as it is."""
    if isinstance(cond, dict):
        return {name: repeat(value, n) for name, value in cond.items()}
    if cond.ndim == 0 or len(cond) not in (1, n):
        raise ValueError(f"null has shape {tuple(cond.shape)}, but x has {n} rows: it needs 1 or as many")
    return cond.expand(n, *cond.shape[1:])


def move(cond, device):
    """A condition on a device."""
    if isinstance(cond, dict):
        return {name: value.to(device) for name, value in cond.items()}
    return None if cond is None else cond.to(device)


def replace(cond, null, rows):
    """A condition with some rows, (B,) bool, made null, a condition of leading dimension 1 or B."""
    if isinstance(cond, dict):
        return {name: replace(value, null[name], rows) for name, value in cond.items()}
    return torch.where(rows.view(-1, *[1] * (cond.ndim - 1)), null, cond)
