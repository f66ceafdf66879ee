"""Checkpoints: a State on disk, whole at any moment, in one file or in pieces, see `sharded`."""

from pathlib import Path

import torch

from ..files import aside, check_keys, check_weights, damage_named, fill, read_checkpoint
from . import sharded
from .distributed import first

NAME = "checkpoint.pt"


def has_checkpoint(folder):
    return (Path(folder) / NAME).exists() or sharded.newest(folder) is not None


def write_checkpoint(path, content):
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, whole.

    Raises FloatingPointError, writing nothing, if a weight is not finite.
    """
    for name, value in (*content.get("net", {}).items(), *content.get("average", {}).items()):
        if not value.isfinite().all():
            raise FloatingPointError(f"step {content['step']}: weight {name} is not finite; the last checkpoint stays")
    with aside(path) as file:
        torch.save(content, file)


def keep_state(folder, state, about_data, in_pieces=False, world=None):
    """Write the checkpoint of a run, in pieces or in one file. If one process cannot, none goes on."""
    if in_pieces:
        sharded.save_pieces(folder, state, about_data)
    else:
        first(world, lambda: write_checkpoint(Path(folder) / NAME, {**state.state_dict(), "data": about_data}))


def restore_state(state, saved, path):
    """Fill a State from what `read_saved` found. Raises ValueError if it is damaged or holds another network."""
    if path.name != NAME:
        sharded.load_pieces(path, state)
        return
    check_keys(saved, state.state_dict(), path)
    for name, weights in state.weights().items():
        check_weights(weights, saved[name], path)
    with damage_named(path, "its optimiser or its noise does not fit the run"):
        state.load_state_dict(saved)


def check_about(saved, path):
    """Raise ValueError unless a checkpoint says which step it is of, and of the data all that samples need."""
    step, data = saved["step"], saved["data"] if isinstance(saved["data"], dict) else {}
    shape, scaling = data.get("shape"), [data.get(name) for name in ("mean", "std")]
    fits = all(type(n) is int and n >= 0 for n in (step, data.get("classes")))
    fits &= isinstance(shape, list) and len(shape) > 0 and all(type(n) is int and n > 0 for n in shape)
    units = data.get("units", ("torch", "float32"))
    kind, dtype = units if isinstance(units, list | tuple) and len(units) == 2 else (None, None)
    fits &= kind in ("torch", "numpy") and isinstance(getattr(torch, str(dtype), None), torch.dtype)
    if scaling != [None, None] and fits:
        tensors = all(torch.is_tensor(a) and a.is_floating_point() and spans(a.shape, shape) for a in scaling)
        fits = tensors and all(bool(a.isfinite().all()) for a in scaling)
    if not fits:
        raise ValueError(f"{path}: damaged checkpoint (no step, or no shape, labels and scaling of data)")


def spans(part, shape):
    """Whether a tensor of one shape, such as a number a channel, stands for one of another by repetition."""
    try:
        return torch.broadcast_shapes(part, shape) == torch.Size(shape)
    except RuntimeError:
        return False


def read_saved(folder, *keys):
    """What a run's last checkpoint says: step and data, and of one file all that it holds.  -> dict, its path

    Raises ValueError if there is none, or it is damaged or lacks one of the keys.
    """
    path = sharded.newest(folder)
    saved, path = (sharded.about(path), path) if path else (None, Path(folder) / NAME)
    saved = saved or read_checkpoint(path, keys=("step", "data", *keys))
    check_about(saved, path)
    return saved, path


def fill_from(saved, path, part, own):
    """Fill tensors, by name, from one part, "net" or "average", of what `read_saved` found.

    Raises ValueError if its tensors are others.
    """
    if path.name == NAME:
        fill(own, saved[part], path)
    else:
        sharded.read_pieces(path, {part: own})
