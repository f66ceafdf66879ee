"""Named settings. A recipe is a flat dict of every setting that it has, see `settings`."""

from ..method.losses import TwinFlowLoss
from ..peers import PEERS
from ..ranges import plain
from .settings import BACKBONE, LOSS, PLACING, SETTINGS, TRAINING, check

OF_LOSS = tuple(name for name in LOSS if name != "data_free")
COMMON = ("data", "conditional", "init_from", *TRAINING, *PLACING, *OF_LOSS, "log_every", "checkpoint_every")
OF_POINTS = (*COMMON, "net", "width", "depth", "sharp", "predicts", "shifted", "time_shape", "eval_samples")
OF_IMAGES = (
    *COMMON, "net", "predicts", "shifted", "size", "data_dir", "flip", "subset", "features", "sample_every",
    "time_shape", "eval_samples",
)  # fmt: skip
OF_BACKBONES = (*(name for name in COMMON if name != "muon_lr"), *BACKBONE, "sample_every", "vae")
FOR_IMAGES = {"conditional": True, "clip_norm": 1.0, "log_every": 10, "eval_samples": 10000}


def recipe_of(names, **values):
    """Settings of these names and of those of the values, the others at their defaults."""
    defaults = {name: SETTINGS[name].default for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (defaults | values).items()}


def images_of(**values):
    """A recipe for images: what all of these share, but for the values."""
    return recipe_of(OF_IMAGES, **FOR_IMAGES | values)


RECIPES = {
    "toy": recipe_of(
        OF_POINTS, muon_lr=1e-2, flow_share=0.3, one_step_share=0.4, jump_c=0.12, time_shape=(1.0, 2.5, 1.0)
    ),
    "fashion": images_of(
        data="fashion", size=28, net="dit", width=256, depth=8, heads=4, patch=2,
        steps=3000, batch_size=384, lr=4e-3, muon_lr=1e-2, warmup_steps=900, base_steps=900, one_step_share=0.7,
        precision="tf32",
    ),
    "clipart": images_of(
        data="clipart", flip=True, net="dit", width=256, depth=8, heads=4, patch=2,
        steps=10000, batch_size=256, lr=4e-3, muon_lr=1e-2, warmup_steps=3000, base_steps=3000, one_step_share=0.7,
        precision="bf16",
    ),
    "cifar": images_of(
        data="cifar10", flip=True, net="unet", width=128, depth=2,
        steps=100000, batch_size=384, lr=3e-4, warmup_steps=40000, base_steps=20000, ema=0.9999, precision="bf16",
        checkpoint_every=2000, sample_every=2000,
    ),
    "imagenet": images_of(
        data="latents", flip=True, net="dit-xl-2", epsilon=False, vae="",
        steps=400000, batch_size=240, lr=1e-4, warmup_steps=200000, base_steps=100000, ema=0.9999, precision="bf16",
        guidance=0.5, compile="default", log_every=100, checkpoint_every=5000, sample_every=5000,
    ),
    "text": recipe_of(
        OF_BACKBONES, data="texts", conditional=True, steps=2000, batch_size=8, lr=1e-4,
        warmup_steps=0, base_steps=0, ema=0.99, label_dropout=0.0, recompute=True,
        **{name: getattr(TwinFlowLoss.paper(flow_share=0.5, guidance=0.5), name) for name in LOSS},
    ),
}  # fmt: skip


def configured(recipe, texts=(), **changes):
    """The settings of a run of a recipe, its name among them, with changes: key=value texts, then values by name.

    If `steps` is changed, phases whose length is not given keep their share of it. Raises ValueError for an unknown
    recipe or name, and for a value out of its range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose from {', '.join(RECIPES)}")
    own, given = RECIPES[recipe], {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {text!r}")
        given[name] = SETTINGS[name].parse(name, value) if name in own else value
    given |= {name: plain(value) for name, value in changes.items()}
    for name in given.keys() - own.keys():
        raise ValueError(f"unknown setting {name!r}: {recipe} has {', '.join(own)}")
    for name, value in given.items():
        SETTINGS[name].check(name, value)
    config = {"recipe": recipe, **own, **given}
    if config["method"] != "twinflow":
        config["base_steps"] = given.get("base_steps", 0)
        config |= getattr(PEERS[config["method"]], "needs", {}) | given
    for name in {"warmup_steps", "base_steps"} - given.keys():
        config[name] = round(config[name] * config["steps"] / own["steps"])
    check(config)
    return config
