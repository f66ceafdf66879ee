"""Named settings. A recipe is a flat dict; `--set key=value` changes one entry of it."""

import json
from dataclasses import fields

from .config import check
from ..method.losses import TwinFlowLoss

LOSS = {  # see peers.METHODS, where a method's own settings are fields to change by peer={"name": value}; TwinFlowLoss
    "method": "twinflow",
    "peer": {},
    "order": 8,
    "share": 1 / 3,
    "flow_share": 0.5,
    "one_step_share": 0.3,
    "dt": 0.01,
    "times": [1.0, 1.0],
    "even_inner": True,
    "metric": "squared",
    "adversarial_weight": 0.3,
    "rectify_weight": 0.3,
    "rectify_clip": None,
    "gain": 4.0,
    "clip": 10.0,
    "guidance": 0.0,
    "guidance_range": [0.0, 1.0],
}

ENGINE = {  # see train.train, and for the last four build.first_weights and scale.prepare
    "ema": 0.999,
    "teacher_ema": 0.99,
    "label_dropout": 0.1,
    "accumulate": 1,
    "clip_norm": None,
    "precision": "float32",
    "init_from": "",
    "parallel": "ddp",
    "recompute": False,
    "compile": "none",
}
PLACING = ("init_from", "parallel", "recompute", "compile")  # how a run's networks are made, see scale.start

TOY = {
    "data": "8gaussians",
    "conditional": False,
    "net": "mlp",
    "width": 256,
    "depth": 4,
    "sharp": True,
    "steps": 2000,
    "batch_size": 512,
    "lr": 2.5e-3,
    "warmup_steps": 500,
    "base_steps": 700,
    **ENGINE,
    **LOSS,
    "log_every": 1,
    "checkpoint_every": 500,
    "eval_samples": 20000,
}

IMAGES = {
    "data_dir": "data",
    "flip": False,
    "subset": 0,
    "conditional": True,
    **ENGINE,
    **LOSS,
    "clip_norm": 1.0,
    "features": "classifier",
    "log_every": 10,
    "checkpoint_every": 500,
    "sample_every": 500,
    "eval_samples": 10000,
}

FASHION = {
    "data": "fashion",
    "size": 28,
    "net": "dit",
    "width": 256,
    "depth": 8,
    "heads": 4,
    "patch": 2,
    "steps": 3000,
    "batch_size": 384,
    "lr": 4e-3,
    "warmup_steps": 900,
    "base_steps": 900,
    **IMAGES,
    "one_step_share": 0.7,
}

CIFAR = {
    "data": "cifar10",
    "size": 32,
    "net": "unet",
    "width": 128,
    "depth": 2,
    "steps": 100000,
    "batch_size": 384,
    "lr": 3e-4,
    "warmup_steps": 40000,
    "base_steps": 20000,
    **IMAGES,
    "flip": True,
    "ema": 0.9999,
    "precision": "bf16",
    "checkpoint_every": 2000,
    "sample_every": 2000,
}

IMAGENET = {
    "data": "latents",
    "size": 32,
    "net": "dit-xl-2",
    "epsilon": False,
    "vae": "",
    "steps": 400000,
    "batch_size": 240,
    "lr": 1e-4,
    "warmup_steps": 200000,
    "base_steps": 100000,
    **IMAGES,
    "flip": True,
    "ema": 0.9999,
    "guidance": 0.5,
    "precision": "bf16",
    "compile": "default",
    "log_every": 100,
    "checkpoint_every": 5000,
    "sample_every": 5000,
}

TEXT = {
    "data": "texts",
    "model": "model",
    "weights": "bf16",
    "lora_rank": 64,
    "lora_layers": [],
    "optimizer": "adamw",
    "latents": [],
    "conditional": True,
    "steps": 2000,
    "batch_size": 8,
    "lr": 1e-4,
    "warmup_steps": 0,
    "base_steps": 0,
    **ENGINE,
    **LOSS,
    **{f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(TwinFlowLoss)},
    "guidance": 0.5,
    "ema": 0.99,
    "label_dropout": 0.0,
    "recompute": True,
    "log_every": 1,
    "checkpoint_every": 500,
    "sample_every": 500,
}

RECIPES = {"toy": TOY, "fashion": FASHION, "cifar": CIFAR, "imagenet": IMAGENET, "text": TEXT}


def settings(recipe, changes=()):
    """A recipe's settings with changes, a list of "key=value".  -> dict.

    If `steps` is changed, phases whose length is not given keep their share of it.
    Raises ValueError for an unknown recipe or key, and for a value of the wrong kind or size.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose from {', '.join(RECIPES)}")
    config = dict(RECIPES[recipe])
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {change!r}")
        if key not in config:
            raise ValueError(f"unknown key {key!r}: {recipe} has {', '.join(config)}")
        config[key] = _parse(key, text, RECIPES[recipe][key])
    given = {change.partition("=")[0] for change in changes}
    if config["method"] != "twinflow" and "base_steps" not in given:
        config["base_steps"] = 0
    for key in {"warmup_steps", "base_steps"} - given:
        config[key] = round(config[key] * config["steps"] / RECIPES[recipe]["steps"])
    check(config)
    return config


def _parse(key, text, default):
    """Read a value as the kind its default has; None may become a number."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text.lower() if text in ("True", "False", "None") else text)
    except json.JSONDecodeError:
        value = None if text == "None" else text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    none_too = default is None or key == "clip_norm"
    kind = (float, int, type(None)) if none_too else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = "a number or None" if none_too else f"{kind.__name__}, like {json.dumps(default)}"
        raise ValueError(f"{key} takes {wanted}, got {text!r}")
    return value


FLOW_MATCHING = {"method": "twinflow", "peer": {}, "order": 0, "share": 0.0, "warmup_steps": 0, "base_steps": 0}
RCGM = {"share": 0.0}
