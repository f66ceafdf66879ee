"""Checkpoints of sharded runs: each process writes its pieces, and any number of processes reads them.

A checkpoint is a folder `checkpoint-000500` that torch.distributed.checkpoint writes, with about.json beside the
pieces. It gets its name when it is whole, and only then goes the one before it. Its index is a pickle: read only
checkpoints that you trust.
"""

import copy
import io
import json
import os
import shutil
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ..files import aside, check_weights, damage_named, full_disk_named, read_checkpoint, reason, write_json
from .in_backward import InBackward

ABOUT, PREFIX, ASIDE = "about.json", "checkpoint-", "writing-"
SCALING = ("mean", "std")  # of the data, tensors


def newest(folder):
    """The last whole checkpoint of a run, or None."""
    found = [path for path in Path(folder).glob(PREFIX + "*") if (path / ABOUT).is_file()]
    return max(found, default=None, key=lambda path: int(path.name.removeprefix(PREFIX)))


def about(path):
    """What a checkpoint says of itself: step, size (number of processes), data. Raises ValueError if damaged."""
    try:
        note = json.loads((Path(path) / ABOUT).read_text())
        if note.get("index", _sum_of(path)) != _sum_of(path):  # earlier versions noted none
            raise ValueError("its index has changed")
        data = note["data"]
        data |= {name: torch.tensor(data[name], dtype=torch.float64) for name in SCALING if data.get(name) is not None}
        return {"step": int(note["step"]), "size": int(note["size"]), "data": data}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error})") from error


def save_pieces(folder, state, data):
    """Write a checkpoint of a State, all processes together, and remove the one before it.

    data: what is to be known of the data without reading it. Raises on all processes, leaving the one before it alone,
    FloatingPointError if a weight is not finite on any and OSError if any cannot write.
    """
    folder, weights = Path(folder), state.weights()
    bad = _not_finite(weights)
    if bad:
        raise FloatingPointError(f"step {state.step}: weight {bad} is not finite; the last checkpoint stays")
    name, old = f"{PREFIX}{state.step:06d}", newest(folder)
    if old is not None and old.name == name:
        return
    writing, content = folder / (ASIDE + name), dict(weights)
    if not isinstance(state.optimizer, InBackward) and state.step:
        content["optimizer"] = get_optimizer_state_dict(state.net, state.optimizer)["state"]
    try:
        with _on_all(), full_disk_named(writing):
            if _first():
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir(parents=True)
        with _on_all(), _alone_or_not() as alone:
            dcp.save(content, storage_writer=_Writer(writing), no_dist=alone)
        with _on_all():
            if isinstance(state.optimizer, InBackward):
                with aside(writing / _own()) as file:
                    torch.save(state.optimizer.state_dict(), file)
        with _on_all():
            if _first():
                plain = {name: value.tolist() if torch.is_tensor(value) else value for name, value in data.items()}
                about_it = {"step": state.step, "size": _size(), "data": plain, "index": _sum_of(writing)}
                write_json(writing / ABOUT, about_it)
                os.replace(writing, folder / name)
    except BaseException:
        if _first():
            shutil.rmtree(writing, ignore_errors=True)
        raise
    if _first() and old is not None:
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
        saved = read_checkpoint(Path(path) / _own(), keys=("states", "steps", "seed", "lr", "initial_lr"))
        state.optimizer.load_state_dict(copy.deepcopy(saved))  # which keeps the tensors that it is given
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
    about(path)
    with damage_named(path, "damaged checkpoint, its index cannot be read"):
        index = dcp.FileSystemReader(path).read_metadata()
        there = {
            key: torch.empty(value.size, dtype=value.properties.dtype, device="meta")
            for key, value in index.state_dict_metadata.items()
            if hasattr(value, "size")
        }
    for name, own in content.items():
        if name != "optimizer":
            found = {key.removeprefix(name + "."): value for key, value in there.items() if key.startswith(name + ".")}
            check_weights(own, found, path)
    pieces = [piece for at, piece in index.storage_data.items() if at.fqn.split(".")[0] in content]
    mine = pieces[dist.get_rank() :: _size()] if dist.is_initialized() else pieces
    damaged = _first_of(map(partial(_damage, path), mine))
    if damaged:
        raise ValueError(f"{path}: damaged checkpoint ({damaged})")
    try:
        with _alone_or_not() as alone:
            dcp.load(content, checkpoint_id=path, no_dist=alone)
    except dcp.api.CheckpointException as error:
        with damage_named(path, "damaged checkpoint"):
            raise _failure(error) from error
    bad = _not_finite({name: own for name, own in content.items() if name != "optimizer"})
    if bad:
        raise ValueError(f"{path}: weight {bad} is not finite")


def _own():
    return f"optimizer-{dist.get_rank() if dist.is_initialized() else 0}.pt"


def _size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_of(path):
    return zlib.crc32((Path(path) / ".metadata").read_bytes())


def _damage(path, piece):
    """What is wrong with a piece, a zip within a file, or None; the engine itself does not look."""
    try:
        with open(Path(path) / piece.relative_path, "rb") as file:
            file.seek(piece.offset)
            with zipfile.ZipFile(io.BytesIO(file.read(piece.length))) as whole:
                bad = whole.testzip()
        return bad and f"{piece.relative_path} at {bad!r}"
    except Exception as error:  # whatever a damaged zip makes its reader raise
        return f"{piece.relative_path}: {reason(error)}"


def _everywhere(found):
    """What each process has found."""
    if not dist.is_initialized():
        return [found]
    all_found = [None] * dist.get_world_size()
    dist.all_gather_object(all_found, found)
    return all_found


def _first_of(faults):
    """The first fault that there is on any process, or None; the same on all."""
    return next(filter(None, _everywhere(next(filter(None, faults), None))), None)


def _not_finite(weights):
    """The name of a weight that is not finite on any process, or None."""
    return _first_of(
        f"{part}.{name}"
        for part, tensors in weights.items()
        for name, value in tensors.items()
        if not (value.to_local() if hasattr(value, "to_local") else value).isfinite().all()
    )


def _failure(error):
    """The first of the exceptions on all processes that the engine puts into its own."""
    return next(iter(error.failures.values()))[0]


@contextmanager
def _on_all():
    """What each process does inside is done by all or fails on all: they wait for each other at its end."""
    error = None
    try:
        yield
    except OSError as raised:
        error = raised
    except dcp.api.CheckpointException as raised:
        error = OSError(f"a checkpoint cannot be written ({reason(_failure(raised))})")
        error.__cause__ = raised
    for found in _everywhere(error):
        if found is not None:
            raise error or found


class _Writer(dcp.FileSystemWriter):
    """The engine's writer, which says what it is that cannot be written, and why."""

    def write_data(self, plan, planner):
        with full_disk_named(self.path):
            return super().write_data(plan, planner)


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
