"""Texts: prompts, and images if there are any, encoded once and read back from disk while training.

A folder of texts holds texts.json, safetensors shards whose tensors have a row a prompt (the conditions that
`prompts.encode_text` makes, and `latents`, scaled), and null.safetensors, the condition of the empty prompt. Of a
shard only the rows of a batch are read, so a set larger than memory costs none.

To learn edits, a row also has `source`, the latents of the picture to edit, in the size of its `latents`. Without its
prompt it keeps its picture, as in the guidance of the pipelines. Where these read the prompt together with the picture,
so is the empty prompt: a row has its own, null_prompt_embeds and so on, which doubles what is on disk (Qwen-Image-Edit:
7 kB a token; `tokens` says how many), and null.safetensors holds nothing.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import functional as tv

from ..data.batches import group_of_step, mark_of, mine, rows_of_step
from ..data.readers import to_unit
from ..data.shards import place_of, shard_rows, write_index, write_shards
from ..files import damage_named, opened_safetensors
from ..method.conditions import ROW_NULL, apart, join
from .prompts import encode_images, encode_text, pipeline_of

TEXTS_INDEX, NULL, LATENTS, SOURCE = "texts.json", "null.safetensors", "latents", "source"


def embed(prompts, pipeline, out, images=None, tokens=None, batch_size=16, shard=256):
    """Encode a list of prompts, and the images of a `Pairs` if given, into shards in the folder `out`, its index last.

    A shard holds latents of one shape, the first shards those of the most frequent bucket. pipeline: of
    `prompts.load_pipeline`; tokens: see `encode_text`. After a stop the shards that are there are not made again, and
    the folder ends the same byte for byte. Raises ValueError if `out` holds a finished set or one begun with other
    settings, if the pipeline edits pictures and there are none to edit or the other way round, or if what the encoders
    make is not finite.
    """
    out, about, sources = Path(out), pipeline_of(type(pipeline).__name__), getattr(images, "sources", [])
    if sources and about.edits is False:
        raise ValueError(f"{about.name} takes no picture to edit, and {images.folder} holds {len(sources)}")
    if about.edits and not sources:
        raise ValueError(f"{about.name} edits pictures: give a size, and beside NAME.txt that to edit, source/NAME.png")
    if not prompts:
        raise ValueError("there are no prompts to encode")
    buckets = [] if images is None else [[*side, len(rows)] for side, rows in images.buckets.items()]
    kinds = [name for name, there in ((LATENTS, images and images.paths), (SOURCE, sources)) if there]
    settings = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "pipeline": str(pipeline.name_or_path),
        "precision": str(pipeline.text_encoder.dtype),
        "images": None if images is None else [str(images.folder), *kinds, *buckets],
        "tokens": tokens,
        "batch_size": batch_size,
        "shard": shard,
    }

    def make(rows):
        if rows is None:
            return {} if about.sees else _finite(encode_text(pipeline, [""], tokens), "the empty prompt")
        parts = []
        for some in rows.split(batch_size):
            shown = images.to_edit(some) if sources else None
            part = encode_text(pipeline, [prompts[row] for row in some], tokens, shown)
            if about.sees:
                null = encode_text(pipeline, [""] * len(some), tokens, shown)
                part |= {ROW_NULL + name: value for name, value in null.items()}
            if LATENTS in kinds:
                part[LATENTS] = encode_images(images.read(some, None)[0], pipeline).half()
            if sources:
                pixels = to_unit(torch.stack([tv.pil_to_tensor(picture) for picture in shown]))
                part[SOURCE] = encode_images(pixels, pipeline).half()
            parts.append({name: value.cpu() for name, value in part.items()})
        return _finite(join(*parts), f"prompts from {rows[0]} on")

    rows = len(prompts) if images is None else tuple(images.buckets.values())
    shards = shard_rows(rows, shard, "texts-{:05d}.safetensors")
    write_shards(out, TEXTS_INDEX, settings, {NULL: None, **shards}, make, _save)
    tensors = {name: [kind, shape[1:]] for name, (kind, shape) in _header(out / next(iter(shards))).items()}
    sizes = [len(rows) for rows in shards.values()]
    index = {"shards": list(shards), "sizes": sizes, "tensors": tensors, "null": NULL}
    if images is not None:
        begins = {int(rows[0]): name for name, rows in shards.items()}
        of_bucket = [(begins[int(rows[0])], len(rows)) for rows in images.buckets.values()]
        index["buckets"] = [[_header(out / name)[kinds[0]][1][1:], n] for name, n in of_bucket]
    write_index(out, TEXTS_INDEX, index)


def _finite(tensors, what):
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{what}: {name} would hold NaN or infinity in {value.dtype}")
    return tensors


def _save(file, tensors):
    from safetensors.torch import save

    file.write(save({name: value.cpu().contiguous() for name, value in tensors.items()}))


def _header(path):
    """Name -> (kind of number, shape) of a safetensors file's tensors."""
    with opened_safetensors(path) as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}


def read_conditions(folder, most=64):
    """The conditions of all prompts of a folder made by `embed` without images, in their order.  -> dict of (n, ...)

    Pictures to edit must be of one size. Raises ValueError if there are more prompts than so many, or images.
    """
    words = Texts(folder, 1, shape=())
    if len(words) > most:
        raise ValueError(f"{folder}: at most {most} prompts are drawn, it holds {len(words)}")
    if len(words.shapes) > 1:
        raise ValueError(f"{folder}: pictures to edit are drawn in one size, it holds {len(words.shapes)}: --buckets 1")
    return apart(words.read(np.arange(len(words)))[1], None)[0]


class Texts:
    """Training data as a function of the step: batch(i) is the same whenever and wherever it is asked.

    folder: made by `embed`. Rows are shuffled once an epoch and cut into batches that run on over its end, the rows of
    each bucket of sizes on their own: a batch is of one bucket, and these take turns in proportion to their rows.
    part = (rank, size): of each batch, one process's rows, and of the shards those that it looks at when it starts.
    shape (C, h, w) of a latent, of several the most frequent: must agree with those there are; where there are none,
    as data-free training needs none, it is what x has the shape of, unless that is its picture to edit. Raises
    ValueError, in one line, for what is damaged or does not fit.
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
            buckets = [(tuple(map(int, shape)), int(n)) for shape, n in about.get("buckets", ())]
        if not sizes or len(sizes) != len(self.shards) or min(sizes) < 1:
            raise ValueError(f"{index}: damaged ({len(self.shards)} shards, {len(sizes)} sizes)")
        self.ends, self.count = np.cumsum(sizes), sum(sizes)
        self.sized = [name for name in (LATENTS, SOURCE) if name in self.tensors]  # which are of a bucket's size
        own = tuple(self.tensors[self.sized[0]][1]) if self.sized else None
        self.shape = own or shape and tuple(shape)
        self.shapes, self.counts = zip(*buckets or [(self.shape, self.count)])
        self.begins = np.cumsum((0, *self.counts))
        if self.begins[-1] != self.count or not {*self.begins[1:]} <= {*self.ends} or self.shapes[0] != self.shape:
            raise ValueError(f"{index}: damaged (buckets {buckets} of {self.count} rows)")
        for i in range(len(sizes))[part[0] :: part[1]]:
            self._check(self.shards[i], sizes[i], self._tensors_of(i))
        common, _ = apart({name: about for name, about in self.tensors.items() if name not in self.sized}, None)
        conditions = {name: about for name, about in common.items() if ROW_NULL + name not in self.tensors}
        self._check(null, 1, conditions)
        self.null = self._read(null, conditions, [0])
        first = self._read(self.shards[0], self.tensors, [0])
        self.mark = mark_of(index.read_bytes(), *(first[name].float() for name in sorted(first)))
        if own is None and shape is None:
            raise ValueError(f"{folder}: holds no latents, so training on it must be data-free and be told their shape")
        wanted = None if shape is None or not shape and LATENTS not in self.tensors else tuple(shape)
        if own is not None and wanted not in (None, own):
            raise ValueError(f"{folder}: holds {self.sized[0]} of shape {own}, not {wanted or 'prompts alone'}")

    def __len__(self):
        return int(self.ends[-1])

    def batch(self, step):
        """Latents (b, C, h, w) float32, zeros if there are none, and conditions, a dict of (b, ...), of one step."""
        bucket, turn = group_of_step(self.counts, step)
        rows = mine(rows_of_step(self.counts[bucket], self.batch_size, turn, self.seed), self.part)
        return self.read(rows.numpy() + self.begins[bucket])

    def read(self, rows):
        """Latents and conditions of some rows (b,) of one bucket, as in `batch`."""
        shard, at = place_of(rows, self.ends)
        order = np.argsort(shard, kind="stable")
        parts = [self._read(self.shards[s], self.tensors, at[order][shard[order] == s]) for s in np.unique(shard)]
        back = torch.from_numpy(np.argsort(order))
        cond = {name: value[back] for name, value in join(*parts).items()}
        if LATENTS in cond:
            return cond.pop(LATENTS).float(), cond
        return torch.zeros(len(rows), *(cond[SOURCE].shape[1:] if SOURCE in cond else self.shape)), cond

    def _tensors_of(self, shard):
        """What a shard holds, by its number."""
        shape = self.shapes[np.searchsorted(self.begins, self.ends[shard]) - 1]
        return {**self.tensors, **{name: (self.tensors[name][0], list(shape)) for name in self.sized}}

    def _check(self, path, rows, tensors):
        """Raise ValueError unless a file holds the tensors that the index says."""
        found = _header(path)
        for name in sorted(found.keys() | tensors.keys()):
            here, there = found.get(name), (tensors[name][0], [rows, *tensors[name][1]]) if name in tensors else None
            if here != there:
                raise ValueError(f"{path}: {name} is {here} there, {there} in {TEXTS_INDEX}")

    def _read(self, path, tensors, rows):
        """Some rows of a file's tensors. Raises ValueError that names a row with a number that is not finite."""
        with opened_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in tensors}
            read = {name: torch.cat([some[int(i) : int(i) + 1] for i in rows]) for name, some in slices.items()}
        for name, value in read.items():
            bad = (~value.isfinite().reshape(len(rows), -1).all(1)).nonzero()
            if len(bad):
                raise ValueError(f"{path}: row {rows[int(bad[0])]} of {name} holds NaN or infinity")
        return read
