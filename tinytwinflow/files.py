"""Files that a crash cannot spoil, and weights that fit or are refused in one line."""

import json
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def aside(path, mode="wb"):
    """A file to write next to `path`, which takes its place once it is whole and on the disk.

    After a crash at any moment `path` is the old file or the new one.
    """
    other = Path(path).with_name(Path(path).name + ".tmp")
    with open(other, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(other, path)


def write_json(path, content):
    """Write a JSON file."""
    with aside(path, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def read_json(path, what):
    """The dict in a JSON file. Raises ValueError, in one line, that says what the file should have been."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not there or no JSON, so no {what} ({error})") from None


def read_checkpoint(path, device="cpu", keys=("net", "average", "step")):
    """Read a checkpoint. Raises ValueError with one line if it is missing, cut short or lacks a key."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as whole:
            damaged = whole.testzip()
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{path}: the file is cut short or is no checkpoint") from None
    if damaged:
        raise ValueError(f"{path}: the file is damaged at {damaged}")
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ValueError(f"{path}: holds no {', '.join(keys)}, so it is no checkpoint of this library")
    return content


def check_weights(own, weights, path):
    """Raise ValueError that names the first tensor whose name or shape differs between two sets of weights."""
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(w[name].shape) if torch.is_tensor(w.get(name)) else None for w in (own, weights))
        if here != there:
            raise ValueError(f"{path}: holds another network ({name} is {there} there, {here} here)")


@torch.no_grad()
def fill(own, weights, path):
    """Copy tensors by name into others. Raises ValueError that names the first that does not fit."""
    check_weights(own, weights, path)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def load_weights(net, weights, path):
    """Put weights into a network. Raises ValueError that names the first tensor that does not fit."""
    check_weights(net.state_dict(), weights if isinstance(weights, dict) else {}, path)
    net.load_state_dict(weights)
