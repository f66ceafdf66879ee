"""Painting: pictures of prompts, written plainly or as the scripts of two benchmarks read them.

The benchmarks are GenEval (djghosh13/geneval) and DPG-Bench (TencentQQGYLab/ELLA).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..bars import bar
from ..data.shards import claim
from ..files import aside
from ..method.draws import seeded
from ..method.samplers import sample
from .prompts import decode_latents, encode_text

LAYOUTS = ("plain", "geneval", "dpg")


def paint(net, cond, keys, shape, steps=1, mode="any", seed=0):
    """Latents for conditions, from noise that only depends on the seed and an image's own key.

    net: velocity field; cond: dict of (n, ...); keys: n tuples of whole numbers; shape (C, h, w); steps, mode: of
    `sample`. -> (n, C, h, w). Raises ValueError for mode "few", whose later noise would depend on the batch.
    """
    if mode == "few":
        raise ValueError("mode few draws noise for the whole batch at each step: choose any or multi")
    z = torch.stack([torch.randn(shape, generator=seeded(seed, 4, *key)) for key in keys])
    return sample(net, z.to(next(iter(cond.values())).device), steps, mode, cond=cond)


def write_pictures(net, pipeline, records, out, shape, source, layout="plain", n=4, steps=1, mode="any", seed=0,
                   tokens=None, batch_size=8):  # fmt: skip
    """Paint n pictures of each prompt and write them in a layout; what is there already is not made again.

    records: of `captions.read_prompts`; shape: of a latent; source: says in words which weights net has; others: as in
    `paint` and `encode_text`. In the folder out are, of the prompt i = 00000, 00001, ...:
    plain     i/prompt.txt, i/00000.png ...
    geneval   i/metadata.jsonl, i/samples/00000.png ..., i/grid.png; records from its evaluation_metadata.jsonl
    dpg       NAME.png, a square of four; records from its folder of prompts. Its --resolution is one picture's side
    Beside it out.json holds the settings. Raises ValueError if records or n do not fit the layout, or out was begun
    with other settings, FloatingPointError if a picture is not finite.
    """
    out = Path(out)
    _check_layout(records, layout, n)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    prompts = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    settings = {"source": source, "prompts": prompts, "layout": layout, "n": n, "steps": steps, "mode": mode}
    claim(out, out.with_name(out.name + ".json"), {**settings, "seed": seed, "tokens": tokens,
          "shape": list(shape), "pipeline": str(pipeline.name_or_path)})  # fmt: skip
    places = [out / (f"{r['name']}.png" if layout == "dpg" else f"{i:05d}") for i, r in enumerate(records)]
    missing = [i for i, place in enumerate(places) if not place.exists()]
    for begin in bar(range(0, len(missing), max(1, batch_size // n)), "painting", unit="batches"):
        some = missing[begin : begin + max(1, batch_size // n)]
        text = encode_text(pipeline, [records[i]["prompt"] for i in some], tokens)
        keys, images = [(i, k) for i in some for k in range(n)], []
        for rows in torch.arange(len(keys)).split(batch_size):
            cond = {name: value[rows.to(value.device) // n] for name, value in text.items()}
            x = paint(net, cond, [keys[row] for row in rows], shape, steps, mode, seed)
            images.append(decode_latents(x, pipeline).cpu())
        for i, pictures in zip(some, torch.cat(images).split(n)):
            if not pictures.isfinite().all():
                raise FloatingPointError(f"prompt {i}: a picture holds NaN or infinity")
            pictures = pictures.clamp(-1, 1)  # a decoder may go a little beyond white or black
            _write_layout(places[i], layout, records[i], ((pictures + 1) * 127.5).round().to(torch.uint8))


def _check_layout(records, layout, n):
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    if n < 1 or layout == "dpg" and n != 4:
        raise ValueError(f"n must be {'4 for layout dpg' if layout == 'dpg' else 'at least 1'}, got {n}")
    names = [str(record.get("name", ".")) for record in records]
    if layout == "geneval" and not all("tag" in record for record in records):
        raise ValueError("a prompt has no tag: layout geneval takes GenEval's evaluation_metadata.jsonl")
    if layout == "dpg" and (len(set(names)) < len(names) or set("./") & set("".join(names))):
        raise ValueError("a prompt has no name of its own without dots: layout dpg takes a folder of NAME.txt")


def _write_layout(place, layout, record, pictures):
    """One prompt's pictures, bytes (n, 3, H, W), written aside and renamed."""
    grid = to_pil_image(make_grid(pictures, nrow=2, padding=0))
    if layout == "dpg":
        with aside(place) as file:
            grid.save(file, "PNG")
        return
    writing = place.with_name(place.name + ".tmp")
    shutil.rmtree(writing, ignore_errors=True)
    inside = writing / "samples" if layout == "geneval" else writing
    inside.mkdir(parents=True)
    for k, picture in enumerate(pictures):
        to_pil_image(picture).save(inside / f"{k:05d}.png")
    if layout == "geneval":
        (writing / "metadata.jsonl").write_text(json.dumps(record))
        grid.save(writing / "grid.png")
    else:
        (writing / "prompt.txt").write_text(record["prompt"] + "\n", encoding="utf-8")
    os.replace(writing, place)
