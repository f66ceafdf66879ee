"""Families: how the flow transformers of diffusers are called. To add a model is to add an entry to FAMILIES."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


def pack(x):
    """Patches of 2 x 2 pixels as tokens.  (B, C, H, W) -> (B, H/2 W/2, 4 C)."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT.contiguous()


def unpack(tokens, x):
    """The inverse of `pack`, for an image of the shape of x."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)


def _sd3(model, x, t, cond):
    text = {"encoder_hidden_states": cond["prompt_embeds"], "pooled_projections": cond["pooled"]}
    return {"hidden_states": x, "timestep": t, **text}


def _sana(model, x, t, cond):
    text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
    return {"hidden_states": x, "timestep": t, **text}


def _flux(model, x, t, cond):
    rows, columns = (torch.arange(size // 2, device=x.device) for size in x.shape[2:])
    at = torch.stack(torch.meshgrid(torch.zeros_like(rows[:1]), rows, columns, indexing="ij"), dim=-1)
    ids = {"img_ids": at.flatten(0, 2).float()}
    ids["txt_ids"] = torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device)
    return {**_sd3(model, pack(x), t, cond), **ids, "guidance": cond.get("guidance")}


def _qwen(model, x, t, cond):
    # a mask keeps attention from its fastest kernel even if it is all true, but to see whether it is would stop and
    # wait for the GPU at each call, and prompts of a batch are seldom of one length
    prompt, mask = cond["prompt_embeds"], cond["prompt_mask"].bool()
    image = {"hidden_states": pack(x), "img_shapes": [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)}
    text = {"encoder_hidden_states": prompt, "encoder_hidden_states_mask": mask}
    if "max_txt_seq_len" not in inspect.signature(model.pos_embed.forward).parameters:
        # before 0.37 diffusers took this mask and did not use it
        whole = torch.cat([mask, mask.new_ones(len(x), image["hidden_states"].shape[1])], dim=1)
        text["txt_seq_lens"] = [prompt.shape[1]] * len(x)
        text["attention_kwargs"] = {"attention_mask": whole[:, None, None]}
    return {**image, **text, "timestep": t}


def _z_image(model, x, t, cond):
    prompt, mask = cond["prompt_embeds"], cond["prompt_mask"].bool()
    texts = list(prompt) if prompt.is_meta else [row[keep] for row, keep in zip(prompt, mask)]
    return {"x": list(x[:, :, None]), "t": t, "cap_feats": texts}


@dataclass(frozen=True)
class Family:
    """How models of one diffusers class are called.

    embedder   path of the MLP that embeds the time
    sinusoids  path of the module that turns a time into the MLP's input; None if the MLP's module does so itself
    inputs     (model, x, t, cond) -> the arguments of the model; the value of t given here is not used
    cond       names of the conditions, and for those with a width where the model's config tells it
    blocks     paths of the lists of transformer blocks, in the order of use
    output     (y, x) -> velocity noise - data, (B, C, H, W), from the model's answer y
    clock      what the model calls the time |t|
    unit       config -> what the sinusoids expect for the time 1
    second     (t, r) -> what emb_r is shown; the authors' published weights are for these
    packed     whether a token is a patch that the caller packs
    off        names in the model's config that must be None or False: other variants, called in other ways
    """

    embedder: str
    sinusoids: str | None
    inputs: Callable
    cond: dict
    blocks: tuple = ("transformer_blocks",)
    output: Callable = lambda y, x: y
    clock: Callable = lambda t: t
    unit: Callable = lambda config: 1000.0
    second: Callable = lambda t, r: r
    packed: bool = False
    off: tuple = ()

    def names(self):
        """What the embedders of r and of the twin are called in files: the embedder's path, its root marked."""
        root, *rest = self.embedder.split(".")
        return tuple(".".join([f"{root}_{mark}", *rest]) for mark in ("2", "twin"))

    def roots(self):
        """How all names of extra embedders begin, whether they are of this library or not."""
        return tuple(name.split(".")[0] + "." for name in self.names())


_TEXT, _POOLED = ({"prompt_embeds": "joint_attention_dim"}, {"pooled": "pooled_projection_dim"})
_TIME = ("time_text_embed.timestep_embedder", "time_text_embed.time_proj")

FAMILIES = {
    "SD3Transformer2DModel": Family(*_TIME, _sd3, {**_TEXT, **_POOLED}),
    "SanaTransformer2DModel": Family(
        "time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", _sana,
        {"prompt_embeds": "caption_channels", "prompt_mask": None},
        unit=lambda config: 1000.0 * config.get("timestep_scale", 1.0), off=("guidance_embeds",),
    ),
    "FluxTransformer2DModel": Family(
        *_TIME, _flux, {**_TEXT, **_POOLED}, ("transformer_blocks", "single_transformer_blocks"), unpack, packed=True
    ),
    "QwenImageTransformer2DModel": Family(
        *_TIME, _qwen, {**_TEXT, "prompt_mask": None}, output=unpack, packed=True, unit=lambda config: 1.0,
        off=("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    ),
    "ZImageTransformer2DModel": Family(
        "t_embedder", None, _z_image, {"prompt_embeds": "cap_feat_dim", "prompt_mask": None},
        ("noise_refiner", "context_refiner", "layers"), lambda y, x: -torch.stack(y).squeeze(2),
        clock=lambda t: 1 - t, unit=lambda config: config["t_scale"], second=lambda t, r: t - r,
        off=("siglip_feat_dim",),
    ),
}  # fmt: skip


def family_of(kind, where):
    """The Family of a diffusers class. Raises ValueError that names the known ones."""
    if kind not in FAMILIES:
        raise ValueError(f"{where}: {kind} is none of the known flow transformers: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
