"""Painting: pictures of prompts, written plainly or as the scripts of two benchmarks read them.

The benchmarks are GenEval (djghosh13/geneval) and DPG-Bench (TencentQQGYLab/ELLA).
"""

import hashlib
import inspect
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
from .prompts import pipeline_of

LAYOUTS = ("plain", "geneval", "dpg")


def write_pictures(pipeline, records, out, size, source, layout="plain", n=4, steps=1, seed=0, tokens=None,
                   batch_size=8):  # fmt: skip
    """Let a pipeline paint n pictures of each prompt and write them in a layout; what is there is not made again.

    pipeline: of diffusers, see `attach`, its guidance off; records: of `captions.read_prompts`; size: a picture's side,
    in pixels; source: says in words which weights the pipeline has; tokens: length of a prompt. The noise of a picture
    depends on the seed, its prompt's number and its own alone. In out are, of the prompt i = 00000, 00001, ...:
    plain     i/prompt.txt, i/00000.png ...
    geneval   i/metadata.jsonl, i/samples/00000.png ..., i/grid.png; records from its evaluation_metadata.jsonl
    dpg       NAME.png, a square of four; records from its folder of prompts. Its --resolution is one picture's side
    Beside it out.json holds the settings. Raises ValueError if records or n do not fit the layout, or out was begun
    with other settings, FloatingPointError if a picture is not finite.
    """
    out = Path(out)
    _check_layout(records, layout, n)
    for name, number in {"steps": steps, "batch_size": batch_size}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    how = {"height": size, "width": size, **length_of_prompts(pipeline, tokens)}
    prompts = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    settings = {"source": source, "prompts": prompts, "layout": layout, "n": n, "steps": steps}
    claim(out, out.with_name(out.name + ".json"), {**settings, "mode": pipeline.scheduler.config.mode, "seed": seed,
          "tokens": tokens, "size": size, "pipeline": str(pipeline.name_or_path)})  # fmt: skip

    places = [out / (f"{r['name']}.png" if layout == "dpg" else f"{i:05d}") for i, r in enumerate(records)]
    missing = [i for i, place in enumerate(places) if not place.exists()]
    for begin in bar(range(0, len(missing), max(1, batch_size // n)), "painting", unit="batches"):
        some, images = missing[begin : begin + max(1, batch_size // n)], []
        for part in torch.arange(n).split(batch_size):
            words = {i: records[i]["prompt"] for i in some}
            images.append(paint(pipeline, words, part.tolist(), steps, seed, **how))
        for i, pictures in zip(some, torch.cat(images, 1)):
            _write_layout(places[i], layout, records[i], pictures)


def length_of_prompts(pipeline, tokens=None):
    """The arguments by which a pipeline is told the length of its prompts, if it is.  -> dict

    Raises ValueError if it makes no pictures of prompts alone, or none of prompts of another length than its own.
    """
    kind, takes = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    about = pipeline_of(kind)
    if "num_images_per_prompt" not in takes or about.edits:
        raise ValueError(f"{kind} makes no pictures of prompts alone: attach it and call it yourself")
    if "max_sequence_length" in takes:
        return {"max_sequence_length": about.tokens if tokens is None else tokens}
    if tokens not in (None, about.tokens):
        raise ValueError(f"{kind} makes prompts of {about.tokens} tokens, not of {tokens}")
    return {}


def paint(pipeline, prompts, numbers, steps=1, seed=0, **how):
    """The pictures of some numbers of each prompt, each from a noise of its own.  -> bytes (prompts, numbers, 3, H, W)

    prompts: dict, a prompt's number -> its words; how: more for the pipeline's call. Raises FloatingPointError if a
    picture is not finite.
    """
    noise, about = [seeded(seed, 4, i, k) for i in prompts for k in numbers], pipeline_of(type(pipeline).__name__)
    how = {"num_inference_steps": steps, "output_type": "pt", **about.plain, **how}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt=[*prompts.values()], num_images_per_prompt=len(numbers), generator=noise, **how).images
    images = images.float().cpu().unflatten(0, (len(prompts), len(numbers)))
    for i, pictures in zip(prompts, images):
        if not pictures.isfinite().all():
            raise FloatingPointError(f"prompt {i}: a picture holds NaN or infinity")
    return (images * 255).round().to(torch.uint8)


def draw_grid(pipeline, prompts, path, nfes=(1, 2, 4), seed=0, **how):
    """One picture of a list of prompts: a row a prompt, a column a number of network calls, from the same noise."""
    if not prompts:
        raise ValueError("a grid needs at least one prompt")
    how = {**length_of_prompts(pipeline), **how}
    columns = [paint(pipeline, dict(enumerate(prompts)), [0], steps, seed, **how) for steps in nfes]
    save_grid(path, torch.cat(columns, 1).flatten(0, 1), len(nfes))


def save_grid(path, pictures, columns):
    """Write pictures, bytes (n, 3, H, W), row after row into one PNG."""
    with aside(path) as file:
        to_pil_image(make_grid(pictures, nrow=columns, padding=2)).save(file, "PNG")


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
