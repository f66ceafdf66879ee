"""Families: all that is known of a kind of flow transformer. To add a model is to add an entry to FAMILIES.

A family must give where the small MLP is that embeds the time, how the model is called and which conditions it takes;
the rest has defaults, see `Family`. The model itself must have

    config            mapping with in_channels, the width of each condition under the name that `cond` says, and
                      patch_size (default 2), the side that divides a latent's height and width
    forward           called with what `inputs` makes and return_dict=False; its answer's first part is the velocity
    from_pretrained, save_pretrained, from_config      of diffusers' ModelMixin and ConfigMixin, only to load and save

A family of your own needs no change in this package. Once this is run, --net mine and all else know it:

>>> import torch
>>> from torch import nn
>>> from tinytwinflow.backbones.families import FAMILIES, Configuration, Family
>>> from tinytwinflow.backbones.velocity import Velocity
>>> class MyTransformer2DModel(nn.Module):
...     config = {"in_channels": 4, "patch_size": 1, "words": 6}
...     def __init__(self):
...         super().__init__()
...         self.waves, self.time = nn.Unflatten(0, (-1, 1)), nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 4))
...         self.text, self.blocks = nn.Linear(6, 4), nn.ModuleList([nn.Linear(4, 4)])
...     def forward(self, image, time, text, return_dict=True):
...         add = self.time(self.waves(time).to(image.dtype)) + self.text(text).mean(1)
...         return (self.blocks[0](image.movedim(1, 3) + add[:, None, None]).movedim(3, 1),)
>>> FAMILIES["MyTransformer2DModel"] = Family(
...     embedder="time", sinusoids="waves", cond={"prompt_embeds": "words"}, blocks=("blocks",),
...     inputs=lambda model, x, t, cond: {"image": x, "time": t, "text": cond["prompt_embeds"]},
...     model=MyTransformer2DModel, published={"mine": Configuration({}, latents=(4, 8, 8), tokens=3)})
>>> net, x, t = Velocity(MyTransformer2DModel()), torch.randn(2, 4, 8, 8), torch.rand(2)
>>> net(x, t, 0 * t, {"prompt_embeds": torch.randn(2, 3, 6)}).shape
torch.Size([2, 4, 8, 8])
>>> del FAMILIES["MyTransformer2DModel"]
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

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


def _places(mask):
    """Where a mask (L,) is true.  -> list"""
    return mask.nonzero()[:, 0].tolist()


def _z_image(model, x, t, cond):
    prompt = cond["prompt_embeds"]
    # the model takes texts of their own lengths, so these must be known: one wait for the GPU a call
    masks = torch.ones(prompt.shape[:2], device="cpu") if prompt.is_meta else cond["prompt_mask"].cpu()
    texts = [row[: len(on)] if on == [*range(len(on))] else row[on] for row, on in zip(prompt, map(_places, masks))]
    return {"x": list(x[:, :, None]), "t": t, "cap_feats": texts}


@dataclass(frozen=True)
class Pipeline:
    """How the diffusers pipeline of a family turns words and pictures into what its backbone sees."""

    name: str  # its class
    tokens: int  # length of the prompt unless another is asked for
    outputs: tuple  # what its encode_prompt returns, in its order; None is not kept
    options: dict = field(default_factory=dict)  # more for encode_prompt; without guidance, a second prompt
    own: tuple = ()  # arguments that it fills in itself when it makes a picture, but not for the empty prompt
    frames: bool = False  # whether its autoencoder is one of videos: an axis of frames, a mean and deviation a channel


@dataclass(frozen=True)
class Configuration:
    """A published model of a family."""

    settings: dict  # of the model's class, where they differ from its defaults
    latents: tuple  # (C, H, W) of a usual image
    tokens: int  # of a usual prompt


@dataclass(frozen=True)
class Family:
    """How models of one diffusers class are called, and what else is known of them."""

    embedder: str  # path of the MLP that embeds the time; what it is given has the precision of its weights
    sinusoids: str | None  # path of the module that turns a time into the MLP's input; None if the MLP does so itself
    inputs: Callable  # (model, x, t, cond) -> the arguments of the model; the value of t given here is not used
    cond: dict  # names of the conditions, and for those with a width where the model's config tells it
    blocks: tuple = ("transformer_blocks",)  # paths of the lists of transformer blocks, in the order of use
    output: Callable = lambda y, x: y  # (y, x) -> velocity noise - data, (B, C, H, W), from the model's answer y
    clock: Callable = lambda t: t  # what the model calls the time |t|
    unit: Callable = lambda config: 1000.0  # config -> what the sinusoids expect for the time 1
    second: Callable = lambda t, r: r  # what emb_r is shown; the authors' published weights are for these
    packed: bool = False  # whether a token is a patch that the caller packs
    off: tuple = ()  # names in the model's config that must be None or False: other variants, called in other ways
    pipeline: Pipeline | None = None  # how words and pictures are encoded; without, embeddings are made elsewhere
    published: dict = field(default_factory=dict)  # name, as --net takes it, -> Configuration
    small: dict = field(default_factory=dict)  # settings that make any of these small enough for a CPU
    model: type | None = None  # the class itself, where diffusers has none of that name

    def names(self):
        """What the embedders of r and of the twin are called in files: the embedder's path, its root marked."""
        root, *rest = self.embedder.split(".")
        return tuple(".".join([f"{root}_{mark}", *rest]) for mark in ("2", "twin"))

    def roots(self):
        """How all names of extra embedders begin, whether they are of this library or not."""
        return tuple(name.split(".")[0] + "." for name in self.names())


_TEXT, _POOLED = ({"prompt_embeds": "joint_attention_dim"}, {"pooled": "pooled_projection_dim"})
_TIME = ("time_text_embed.timestep_embedder", "time_text_embed.time_proj")
_UNGUIDED = {"do_classifier_free_guidance": False}
_SMALL = {"num_layers": 1, "num_attention_heads": 2}

FAMILIES = {
    "SD3Transformer2DModel": Family(
        *_TIME, _sd3, {**_TEXT, **_POOLED},
        pipeline=Pipeline("StableDiffusion3Pipeline", 256, ("prompt_embeds", None, "pooled", None),
                          {**_UNGUIDED, "prompt_2": None, "prompt_3": None}),
        published={"sd3.5-large": Configuration(
            {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
             "qk_norm": "rms_norm"}, (16, 128, 128), 333)},
        small={**_SMALL, "caption_projection_dim": 128},
    ),
    "SanaTransformer2DModel": Family(
        "time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", _sana,
        {"prompt_embeds": "caption_channels", "prompt_mask": None},
        unit=lambda config: 1000.0 * config.get("timestep_scale", 1.0), off=("guidance_embeds",),
        pipeline=Pipeline("SanaPipeline", 300, ("prompt_embeds", "prompt_mask", None, None), _UNGUIDED,
                          own=("complex_human_instruction",)),
        published={"sana-1.6b": Configuration({}, (32, 32, 32), 300)},
        small={**_SMALL, "num_cross_attention_heads": 1, "cross_attention_head_dim": 64, "cross_attention_dim": 64},
    ),
    "FluxTransformer2DModel": Family(
        *_TIME, _flux, {**_TEXT, **_POOLED}, ("transformer_blocks", "single_transformer_blocks"), unpack, packed=True,
        pipeline=Pipeline("FluxPipeline", 512, ("prompt_embeds", "pooled", None)),
        published={"flux": Configuration({}, (16, 128, 128), 512)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "QwenImageTransformer2DModel": Family(
        *_TIME, _qwen, {**_TEXT, "prompt_mask": None}, output=unpack, packed=True, unit=lambda config: 1.0,
        off=("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
        pipeline=Pipeline("QwenImagePipeline", 512, ("prompt_embeds", "prompt_mask"), frames=True),
        published={"qwen-image": Configuration({}, (16, 128, 128), 512)},
        small=_SMALL,
    ),
    "ZImageTransformer2DModel": Family(
        "t_embedder", None, _z_image, {"prompt_embeds": "cap_feat_dim", "prompt_mask": None},
        ("noise_refiner", "context_refiner", "layers"), lambda y, x: -torch.stack(y).squeeze(2),
        clock=lambda t: 1 - t, unit=lambda config: config["t_scale"], second=lambda t, r: t - r,
        off=("siglip_feat_dim",),
        pipeline=Pipeline("ZImagePipeline", 512, ("prompt_embeds", None), _UNGUIDED),
        published={"z-image": Configuration({}, (16, 128, 128), 512)},
        small={"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2},
    ),
}  # fmt: skip


def family_of(kind, where):
    """The Family of a diffusers class. Raises ValueError that names the known ones."""
    if kind not in FAMILIES:
        raise ValueError(f"{where}: {kind} is none of the known flow transformers: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def published_names():
    """What --net may name."""
    return [name for family in FAMILIES.values() for name in family.published]


def published_backbone(name):
    """The class of a published model, by name, and its Configuration. Raises ValueError that names the known ones."""
    for kind, family in FAMILIES.items():
        if name in family.published:
            return kind, family.published[name]
    raise ValueError(f"unknown backbone {name!r}: choose from {', '.join(published_names())}")


def diffusers_class(kind, where):
    """The class of a family's models, or of its pipeline. Raises ValueError if diffusers, or that in it, is missing."""
    if kind in FAMILIES and FAMILIES[kind].model:
        return FAMILIES[kind].model
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{where}: {kind} needs diffusers: pip install 'tinytwinflow[large]'") from error
    if not hasattr(diffusers, kind):
        raise ValueError(f"{where}: diffusers {diffusers.__version__} has no {kind}: install a newer one")
    return getattr(diffusers, kind)
