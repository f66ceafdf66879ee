"""Checkpoints of sharded runs: each process writes its pieces, and any number of processes reads them.

A checkpoint is a folder `checkpoint-000500` that torch.distributed.checkpoint writes, with about.json beside the
pieces. It gets its name when it is whole, and only then goes the one before it. Its index is a pickle: read only
checkpoints that you trust.
"""

import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ..files import check_weights, write_json
from ..files import read_checkpoint as load_file
from .in_backward import InBackward

ABOUT, PREFIX, ASIDE = "about.json", "checkpoint-", "writing-"


def newest(folder):
    """The last whole checkpoint of a run, or None."""
    found = [path for path in Path(folder).glob(PREFIX + "*") if (path / ABOUT).is_file()]
    return max(found, default=None, key=lambda path: int(path.name.removeprefix(PREFIX)))


def about(path):
    """What a checkpoint says of itself: step, size (number of processes), data. Raises ValueError if damaged."""
    try:
        note = json.loads((Path(path) / ABOUT).read_text())
        return {"step": int(note["step"]), "size": int(note["size"]), "data": note["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error})") from None


def save_pieces(folder, state, data):
    """Write a checkpoint of a State, all processes together, and remove the one before it.

    data: what is to be known of the data without reading it. Raises FloatingPointError on all processes, writing
    nothing, if a weight is not finite on any.
    """
    folder, weights = Path(folder), state.weights()
    _refuse_not_finite(weights, state.step)
    name, old = f"{PREFIX}{state.step:06d}", newest(folder)
    if old is not None and old.name == name:
        return
    content = dict(weights)
    if _first():
        shutil.rmtree(folder / (ASIDE + name), ignore_errors=True)
        (folder / (ASIDE + name)).mkdir(parents=True)
    _wait()
    if isinstance(state.optimizer, InBackward):
        torch.save(state.optimizer.state_dict(), folder / (ASIDE + name) / _own())
    elif state.step:
        content["optimizer"] = get_optimizer_state_dict(state.net, state.optimizer)["state"]
    with _alone_or_not() as alone:
        dcp.save(content, checkpoint_id=folder / (ASIDE + name), no_dist=alone)
    if _first():
        write_json(folder / (ASIDE + name) / ABOUT, {"step": state.step, "size": _size(), "data": data})
        os.replace(folder / (ASIDE + name), folder / name)
        if old is not None:
            shutil.rmtree(old)
    _wait()


def load_pieces(path, state):
    """Fill a State from a checkpoint, written by any number of processes.  -> data, as given to `save`.

    Raises ValueError if the checkpoint is damaged or holds another network, or if it is of another number of
    processes and has optimisers that ran inside the backward pass, each on the piece of one process.
    """
    note, optimizer = about(path), None
    content = dict(state.weights())
    if isinstance(state.optimizer, InBackward):
        if note["size"] != _size():
            raise ValueError(f"{path} is of {note['size']} processes, whose optimisers cannot be dealt to {_size()}")
        saved = load_file(Path(path) / _own(), next(state.net.parameters()).device, keys=("states", "steps"))
        state.optimizer.load_state_dict(saved)
    elif note["step"]:
        optimizer = get_optimizer_state_dict(state.net, state.optimizer)
        content["optimizer"] = optimizer["state"]
    read_pieces(path, content)
    if optimizer:
        set_optimizer_state_dict(state.net, state.optimizer, {**optimizer, "state": content["optimizer"]})
    state.step = note["step"]
    return note["data"]


def read_pieces(path, content):
    """Read the tensors of a nested dict from a checkpoint, in place, all processes together or one alone."""
    try:
        there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception:  # whatever a damaged index makes the reader raise
        raise ValueError(f"{path}: damaged checkpoint (its index cannot be read)") from None
    for name, own in content.items():
        if name == "optimizer":
            continue
        found = {key.removeprefix(name + "."): value.size for key, value in there.items() if key.startswith(name + ".")}
        check_weights(own, {key: torch.empty(size, device="meta") for key, size in found.items()}, path)
    try:
        with _alone_or_not() as alone:
            dcp.load(content, checkpoint_id=path, no_dist=alone)
    except dcp.api.CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path}: damaged checkpoint ({' '.join(str(why).split()) or type(why).__name__})") from None


def _own():
    return f"optimizer-{dist.get_rank() if dist.is_initialized() else 0}.pt"


def _size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _refuse_not_finite(weights, step):
    bad = [
        f"{part}.{name}"
        for part, tensors in weights.items()
        for name, value in tensors.items()
        if not (value.to_local() if hasattr(value, "to_local") else value).isfinite().all()
    ]
    everywhere = [bad]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, bad)
    for names in everywhere:
        if names:
            raise FloatingPointError(f"step {step}: weight {names[0]} is not finite; the last checkpoint stays")


def _first():
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _alone_or_not():
    """Whether this process is alone; the engine's warning that it is so is not passed on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()
