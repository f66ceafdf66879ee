"""Family: what is known of a kind of flow transformer, in one entry; a model is added by adding an entry.

A family must give where the small MLP is that embeds the time, how the model is called and which conditions it takes;
the rest has defaults, see `Family`. The model itself must have

    config            mapping with the widths of the conditions under the names that `cond` says, and, unless `axes`
                      and `out` are given, in_channels and patch_size, by which height and width can be divided
    forward           called with what `inputs` makes and return_dict=False; its answer's first part is the velocity
    from_pretrained, save_pretrained, from_config      of diffusers' ModelMixin and ConfigMixin, only to load and save

A family of your own needs no change in this package. Once this is run, --net mine and all else know it:

>>> import torch
>>> from torch import nn
>>> from tinytwinflow.backbones.families import FAMILIES
>>> from tinytwinflow.backbones.family import Configuration, Family
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
...     embedder="time", sinusoids="waves", cond={"prompt_embeds": ("L", "words")}, blocks=("blocks",),
...     inputs=lambda model, x, t, cond: {"image": x, "time": t, "text": cond["prompt_embeds"]},
...     model=MyTransformer2DModel, published={"mine": Configuration({}, latents=(4, 8, 8), tokens=3)})
>>> net, x, t = Velocity(MyTransformer2DModel()), torch.randn(2, 4, 8, 8), torch.rand(2)
>>> net(x, t, 0 * t, {"prompt_embeds": torch.randn(2, 3, 6)}).shape
torch.Size([2, 4, 8, 8])
>>> del FAMILIES["MyTransformer2DModel"]
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


def pack(x):
    """Patches of 2 x 2 pixels as tokens.  (B, C, H, W) -> (B, H/2 W/2, 4 C)."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT.contiguous()


def unpack(tokens, x):
    """The inverse of `pack`, for an image of the shape of x."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)


def image_axes(config):
    """The axes of a latent (C, H, W) that is cut into square patches."""
    return {"C": config["in_channels"], "H": config.get("patch_size", 2), "W": config.get("patch_size", 2)}


def packed_axes(config):
    """The axes of a latent (C, H, W) whose patches of 2 x 2 the caller packs."""
    return {"C": config["in_channels"] // 4, "H": 2, "W": 2}


def channels_out(config):
    """Channels of a model's answer."""
    return config.get("out_channels") or config["in_channels"]


def packed_out(config):
    """Channels of the answer of a model whose caller packs."""
    return channels_out(config) * config["patch_size"] ** 2 // 4


@dataclass(frozen=True)
class Pipeline:
    """How a diffusers pipeline of a family turns words and pictures into what its backbone sees."""

    name: str  # its class
    tokens: int  # length of the prompt unless another is asked for
    outputs: tuple  # what its encode_prompt returns, in its order; None is not kept
    options: dict = field(default_factory=dict)  # more for encode_prompt; without guidance, a second prompt
    own: tuple = ()  # arguments that it fills in itself when it makes a picture, but not for the empty prompt
    frames: bool = False  # whether its autoencoder is one of videos: an axis of frames, a mean and deviation a channel
    plain: dict = field(default_factory=dict)  # of a call: without guidance, and sizes and words as they are given
    encode: Callable | None = None  # (pipeline, prompts, tokens) -> conditions, where its encode_prompt needs more
    sees: Callable | None = None  # (pipeline, picture to edit) -> as its text encoder is shown it; None if it is not
    edits: bool | None = False  # whether it must be shown a picture to edit; None: it may be
    more: Callable = lambda pipeline, n: {}  # (pipeline, n) -> conditions of n rows that are not of the prompt


@dataclass(frozen=True)
class Configuration:
    """A published model of a family."""

    settings: dict  # of the model's class, where they differ from its defaults
    latents: tuple  # shape of a usual sample: (C, H, W), (C, T, H, W), (C, T)
    tokens: int  # of a usual prompt


@dataclass(frozen=True)
class Family:
    """How models of one diffusers class are called, and what else is known of them.

    The axes of a condition, after its rows, are a key of the config, whose value is the width; a capital letter, for a
    length that is free, one letter one length; a whole number; or a function of the config. Masks end in "mask".
    """

    embedder: str  # path of the MLP that embeds the time; what it is given has the precision of its weights
    sinusoids: str | Callable | None  # makes the MLP's input of times: path of a module, a function, or the MLP itself
    inputs: Callable  # (model, x, t, cond) -> the arguments of the model; the value of t given here is not used
    cond: dict  # name of a condition -> its axes
    blocks: tuple = ("transformer_blocks",)  # paths of the lists of transformer blocks, in the order of use
    output: Callable = lambda y, x: y  # (y, x) -> velocity noise - data, of the shape of x, from the model's answer y
    axes: Callable = image_axes  # config -> axes of x after its rows: "C" its channels, others what divides them
    out: Callable = (
        channels_out  # config -> channels of the velocity: where they are not those of x, it is another kind
    )
    optional: dict = field(default_factory=dict)  # as `cond`: conditions that may be absent
    clock: Callable = lambda t: t  # what the model calls the time |t|
    unit: Callable = lambda config: 1000.0  # config -> what the sinusoids expect for the time 1
    second: Callable = lambda t, r: r  # what emb_r is shown; the authors' published weights are for these
    shares: Callable = lambda t, r: (1.0, t - r)  # what emb(|t|) and emb_r are multiplied by before they are added
    given: str | None = None  # what emb_r is called in the files of models that have one from the start
    variant: Callable = lambda config: {}  # config -> what is otherwise than here in models with such settings
    rows: Callable = lambda config, n: n  # how many of the n rows to embed are x's: behind are conditions', at time 0
    off: tuple = ()  # names in the model's config that must be None or False: other variants, called in other ways
    pipelines: tuple = ()  # how words and pictures are encoded, first those of a prompt; without, it is done elsewhere
    published: dict = field(default_factory=dict)  # name, as --net takes it, -> Configuration
    small: dict = field(default_factory=dict)  # settings that make any of these small enough for a CPU
    model: type | None = None  # the class itself, where diffusers has none of that name

    def names(self):
        """What the embedders of r and of the twin are called in files: the embedder's path, its root marked."""
        root, *rest = self.embedder.split(".")
        return tuple(".".join([f"{root}_{mark}", *rest]) for mark in ("2", "twin"))

    def roots(self):
        """How all names of extra embedders begin, whether they are of this library or not."""
        roots = tuple(name.split(".")[0] + "." for name in self.names())
        return (*roots, f"{self.given}.") if self.given else roots


def sizes(axes, config, lengths):
    """The sizes of a condition's axes, see `Family`; of a free one what `lengths` says, its letter if nothing.

    >>> sizes(("L", "words", 3), {"words": 6}, {"L": 5}), sizes(("L",), {}, {})
    ((5, 6, 3), ('L',))
    """
    return tuple(
        lengths.get(axis, axis) if free(axis) else axis(config) if callable(axis) else config.get(axis, axis)
        for axis in axes
    )


def free(axis):
    """Whether an axis of a condition is one whose length is free: a capital letter."""
    return isinstance(axis, str) and axis[0].isupper()
