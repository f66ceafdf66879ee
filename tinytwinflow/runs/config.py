"""A run's settings, a flat dict: whether they go together, and the loss and the method that they amount to."""

import math
from dataclasses import fields

from .. import peers
from ..method.losses import TwinFlowLoss
from ..training.loop import COMPILE, OPTIMIZERS, PARALLEL, PRECISIONS, WEIGHT_DTYPES


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
    if config["compile"] == "graphs" and (config["accumulate"] > 1 or config["parallel"] != "ddp"):
        raise ValueError("graphs overwrite gradients and know no pieces: --set accumulate=1 parallel=ddp")
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
    for key, known in (("weights", WEIGHT_DTYPES), ("optimizer", OPTIMIZERS)):
        if config[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {config[key]!r}")
    if not config["conditional"]:
        raise ValueError("a backbone needs its prompts: --set conditional=true")
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
    if config["method"] in peers.PEERS:
        try:
            return peers.PEERS[config["method"]](**config["peer"])
        except TypeError as error:
            raise ValueError(f"peer: {config['method']} has no such setting ({error})") from None
    if config["method"] != "twinflow" or config["peer"]:
        raise ValueError(
            f"method must be one of twinflow, {', '.join(peers.PEERS)}, and peer is for all but the first; "
            f"got {config['method']!r} and {config['peer']}"
        )
    return TwinFlowLoss(**{f.name: config[f.name] for f in fields(TwinFlowLoss) if f.name in config})


def method_of(config):
    """What a run's settings amount to: a peer, "twinflow", "rcgm" (the any-step base alone) or "flow matching"."""
    if config["method"] in peers.PEERS:
        return config["method"]
    if config["share"] > 0:
        return "twinflow"
    return "rcgm" if config["order"] > 0 and config["warmup_steps"] < config["steps"] else "flow matching"


def mode_of(config):
    """How a run's model samples in several steps; None if it makes one step only."""
    method = method_of(config)
    return peers.PEERS[method]().mode if method in peers.PEERS else "multi" if method == "flow matching" else "any"
