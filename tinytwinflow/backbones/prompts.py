"""Prompts: from words and pictures to what a backbone sees, and from its latents to pictures.

What a family does with a prompt is the business of its diffusers pipeline, whose text encoders and autoencoder are
loaded here without the backbone; the family's `Pipeline` tells how to ask it.
"""

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ..files import damage_named, read_json
from .families import FAMILIES, diffusers_class


def load_pipeline(path, device="cpu", dtype=torch.bfloat16, whole=False, backbone=True):
    """A diffusers pipeline folder, for inference: its text encoders in dtype, its autoencoder in float32.

    Of the backbone only the settings are read; whole: the pipeline is to paint, so its backbone is read too, unless
    backbone=False leaves its place free, and all is in dtype. Raises ValueError if diffusers is not there, or the
    folder is no whole pipeline of a family.
    """
    files = ("model_index.json", "transformer/config.json")
    index, settings = (read_json(Path(path) / name, "diffusers pipeline") for name in files)
    kind, own_kind = index.get("_class_name"), settings.get("_class_name")
    pipeline_of(kind, path)
    pipeline = diffusers_class(kind, path)
    how = {name: None for name, about in index.items() if about == [None, None]}  # SD3 may come without its T5
    if not whole or not backbone:  # of Wan 2.2 there are two
        how |= {
            name: None
            for name, about in index.items()
            if name == "transformer" or isinstance(about, list) and about[-1] == own_kind
        }
    how["torch_dtype"] = dtype if whole else {"default": dtype, "vae": torch.float32}
    with damage_named(path, f"no whole {kind}"):
        pipeline = pipeline.from_pretrained(str(path), local_files_only=True, **how)
    if not whole:  # all that encode_prompt asks of it
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**settings))
    return pipeline.to(device)


def pipeline_of(kind, where="pipeline"):
    """What the families say of a pipeline class. Raises ValueError that names the known ones."""
    known = {pipeline.name: pipeline for family in FAMILIES.values() for pipeline in family.pipelines}
    if kind not in known:
        raise ValueError(f"{where}: {kind} is none of the known pipelines: {', '.join(known)}")
    return known[kind]


@torch.no_grad()
def encode_text(pipeline, prompts, tokens=None, pictures=None):
    """Conditions of a list of prompts, by the names that a `Velocity` takes them by.  -> dict of (n, ...).

    tokens: length of prompt_embeds (of SD3: of T5's part). Where a mask tells how much of it the prompt fills, a prompt
    that fills all is warned of, because the pipeline cuts what is beyond; of others diffusers itself does.
    pictures: of PIL, that to edit of each prompt, for pipelines that read it among the words; others let it be.
    """
    about, call = pipeline_of(type(pipeline).__name__), inspect.signature(type(pipeline).__call__).parameters
    tokens, device = about.tokens if tokens is None else tokens, pipeline.device
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if about.encode:
        cond = about.encode(pipeline, list(prompts), tokens)
    elif about.sees:
        cond = _with_pictures(pipeline, about, prompts, tokens, pictures)
    else:
        own = {name: call[name].default for name in about.own if any(prompts)}
        takes = inspect.signature(pipeline.encode_prompt).parameters
        if "max_sequence_length" not in takes and tokens != about.tokens:
            raise ValueError(f"{type(pipeline).__name__} makes prompts of {about.tokens} tokens, not of {tokens}")
        size = {"max_sequence_length": tokens, "batch_size": len(prompts)}
        options = {**about.options, **own, **size, "device": device}
        answer = pipeline.encode_prompt(list(prompts), **{name: options[name] for name in options if name in takes})
        cond = {name: value for name, value in zip(about.outputs, answer) if name}
        if "prompt_mask" in cond or isinstance(cond["prompt_embeds"], list):
            cond["prompt_embeds"], cond["prompt_mask"] = _padded(cond["prompt_embeds"], cond.get("prompt_mask"), tokens)
    for i in cond["prompt_mask"].all(1).nonzero()[:1] if "prompt_mask" in cond else ():
        warnings.warn(f"{prompts[i][:60]!r} fills all {tokens} tokens: what is beyond is cut", stacklevel=2)
    cond |= {name: value.bool() for name, value in cond.items() if name.endswith("mask")}
    cond |= about.more(pipeline, len(prompts))
    if getattr(pipeline.transformer.config, "guidance_embeds", False):
        cond["guidance"] = torch.full((len(prompts),), float(call["guidance_scale"].default), device=device)
    return cond


def _with_pictures(pipeline, about, prompts, tokens, pictures):
    """Conditions of prompts that are read together with the picture to edit, of which nothing is cut."""
    if pictures is None or len(pictures) != len(prompts):
        raise ValueError(f"{about.name} reads a prompt together with the picture to edit: give one for each prompt")
    rows = []
    for words, picture in zip(prompts, pictures):  # of several pictures a pipeline may make parts of one prompt
        embeds, _ = pipeline.encode_prompt([words], image=[about.sees(pipeline, picture)], device=pipeline.device)
        rows.append(embeds[0])
    longest = max(map(len, rows))
    if longest > tokens:
        raise ValueError(f"a prompt and its picture are {longest} tokens, and {tokens} were asked for")
    return dict(zip(("prompt_embeds", "prompt_mask"), _padded(rows, None, tokens)))


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


def _units(pipeline):
    """How latents lie: whether with an axis of frames, and whether patches of how many pixels a side are channels; then
    their mean and deviation: a backbone sees (latent - mean) / deviation.
    """
    vae, frames = pipeline.vae, pipeline_of(type(pipeline).__name__).frames
    if hasattr(vae, "bn"):
        variance = vae.bn.running_var + vae.config["batch_norm_eps"]
        return frames, 2, vae.bn.running_mean.view(-1, 1, 1), variance.sqrt().view(-1, 1, 1)
    if frames:
        keys = ("latents_mean", "latents_std")
        return frames, 1, *(torch.tensor(vae.config[key], device=vae.device).view(-1, 1, 1) for key in keys)
    return frames, 1, vae.config.get("shift_factor") or 0.0, 1 / vae.config["scaling_factor"]


@torch.no_grad()
def encode_images(x, pipeline):
    """Scaled latents of images in [-1, 1], the middle of the posterior.  (n, 3, H, W) -> (n, C, h, w) float32."""
    vae, (frames, side, mean, std) = pipeline.vae, _units(pipeline)
    x = x.to(vae.device, vae.dtype)
    answer = vae.encode(x[:, :, None] if frames else x)
    latent = answer.latent if hasattr(answer, "latent") else answer.latent_dist.mode()
    latent = (latent[:, :, 0] if frames else latent).float()
    return (nn.functional.pixel_unshuffle(latent, side) - mean) / std


def load_decoder(path, device="cpu"):
    """A diffusers pipeline folder of which the autoencoder alone is read, in float32: enough for `decode_latents`.

    Raises ValueError if the folder is no pipeline of a family.
    """
    index = read_json(Path(path) / "model_index.json", "diffusers pipeline")
    kind = index.get("_class_name")
    pipeline_of(kind, path)
    parts = {name: None for name, about in index.items() if isinstance(about, list)}
    with damage_named(path, f"no whole {kind}"):
        vae = diffusers_class(index["vae"][1], path)
        parts["vae"] = vae.from_pretrained(str(path), subfolder="vae", local_files_only=True, torch_dtype=torch.float32)
        return diffusers_class(kind, path)(**parts).to(device)


def picture_unit(path):
    """What the sides of a pipeline's pictures must be multiples of: its autoencoder's factor times a patch's side.

    Raises ValueError if it makes something else than pictures.
    """
    config = read_json(Path(path) / "transformer/config.json", "diffusers pipeline")
    return unit_of(load_decoder(path), config, path)


def unit_of(pipeline, config, path):
    """What `picture_unit` says of the folder that a pipeline was read from; config: of its backbone."""
    kind = type(pipeline).__name__
    axes = next(f.axes for f in FAMILIES.values() if any(p.name == kind for p in f.pipelines))(config)
    if [*axes] != ["C", "H", "W"]:
        raise ValueError(f"{path}: {kind} makes no pictures")
    return pixels_of_latent(pipeline) * axes["H"]


def pixels_of_latent(pipeline):
    """How many pixels a side of a picture has for one of its latents."""
    return pipeline.vae_scale_factor * _units(pipeline)[1]


@torch.no_grad()
def decode_latents(x, pipeline):
    """Images, about in [-1, 1], from scaled latents: the inverse.  (n, C, h, w) -> (n, 3, H, W) float32."""
    vae, (frames, side, mean, std) = pipeline.vae, _units(pipeline)
    latent = nn.functional.pixel_shuffle(x.to(vae.device) * std + mean, side).to(vae.dtype)
    image = vae.decode(latent[:, :, None] if frames else latent).sample
    return (image[:, :, 0] if frames else image).float()
