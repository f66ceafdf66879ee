"""Named settings. A recipe is a flat dict; `--set key=value` changes one entry of it."""

import json
from dataclasses import fields

from .losses import TwinFlowLoss

TOY = {
    # data and network
    "data": "8gaussians",
    "conditional": False,
    "width": 256,
    "depth": 4,
    # training
    "steps": 3200,
    "batch_size": 512,
    "lr": 4e-3,
    "warmup_steps": 800,
    "base_steps": 1120,
    "ema": 0.999,
    "teacher_ema": 0.99,
    "label_dropout": 0.1,
    # the loss, see TwinFlowLoss
    "order": 8,
    "share": 1 / 3,
    "flow_share": 0.75,
    "one_step_share": 0.5,
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
    # what a run leaves behind
    "log_every": 1,
    "checkpoint_every": 500,
    "eval_samples": 20000,
}

RECIPES = {"toy": TOY}


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
    kind = (float, int, type(None)) if default is None else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = "a number or None" if default is None else f"{kind.__name__}, like {json.dumps(default)}"
        raise ValueError(f"{key} takes {wanted}, got {text!r}")
    return value


def check(config):
    """Raise ValueError for a setting out of range."""
    for key in ("steps", "batch_size", "width", "depth", "log_every", "checkpoint_every"):
        if config[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {config[key]}")
    if config["eval_samples"] < 2:
        raise ValueError(f"eval_samples must be at least 2, got {config['eval_samples']}")
    if not config["lr"] > 0:
        raise ValueError(f"lr must be > 0, got {config['lr']}")
    for key in ("ema", "teacher_ema", "label_dropout"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key} must lie in [0, 1), got {config[key]}")
    for key in ("warmup_steps", "base_steps"):
        if not 0 <= config[key] <= config["steps"]:
            raise ValueError(f"{key} must lie in [0, steps], got {config[key]} of {config['steps']} steps")
    before = config["warmup_steps"] + config["base_steps"]
    if config["share"] > 0 and before >= config["steps"]:
        raise ValueError(f"the twin never starts: warmup_steps + base_steps = {before} of {config['steps']} steps")
    if config["guidance"] and not config["conditional"]:
        raise ValueError("guidance needs labels: --set conditional=true")
    loss_of(config)


def loss_of(config):
    """The loss that a run's settings describe."""
    return TwinFlowLoss(**{f.name: config[f.name] for f in fields(TwinFlowLoss) if f.name in config})


def method_of(config):
    """What a run's settings amount to: "twinflow", "rcgm" (the any-step base alone) or "flow matching"."""
    if config["share"] > 0:
        return "twinflow"
    return "rcgm" if config["order"] > 0 and config["warmup_steps"] < config["steps"] else "flow matching"


FLOW_MATCHING = {"order": 0, "share": 0.0, "warmup_steps": 0, "base_steps": 0}
RCGM = {"share": 0.0}
