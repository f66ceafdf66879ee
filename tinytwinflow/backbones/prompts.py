"""Prompts: from words to what a backbone is conditioned on, and from its latents to pictures.

What a family does with a prompt is the business of its diffusers pipeline, whose text encoders and autoencoder are
loaded here without the backbone; an `Encoder` tells how to ask it. Pictures are written plainly or as the scripts of
two benchmarks read them, GenEval (djghosh13/geneval) and DPG-Bench (TencentQQGYLab/ELLA).
"""

import hashlib
import inspect
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from ..files import aside, write_json
from ..method.draws import seeded
from ..method.samplers import sample

LAYOUTS = ("plain", "geneval", "dpg")


class Encoder(NamedTuple):
    """How a pipeline class is asked for embeddings.

    tokens    length of the prompt unless another is asked for
    outputs   what its encode_prompt returns, in its order; None is not kept
    options   further arguments of encode_prompt; without the guidance that would encode a second prompt
    own       arguments that the pipeline itself fills in when it makes a picture, but not for the empty prompt
    """

    tokens: int
    outputs: tuple
    options: dict
    own: tuple = ()


_ONE = {"do_classifier_free_guidance": False}
ENCODERS = {
    "StableDiffusion3Pipeline": Encoder(
        256, ("prompt_embeds", None, "pooled", None), {**_ONE, "prompt_2": None, "prompt_3": None}
    ),
    "SanaPipeline": Encoder(300, ("prompt_embeds", "prompt_mask", None, None), _ONE, ("complex_human_instruction",)),
    "FluxPipeline": Encoder(512, ("prompt_embeds", "pooled", None), {}),
    "QwenImagePipeline": Encoder(512, ("prompt_embeds", "prompt_mask"), {}),
    "ZImagePipeline": Encoder(512, ("prompt_embeds", None), _ONE),
}


def load_pipeline(path, device="cpu", dtype=torch.bfloat16):
    """The text encoders (in dtype) and the autoencoder (in float32) of a diffusers pipeline folder, for inference.

    Of the backbone only the settings are read. Raises ValueError if diffusers is not there, or the folder is no whole
    pipeline of a class in ENCODERS.
    """
    try:
        import diffusers
    except ImportError:
        raise ValueError("prompts need diffusers: pip install 'tinytwinflow[large]'") from None
    index, settings = (_read_json(Path(path) / name) for name in ("model_index.json", "transformer/config.json"))
    kind = index.get("_class_name")
    if kind not in ENCODERS:
        raise ValueError(f"{path}: {kind} is none of the known pipelines: {', '.join(ENCODERS)}")
    if not hasattr(diffusers, kind):
        raise ValueError(f"{path}: diffusers {diffusers.__version__} has no {kind}: install a newer one")
    absent = {name: None for name, about in index.items() if about == [None, None]}  # SD3 may come without its T5
    how = {**absent, "transformer": None, "torch_dtype": {"default": dtype, "vae": torch.float32}}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(str(path), local_files_only=True, **how)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"{path}: no whole {kind} ({str(error).strip().splitlines()[0]})") from None
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**settings))  # all that encode_prompt asks of it
    return pipeline.to(device)


def _read_json(path, what="diffusers pipeline"):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not there or no JSON, so no {what} ({error})") from None


@torch.no_grad()
def encode_text(pipeline, prompts, tokens=None):
    """Conditions of a list of prompts, as the names that `pretrained.Velocity` takes them by.  -> dict of (n, ...).

    tokens: length of prompt_embeds (of SD3: of T5's part). Where a mask tells how much of it the prompt fills, a prompt
    that fills all is warned of, because the pipeline cuts what is beyond; of others diffusers itself does.
    """
    encoder, call = ENCODERS[type(pipeline).__name__], inspect.signature(type(pipeline).__call__).parameters
    tokens, device = encoder.tokens if tokens is None else tokens, pipeline.device
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    own = {name: call[name].default for name in encoder.own if any(prompts)}
    options = {**encoder.options, **own, "device": device, "max_sequence_length": tokens}
    answer = pipeline.encode_prompt(list(prompts), **options)
    cond = {name: value for name, value in zip(encoder.outputs, answer) if name}
    if "pooled" not in cond:
        cond["prompt_embeds"], cond["prompt_mask"] = _padded(cond["prompt_embeds"], cond.get("prompt_mask"), tokens)
        full = cond["prompt_mask"].all(1).nonzero()
        for i in full[:1]:
            warnings.warn(f"{prompts[i][:60]!r} fills all {tokens} tokens: what is beyond is cut", stacklevel=2)
    if getattr(pipeline.transformer.config, "guidance_embeds", False):
        cond["guidance"] = torch.full((len(prompts),), float(call["guidance_scale"].default), device=device)
    return cond


def _padded(embeds, mask, tokens):
    """Embeddings, (n, L, D) or n of (L_i, D), with zeros up to one length, and the mask of what counts of them.

    mask: (n, L), or None where all counts.
    """
    out = embeds[0].new_zeros(len(embeds), tokens, embeds[0].shape[-1])
    counts = torch.zeros(len(embeds), tokens, dtype=torch.bool, device=out.device)
    for i, row in enumerate(embeds):
        out[i, : len(row)] = row
        counts[i, : len(row)] = True if mask is None else mask[i].bool()
    return out, counts


def _units(vae):
    """Mean and deviation of an autoencoder's latents: what a backbone sees is (latent - mean) / deviation."""
    if _has_frames(vae):
        keys = ("latents_mean", "latents_std")
        return [torch.tensor(vae.config[key], device=vae.device).view(-1, 1, 1) for key in keys]
    return vae.config.get("shift_factor") or 0.0, 1 / vae.config["scaling_factor"]


def _has_frames(vae):
    return type(vae).__name__ == "AutoencoderKLQwenImage"


@torch.no_grad()
def encode_images(x, vae):
    """Scaled latents of images in [-1, 1], the middle of the posterior.  (n, 3, H, W) -> (n, C, h, w) float32."""
    mean, std = _units(vae)
    x = x.to(vae.device, vae.dtype)
    answer = vae.encode(x[:, :, None] if _has_frames(vae) else x)
    latent = answer.latent if hasattr(answer, "latent") else answer.latent_dist.mode()
    return ((latent[:, :, 0] if _has_frames(vae) else latent).float() - mean) / std


@torch.no_grad()
def decode_latents(x, vae):
    """Images, about in [-1, 1], from scaled latents: the inverse.  (n, C, h, w) -> (n, 3, H, W) float32."""
    mean, std = _units(vae)
    latent = (x.to(vae.device) * std + mean).to(vae.dtype)
    image = vae.decode(latent[:, :, None] if _has_frames(vae) else latent).sample
    return (image[:, :, 0] if _has_frames(vae) else image).float()


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

    records: of `texts.read_prompts`; shape: of a latent; source: says in words which weights net has; others: as in
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
    for begin in tqdm(range(0, len(missing), max(1, batch_size // n)), disable=None):
        some = missing[begin : begin + max(1, batch_size // n)]
        text = encode_text(pipeline, [records[i]["prompt"] for i in some], tokens)
        keys, images = [(i, k) for i in some for k in range(n)], []
        for rows in torch.arange(len(keys)).split(batch_size):
            cond = {name: value[rows.to(value.device) // n] for name, value in text.items()}
            x = paint(net, cond, [keys[row] for row in rows], shape, steps, mode, seed)
            images.append(decode_latents(x, pipeline.vae).cpu())
        for i, pictures in zip(some, torch.cat(images).split(n)):
            if not pictures.isfinite().all():
                raise FloatingPointError(f"prompt {i}: a picture holds NaN or infinity")
            pictures = pictures.clamp(-1, 1)  # a decoder may go a little beyond white or black
            _write(places[i], layout, records[i], ((pictures + 1) * 127.5).round().to(torch.uint8))


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


def claim(out, path, settings):
    """Note in the file `path` with which settings the folder `out` is begun.

    Raises ValueError if it holds something and was begun with others.
    """
    if out.is_dir() and any(out.iterdir()):
        begun = _read_json(path, f"record of how {out} was begun")
        for key, value in settings.items():
            if begun.get(key) != value:
                raise ValueError(f"{out} was begun with {key} {begun.get(key)}, not {value}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _write(place, layout, record, pictures):
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
