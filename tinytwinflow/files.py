"""Files that a crash or a full disk cannot spoil, and weights that fit or are refused in one line."""

import argparse
import json
import os
import pickle
import re
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PARTS = ("average", "ema", "model", "state_dict", "net")  # what training scripts call weights, the best to have first
PREFIXES = ("module.", "_orig_mod.")  # what DDP and torch.compile put before their names


def reason(error):
    """What an exception says, in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@contextmanager
def full_disk_named(path):
    """An OSError of writing inside is raised with the path, also where torch has made a RuntimeError of it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while isinstance(cause, RuntimeError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


@contextmanager
def aside(path, mode="wb"):
    """A file to write next to `path`, which takes its place once it is whole and on the disk.

    After a crash at any moment `path` is the old file or the new one. Of what cannot be written nothing is left.
    """
    other = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with full_disk_named(path), open(other, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(other, path)
    except BaseException:
        with suppress(OSError):
            other.unlink()
        raise


def write_json(path, content):
    """Write a JSON file."""
    with aside(path, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def read_json(path, what):
    """The dict in a JSON file. Raises ValueError, in one line, that says what the file should have been."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not there or no JSON, so no {what} ({error})") from error


@contextmanager
def damage_named(path, what="damaged"):
    """Whatever a file makes its reader raise inside is raised as ValueError in one line.

    But for what is not the file's fault, no permission and no memory: that stays what it is.
    """
    try:
        yield
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {what} ({reason(error)})") from error


@contextmanager
def opened_safetensors(path):
    """A safetensors file to read from. Raises ValueError, in one line, if it is not there or damaged, or its package
    is not.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError(f"{path}: needs safetensors: pip install 'tinytwinflow[large]'") from error
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with damage_named(path, "damaged, or no safetensors file"), safe_open(path, "pt") as file:
        yield file


def read_torch(path, what="checkpoint"):
    """What torch.save has written, on the CPU: tensors, plain data and the parsed arguments of a script.

    All of it is checked, but a tensor takes no memory before it is used. Raises ValueError with one line if the file is
    missing, damaged, or holds objects of another kind, whose code is not run.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'a folder, not a' if Path(path).is_dir() else 'no such'} {what}")
    strange = damaged = None
    with damage_named(path, f"the file is cut short or is no {what}"):
        zipped = stored = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as whole:
                damaged = whole.testzip()
                stored = not any(info.compress_type for info in whole.infolist())
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
        except pickle.UnpicklingError as error:
            strange = re.search(r"GLOBAL (\S+)", str(error))
            if not strange:  # torch would tell to read it in a way that runs code
                raise ValueError("no pickle of tensors") from error
    if damaged:
        raise ValueError(f"{path}: the file is damaged at {damaged!r}")
    if strange:
        raise ValueError(f"{path}: holds a {strange[1]}, whose code is not run: save net.state_dict() alone")
    return content


def read_checkpoint(path, keys=("net", "average", "step")):
    """Read a checkpoint of this library, see `read_torch`. Raises ValueError also if it lacks a key."""
    content = read_torch(path)
    check_keys(content, keys, path)
    return content


def check_keys(content, keys, path):
    """Raise ValueError unless a checkpoint holds all of some keys."""
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        lacks = f"{path}: holds no {', '.join(keys)}, so it is no checkpoint of this library"
        raise ValueError(f"{lacks}; it holds {_held(content)}")


def read_weights(path):
    """Weights by name from a checkpoint of any training script.  -> dict, and in words what was taken, if it is not all

    The average goes before the network, and what DDP and torch.compile put before all names is left out. Raises
    ValueError if there are no weights.
    """
    content = read_torch(path)
    found = [name for name in PARTS if isinstance(content, dict) and _are_weights(content.get(name))]
    weights, words = (content[found[0]], [f"its {found[0]}"]) if found else (content, [])
    if not _are_weights(weights):
        raise ValueError(f"{path}: holds {_held(content)}, and weights neither there nor under {', '.join(PARTS)}")
    while used := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(used[0]): value for name, value in weights.items()}
        words.append(f"without {used[0]!r}")
    return weights, "" if words == ["its average"] else ", ".join(words)


def _are_weights(content):
    return isinstance(content, dict) and any(map(torch.is_tensor, content.values())) and {*map(type, content)} == {str}


def _held(content):
    """What a file holds, in a few words."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    names = [" ".join(str(name).split()) for name in content]
    return ", ".join(names[:6] + [f"{len(names) - 6} more"] * (len(names) > 6)) or "nothing"


def check_weights(own, weights, path):
    """Raise ValueError that names the first tensor whose name, shape or kind of number differs between two sets of
    weights, or which is not finite.
    """
    weights = weights if isinstance(weights, dict) else {}
    for name in sorted(own.keys() | weights.keys(), key=str):
        pair = [w[name] if torch.is_tensor(w.get(name)) else None for w in (own, weights)]
        here, there = (None if value is None else tuple(value.shape) for value in pair)
        if here is not None and here == there and pair[0].is_floating_point() != pair[1].is_floating_point():
            here, there = (value.dtype for value in pair)
        if name not in weights:
            strange = [f"; it holds {other}" for other in sorted(weights.keys() - own.keys(), key=str)[:1]]
            raise ValueError(f"{path}: holds another network ({name} is not there{''.join(strange)})")
        if here != there:
            raise ValueError(f"{path}: holds another network ({name} is {there} there, {here} here)")
        if here is not None and not pair[1].is_meta and not pair[1].isfinite().all():
            raise ValueError(f"{path}: weight {name} is not finite")


@torch.no_grad()
def fill(own, weights, path):
    """Copy tensors by name into others. Raises ValueError that names the first that does not fit."""
    check_weights(own, weights, path)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def load_weights(net, weights, path):
    """Put weights into a network. Raises ValueError that names the first tensor that does not fit."""
    check_weights(net.state_dict(), weights, path)
    net.load_state_dict(weights)
