"""Named settings. A recipe is a flat dict; `--set key=value` changes one entry of it."""

import json
import math
from dataclasses import fields

from . import peers
from .losses import TwinFlowLoss
from .train import COMPILE, OPTIMIZERS, PARALLEL, PRECISIONS, WEIGHTS

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
    "lr": 1e-3,
    "warmup_steps": 900,
    "base_steps": 900,
    **IMAGES,
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


def check(config):
    """Raise ValueError for a setting out of range."""
    positive = ("size", "width", "depth", "heads", "patch", "sample_every")
    needed = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
    for key in (*needed, *(key for key in positive if key in config)):
        if config[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {config[key]}")
    least = 6 if "size" in config else 2  # of images, more than the neighbours that are looked for
    if config.get("eval_samples", least) < least:
        raise ValueError(f"eval_samples must be at least {least}, got {config['eval_samples']}")
    if not 0 < config["lr"] < math.inf:
        raise ValueError(f"lr must be a number > 0, got {config['lr']}")
    if config["clip_norm"] is not None and not config["clip_norm"] > 0:
        raise ValueError(f"clip_norm must be > 0 or None, got {config['clip_norm']}")
    if config["batch_size"] % config["accumulate"]:
        raise ValueError(f"batch_size {config['batch_size']} must be a multiple of accumulate {config['accumulate']}")
    for key, known in (("precision", PRECISIONS), ("compile", COMPILE), ("parallel", PARALLEL)):
        if config[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {config[key]!r}")
    for key in ("ema", "teacher_ema", "label_dropout"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key} must lie in [0, 1), got {config[key]}")
    for key in ("warmup_steps", "base_steps"):
        if not 0 <= config[key] <= config["steps"]:
            raise ValueError(f"{key} must lie in [0, steps], got {config[key]} of {config['steps']} steps")
    before = config["warmup_steps"] + config["base_steps"]
    if method_of(config) not in ("rcgm", "flow matching") and before >= config["steps"]:
        raise ValueError(f"the method never starts: warmup_steps + base_steps = {before} of {config['steps']} steps")
    if config["method"] != "twinflow" and (config["guidance"] or config["base_steps"]):
        raise ValueError("guidance and base_steps are for method twinflow: --set guidance=0 base_steps=0")
    if config["guidance"] and not config["conditional"]:
        raise ValueError("guidance needs labels: --set conditional=true")
    if "model" in config:
        check_backbone(config)
    loss_of(config)


def check_backbone(config):
    """Raise ValueError for settings of a pretrained backbone that do not go together."""
    for key, known in (("weights", WEIGHTS), ("optimizer", OPTIMIZERS)):
        if config[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {config[key]!r}")
    if config["lora_rank"] < 0:
        raise ValueError(f"lora_rank must be at least 0 (all parameters learn), got {config['lora_rank']}")
    in_backward = config["optimizer"] == "adafactor"
    if config["lora_rank"] and in_backward:
        raise ValueError("optimizer adafactor is for all parameters: --set lora_rank=0, or optimizer=adamw")
    if not config["lora_rank"] and not in_backward and config["weights"] == "bf16":
        raise ValueError("adamw would lose small steps in bf16: --set weights=float32, or optimizer=adafactor")
    if in_backward and (config["accumulate"] > 1 or config["clip_norm"] is not None):
        raise ValueError("optimizer adafactor steps inside the backward pass: --set accumulate=1 clip_norm=None")
    if config["data_free"] and not config["lora_rank"]:
        raise ValueError("data_free learns from the frozen original, which adapters keep: --set lora_rank=64")
    if config["method"] != "twinflow" or config["init_from"]:
        raise ValueError("a backbone begins as its model and has method twinflow: --set method=twinflow init_from=")


def loss_of(config):
    """The loss that a run's settings describe."""
    if config["method"] in peers.METHODS:
        try:
            return peers.METHODS[config["method"]](**config["peer"])
        except TypeError as error:
            raise ValueError(f"peer: {config['method']} has no such setting ({error})") from None
    if config["method"] != "twinflow" or config["peer"]:
        raise ValueError(
            f"method must be one of twinflow, {', '.join(peers.METHODS)}, and peer is for all but the first; "
            f"got {config['method']!r} and {config['peer']}"
        )
    return TwinFlowLoss(**{f.name: config[f.name] for f in fields(TwinFlowLoss) if f.name in config})


def method_of(config):
    """What a run's settings amount to: a peer, "twinflow", "rcgm" (the any-step base alone) or "flow matching"."""
    if config["method"] in peers.METHODS:
        return config["method"]
    if config["share"] > 0:
        return "twinflow"
    return "rcgm" if config["order"] > 0 and config["warmup_steps"] < config["steps"] else "flow matching"


def mode_of(config):
    """How a run's model samples in several steps; None if it makes one step only."""
    method = method_of(config)
    return peers.METHODS[method]().mode if method in peers.METHODS else "multi" if method == "flow matching" else "any"


FLOW_MATCHING = {"method": "twinflow", "peer": {}, "order": 0, "share": 0.0, "warmup_steps": 0, "base_steps": 0}
RCGM = {"share": 0.0}
