"""Shards: a data set too large for memory, made once into a folder of files, which a stop in between does not spoil.

While it is made, begun.json holds the settings that it is made with; the index, written last, says that it is whole.
"""

from pathlib import Path

import numpy as np
import torch

from ..bars import bar
from ..files import aside, read_json, write_json

BEGUN = "begun.json"


def claim(out, path, settings):
    """Note in the file `path` with which settings the folder `out` is begun.

    Raises ValueError if it holds something else and was begun with others.
    """
    if out.is_dir() and any(there != path for there in out.iterdir()):
        begun = read_json(path, f"record of how {out} was begun")
        for key, value in settings.items():
            if begun.get(key) != value:
                raise ValueError(f"{out} was begun with {key} {begun.get(key)}, not {value}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def shard_rows(rows, shard, name):
    """Names of shards, and which rows are in each: up to so many of one group.

    rows: their number, or a tuple of groups (n,).  name: "texts-{:05d}.npy"  ->  dict name -> (rows,)
    """
    groups = rows if isinstance(rows, tuple) else (torch.arange(rows),)
    parts = [part for group in groups for part in group.split(shard)]
    return {name.format(i): part for i, part in enumerate(parts)}


def write_shards(out, index, settings, shards, make, save):
    """Write into the folder `out`, begun with these settings, each shard that is not there yet; then `write_index` it.

    shards: file name -> rows; make(rows) -> content; save(file, content) writes it. A shard is written aside and
    renamed, so that what is there is whole. Raises ValueError if `out` is finished or was begun with other settings.
    """
    if (out / index).is_file():
        raise ValueError(f"{out} already holds {Path(index).stem}: choose another --out")
    claim(out, out / BEGUN, settings)
    for name, rows in bar(shards.items(), out.name, unit="shards"):
        if not (out / name).exists():
            content = make(rows)
            with aside(out / name) as file:
                save(file, content)


def write_index(out, index, content):
    """Write the index of a folder whose shards are all there."""
    write_json(out / index, content)
    (out / BEGUN).unlink()


def place_of(rows, ends):
    """In which shard each row is, and at which place of it; ends: how many rows the shards hold up to and with each."""
    shard = np.searchsorted(ends, rows, side="right")
    return shard, rows - np.concatenate([[0], ends])[shard]
