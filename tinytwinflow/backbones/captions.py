"""Texts: prompts, and images if there are any, encoded once and read back from disk while training.

A folder of texts holds texts.json, safetensors shards whose tensors have a row a prompt (the conditions that
`prompts.encode_text` makes, and `latents`, scaled), and null.safetensors, the condition of the empty prompt. Of a
shard only the rows of a batch are read, so a set larger than memory costs none.
"""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.batches import mark_of, mine, rows_of_step
from ..data.readers import Folder, hidden, refuse_small
from ..data.shards import place_of, shard_rows, write_index, write_shards
from ..files import damage_named
from ..method.conditions import join
from .prompts import encode_images, encode_text

TEXTS_INDEX, NULL, LATENTS = "texts.json", "null.safetensors", "latents"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def _text(path):
    """What a text file says. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text") from error


def _seen(folder):
    """The files of a folder by name, but hidden ones."""
    return sorted(file for file in folder.iterdir() if not hidden(file.name))


def read_prompts(path):
    """Prompts from a .txt (one a line), a .jsonl (key "prompt") or a folder of NAME.txt (one each), hidden ones aside.

    -> list of dicts with the key "prompt", all other keys of the line, and from a folder "name". Blank lines at the end
    do not count. Raises ValueError that names the line if another is empty or no such thing.
    """
    path, records = Path(path), []
    if path.is_dir():
        files = [file for file in _seen(path) if file.suffix.lower() == ".txt"]
        places, records = files, [{"prompt": _text(file).strip(), "name": file.stem} for file in files]
    elif path.suffix.lower() in (".txt", ".jsonl") and path.is_file():
        text = _text(path)
        lines = text.rstrip().split("\n") if text.strip() else []  # splitlines() would cut a prompt at U+2028
        places = [f"{path}, line {i}" for i in range(1, len(lines) + 1)]
        for place, line in zip(places, lines):
            try:
                records.append(json.loads(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()})
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: no JSON") from error
    elif path.exists():
        raise ValueError(f"{path}: prompts are read from .txt, .jsonl or a folder of .txt")
    else:
        raise ValueError(f"{path}: no such .txt, .jsonl or folder of .txt")
    for place, record in zip(places, records):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{place}: no prompt")
    if not records:
        raise ValueError(f"{path}: holds no prompts")
    return records


class Pairs(Folder):
    """A folder of images NAME.png (or .jpg, .jpeg, .webp), and beside each its caption, NAME.txt.

    Hidden files do not count. Read as a `Folder` is, with a caption, `prompts`, in place of a class. Raises ValueError
    if one is without the other, a caption is empty, or an image is smaller than size.
    """

    def __init__(self, folder, size):
        files = _seen(Path(folder)) if Path(folder).is_dir() else []
        paths = [file for file in files if file.suffix.lower() in PICTURES]
        captions = [file for file in files if file.suffix.lower() == ".txt"]
        if not paths:
            raise ValueError(f"{folder}: holds no images ({', '.join(PICTURES)})")
        images, texts = (Counter(file.stem for file in part) for part in (paths, captions))
        odd = [name for name in images | texts if not images[name] == texts[name] == 1]
        if odd:
            raise ValueError(f"{folder}: needs one image and one caption, NAME.txt, of each name, {min(odd)} has not")
        said = {file.stem: _text(file).strip() for file in captions}
        for file in captions:
            if not said[file.stem]:
                raise ValueError(f"{file}: no prompt")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for path in paths:  # all, before hours of encoding
            with damage_named(path, "cut short, or not an image"), Image.open(path) as image:
                sides = image.size
            refuse_small(path, sides, size)
        self.prompts = [said[path.stem] for path in paths]
        self.paths, self.labels = paths, torch.arange(len(paths))
        self.folder, self.size, self.shape, self.pool = folder, size, (3, size, size), ThreadPoolExecutor()


def embed(prompts, pipeline, out, images=None, tokens=None, batch_size=16, shard=256):
    """Encode a list of prompts, and the images of a `Pairs` if given, into shards in the folder `out`, its index last.

    pipeline: of `prompts.load_pipeline`; tokens: see `encode_text`. After a stop the shards that are there are not made
    again, and the folder ends the same byte for byte. Raises ValueError if `out` holds a finished set or one begun with
    other settings, or if what the encoders make is not finite.
    """
    out = Path(out)
    if not prompts:
        raise ValueError("there are no prompts to encode")
    settings = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "pipeline": str(pipeline.name_or_path),
        "precision": str(pipeline.text_encoder.dtype),
        "images": None if images is None else [str(images.folder), images.size],
        "tokens": tokens,
        "batch_size": batch_size,
        "shard": shard,
    }

    def make(rows):
        if rows is None:
            return _finite(encode_text(pipeline, [""], tokens), "the empty prompt")
        parts = []
        for some in rows.split(batch_size):
            part = encode_text(pipeline, [prompts[row] for row in some], tokens)
            if images is not None:
                part[LATENTS] = encode_images(images.read(some, None)[0], pipeline).half()
            parts.append({name: value.cpu() for name, value in part.items()})
        return _finite(join(*parts), f"prompts from {rows[0]} on")

    shards = shard_rows(len(prompts), shard, "texts-{:05d}.safetensors")
    write_shards(out, TEXTS_INDEX, settings, {NULL: None, **shards}, make, _save)
    tensors = {name: [kind, shape[1:]] for name, (kind, shape) in _header(out / next(iter(shards))).items()}
    sizes = [len(rows) for rows in shards.values()]
    write_index(out, TEXTS_INDEX, {"shards": list(shards), "sizes": sizes, "tensors": tensors, "null": NULL})


def _finite(tensors, what):
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{what}: {name} would hold NaN or infinity in {value.dtype}")
    return tensors


def _save(file, tensors):
    from safetensors.torch import save

    file.write(save({name: value.cpu().contiguous() for name, value in tensors.items()}))


@contextmanager
def _open(path):
    """A safetensors file to read from; whatever goes wrong is said in one line."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError("texts need safetensors: pip install 'tinytwinflow[large]'") from None
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with damage_named(path, "damaged, or no safetensors file"), safe_open(path, "pt") as file:
        yield file


def _header(path):
    """Name -> (kind of number, shape) of a safetensors file's tensors."""
    with _open(path) as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}


class Texts:
    """Training data as a function of the step: batch(i) is the same whenever and wherever it is asked.

    folder: made by `embed`. Rows are shuffled once an epoch and cut into batches that run on over its end.
    part = (rank, size): of each batch, one process's rows, and of the shards those that it looks at when it starts.
    shape (C, h, w) of a latent: must agree with the latents there are; where there are none, as data-free training
    needs none, it is what x has the shape of. Raises ValueError, in one line, for what is damaged or does not fit.
    """

    on_disk, classes, scaling = True, 0, {}

    def __init__(self, folder, batch_size, seed=0, part=(0, 1), shape=None):
        self.folder, self.batch_size, self.seed, self.part = Path(folder), batch_size, seed, part
        index = self.folder / TEXTS_INDEX
        if not index.is_file():
            raise ValueError(f"{index}: no such file; `python -m tinytwinflow embed` makes one")
        with damage_named(index):
            about = json.loads(index.read_text())
            self.shards, sizes = [self.folder / name for name in about["shards"]], [int(n) for n in about["sizes"]]
            self.tensors = {name: (kind, list(tail)) for name, (kind, tail) in about["tensors"].items()}
            null = self.folder / about["null"]
        if not sizes or len(sizes) != len(self.shards) or min(sizes) < 1:
            raise ValueError(f"{index}: damaged ({len(self.shards)} shards, {len(sizes)} sizes)")
        self.ends, self.count = np.cumsum(sizes), sum(sizes)
        for shard, size in list(zip(self.shards, sizes))[part[0] :: part[1]]:
            self._check(shard, size, self.tensors)
        conditions = {name: about for name, about in self.tensors.items() if name != LATENTS}
        self._check(null, 1, conditions)
        self.null = self._read(null, conditions, [0])
        first = self._read(self.shards[0], self.tensors, [0])
        self.mark = mark_of(index.read_bytes(), *(first[name].float() for name in sorted(first)))
        own = tuple(self.tensors[LATENTS][1]) if LATENTS in self.tensors else None
        if own is None and shape is None:
            raise ValueError(f"{folder}: holds no latents, so training on it must be data-free and be told their shape")
        if own is not None and shape is not None and tuple(shape) != own:
            raise ValueError(f"{folder}: holds latents of shape {own}, not {tuple(shape)}")
        self.shape = tuple(shape) if own is None else own

    def __len__(self):
        return int(self.ends[-1])

    def batch(self, step):
        """Latents (b, C, h, w) float32, zeros if there are none, and conditions, a dict of (b, ...), of one step."""
        rows = mine(rows_of_step(len(self), self.batch_size, step, self.seed), self.part).numpy()
        shard, at = place_of(rows, self.ends)
        order = np.argsort(shard, kind="stable")
        parts = [self._read(self.shards[s], self.tensors, at[order][shard[order] == s]) for s in np.unique(shard)]
        back = torch.from_numpy(np.argsort(order))
        cond = {name: value[back] for name, value in join(*parts).items()}
        x = cond.pop(LATENTS).float() if LATENTS in cond else torch.zeros(len(rows), *self.shape)
        return x, cond

    def _check(self, path, rows, tensors):
        """Raise ValueError unless a file holds the tensors that the index says."""
        found = _header(path)
        for name in sorted(found.keys() | tensors.keys()):
            here, there = found.get(name), (tensors[name][0], [rows, *tensors[name][1]]) if name in tensors else None
            if here != there:
                raise ValueError(f"{path}: {name} is {here} there, {there} in {TEXTS_INDEX}")

    def _read(self, path, tensors, rows):
        """Some rows of a file's tensors. Raises ValueError that names a row with a number that is not finite."""
        with _open(path) as file:
            slices = {name: file.get_slice(name) for name in tensors}
            read = {name: torch.cat([some[int(i) : int(i) + 1] for i in rows]) for name, some in slices.items()}
        for name, value in read.items():
            bad = (~value.isfinite().reshape(len(rows), -1).all(1)).nonzero()
            if len(bad):
                raise ValueError(f"{path}: row {rows[int(bad[0])]} of {name} holds NaN or infinity")
        return read
