"""Every setting of a run: what it means, what it may be, its default; and the loss that settings amount to.

A run's settings are a flat dict, its config.json. Recipes, `fit(**settings)`, `--set`, error messages and
`python -m tinytwinflow settings` all read them here; those of the loss stand beside the equations, in `TwinFlowLoss`.
"""

from .. import peers
from ..backbones.quantised import QUANTIZE
from ..method.losses import TwinFlowLoss
from ..ranges import setting, settings_of
from ..training.distributed import COMPILE, PARALLEL
from ..training.loop import OPTIONS
from ..training.state import WEIGHT_DTYPES

DATA = {
    "data": setting("8gaussians", "a set's name, FILE.npy, FILE.csv, or a folder of images, latents or texts"),
    "data_dir": setting("data", "folder in which named image sets are looked for"),
    "conditional": setting(False, "whether the network is told the labels, or the prompts"),
    "size": setting(32, "side of an image, or of a latent", "[1, inf)", unit="pixels"),
    "flip": setting(False, "mirror half of the images, at random"),
    "subset": setting(0, "train on the first so many images of each class; 0: on all", "[0, inf)", unit="images"),
}
NETWORK = {
    "net": setting("mlp", "mlp for points; unet, dit, dit-s-2 ... dit-xl-8 for images"),
    "width": setting(256, "width of a layer; of the U-Net, its channels at full size", "[1, inf)"),
    "depth": setting(4, "layers; of the U-Net, blocks at each size", "[1, inf)"),
    "heads": setting(4, "attention heads of the DiT", "[1, inf)"),
    "patch": setting(2, "side of a DiT's patch", "[1, inf)", unit="pixels"),
    "sharp": setting(True, "a steep MLP: x doubled, rectified units, residual layers that the times modulate"),
    "predicts": setting("velocity", "what the network answers with", choices=("velocity", "data")),
    "shifted": setting(False, "whether it knows each condition twice, see `nets.shifted`: the fakes of apex are there"),
    "epsilon": setting(False, "the DiT's published weights predict noise; its answer is translated"),
    "init_from": setting(
        "", "first weights: a run's folder, a checkpoint, sit:FILE or dit:FILE, published ones; of adapters, a LoRA"
    ),
}
TRAINING = {
    "seed": setting(0, "of weights, batches and noise", "[0, 9223372036854775807]"),
    "batch_size": setting(512, "samples a step, of all processes together", "[1, inf)", unit="samples"),
    "lr": setting(2.5e-3, "learning rate of AdamW at its highest; muon_lr is that of inner matrices", "(0, inf)"),
    "muon_lr": setting(
        None,
        "that of Muon, for inner matrices (in a ModuleList, where there are any); None: AdamW",
        "(0, inf)",
        kind=float,
        none=True,
    ),
    "method": setting("twinflow", "the loss", choices=lambda: ("twinflow", *peers.PEERS)),
    "base": setting("any-step", "what the twin stands on", choices=lambda: ("any-step", *peers.BASES)),
    "peer": setting({}, "settings of a method or base that is a peer, fields of its class in peers/"),
    **OPTIONS,
}
PLACING = {
    "parallel": setting("ddp", "many processes: copies, pieces (FSDP2), pieces in a machine", choices=PARALLEL),
    "recompute": setting(False, "compute blocks again in the backward pass, to save memory"),
    "compile": setting("none", "torch.compile; graphs: CUDA graphs, for small networks", choices=COMPILE),
}
LOSS = settings_of(TwinFlowLoss)
MEASURING = {
    "log_every": setting(1, "steps from one line of the log to the next", "[1, inf)", unit="steps"),
    "checkpoint_every": setting(500, "steps from one checkpoint to the next", "[1, inf)", unit="steps"),
    "sample_every": setting(500, "steps from one picture of samples to the next", "[1, inf)", unit="steps"),
    "time_shape": setting(
        (1.0, 1.0, 1.0), "a, b, c of the times between jumps, see `time_grid`; ones are even", "(0, inf)", length=3
    ),
    "eval_samples": setting(20000, "samples that are measured", "[2, inf)", unit="samples"),
    "features": setting("classifier", "what judges images: a classifier trained here, or a file of Inception v3"),
    "vae": setting("", "autoencoder that decodes latents for Inception and for pictures; of a backbone, its pipeline"),
}
BACKBONE = {
    "model": setting("model", "folder of a diffusers flow transformer, or of a pipeline with one"),
    "weights": setting("bf16", "what a backbone's weights are kept in", choices=tuple(WEIGHT_DTYPES)),
    "quantize": setting("none", "what frozen weights are kept in, under adapters", choices=QUANTIZE),
    "lora_rank": setting(64, "rank of the adapters; 0: all parameters learn", "[0, inf)"),
    "lora_layers": setting([], "endings of the names of adapted layers; none: those of attention and MLPs"),
    "optimizer": setting(
        "adamw", "adafactor: inside the backward pass, for all parameters", choices=("adamw", "adafactor")
    ),
    "latents": setting([], "shape of a latent, where the data hold none"),
    "validation": setting("", "prompts that pictures are drawn of, a folder of texts; none: four that are trained on"),
}
GROUPS = {
    "data": DATA, "network": NETWORK, "training": TRAINING, "loss (method twinflow)": LOSS, "many processes": PLACING,
    "measuring": MEASURING, "backbone": BACKBONE,
}  # fmt: skip
SETTINGS = {name: made for group in GROUPS.values() for name, made in group.items()}


def check(config):
    """Raise ValueError for a setting out of its range, or for settings that do not go together."""
    for name in config.keys() & SETTINGS.keys():
        SETTINGS[name].check(name, config[name])
    if "size" in config and config["eval_samples"] < 6:  # more than the neighbours that are looked for
        raise ValueError(f"eval_samples must be at least 6 for images, got {config['eval_samples']}")
    if config["batch_size"] % config["accumulate"]:
        raise ValueError(f"batch_size {config['batch_size']} must be a multiple of accumulate {config['accumulate']}")
    if config["compile"] == "graphs" and (config["accumulate"] > 1 or config["parallel"] != "ddp"):
        raise ValueError("graphs overwrite gradients and know no pieces: --set accumulate=1 parallel=ddp")
    for name in ("warmup_steps", "base_steps"):
        if config[name] > config["steps"]:
            raise ValueError(f"{name} must lie in [0, steps], got {config[name]} of {config['steps']} steps")
    before = config["warmup_steps"] + config["base_steps"]
    if method_of(config) not in ("rcgm", "flow matching") and before >= config["steps"]:
        raise ValueError(f"the method never starts: warmup_steps + base_steps = {before} of {config['steps']} steps")
    if config["method"] != "twinflow" and (config["guidance"] or config["base_steps"]):
        raise ValueError("guidance and base_steps are for method twinflow: --set guidance=0 base_steps=0")
    for name, value in getattr(peers.PEERS.get(config["method"]), "needs", {}).items():
        if config.get(name) != value:
            raise ValueError(f"method {config['method']} needs {name}={value}")
    if config["base"] != "any-step" and (config["method"] != "twinflow" or not config["share"]):
        raise ValueError(f"a base is for the twin to stand on: --set method='{config['base']}' trains it alone")
    if config["base"] != "any-step" and config["share"] == 1 and not config["base_steps"]:
        raise ValueError("share=1 leaves the base no rows: --set share=0.3, or base=any-step")
    if config.get("predicts") == "data" and config.get("epsilon"):
        raise ValueError("epsilon says that the network predicts noise: --set predicts=velocity")
    if config["guidance"] and not config["conditional"]:
        raise ValueError("guidance needs labels: --set conditional=true")
    if "model" in config:
        check_backbone(config)
    loss_of(config)


def check_backbone(config):
    """Raise ValueError for settings of a pretrained backbone that do not go together."""
    if not config["conditional"]:
        raise ValueError("a backbone needs its prompts: --set conditional=true")
    in_backward = config["optimizer"] == "adafactor"
    if config["lora_rank"] and in_backward:
        raise ValueError("optimizer adafactor is for all parameters: --set lora_rank=0, or optimizer=adamw")
    if not config["lora_rank"] and not in_backward and config["weights"] == "bf16":
        raise ValueError("adamw would lose small steps in bf16: --set weights=float32, or optimizer=adafactor")
    if in_backward and (config["accumulate"] > 1 or config["clip_norm"] is not None):
        raise ValueError("optimizer adafactor steps inside the backward pass: --set accumulate=1 clip_norm=None")
    if config["data_free"] and not config["lora_rank"]:
        raise ValueError("data_free learns from the frozen original, which adapters keep: --set lora_rank=64")
    if config["quantize"] != "none" and not (config["lora_rank"] and config["parallel"] == "ddp"):
        raise ValueError("quantised weights do not learn and stay whole: --set lora_rank=64 parallel=ddp")
    if config["init_from"] and not config["lora_rank"]:
        raise ValueError("init_from of a backbone is a file of adapters: --set lora_rank=64, or init_from=")
    if (config["method"], config["base"]) != ("twinflow", "any-step"):
        raise ValueError("a backbone has method twinflow: --set method=twinflow base=any-step")


def loss_of(config):
    """The loss that a run's settings describe."""
    name, peer = config["base"] if config["method"] == "twinflow" else config["method"], None
    if name != "any-step":
        try:
            peer = peers.PEERS[name](**config["peer"])
        except TypeError as error:
            raise ValueError(f"peer: {name} has no such setting ({error})") from error
    elif config["peer"]:
        raise ValueError(f"peer is for a method or base that is one, got {config['peer']}")
    if config["method"] != "twinflow":
        return peer
    own = {name: config[name] for name in LOSS if name in config}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    return TwinFlowLoss(**own, base=peer)


def method_of(config):
    """What a run's settings amount to: a peer, "twinflow", on a base or alone, "rcgm", its base, or "flow matching"."""
    if config["method"] in peers.PEERS:
        return config["method"]
    if config["base"] != "any-step":
        return f"twin on {config['base']}"
    if config["share"] > 0:
        return "twinflow" if config["share"] < 1 or config["base_steps"] else "twin alone"
    return "rcgm" if config["order"] > 0 and config["warmup_steps"] < config["steps"] else "flow matching"


def mode_of(config):
    """How a run's model samples in several steps; None if it makes one step only."""
    name = config["base"] if config["method"] == "twinflow" else config["method"]
    if name in peers.PEERS:
        return peers.PEERS[name]().mode
    return {"flow matching": "multi", "twin alone": None}.get(method_of(config), "any")


def listed(config=None):
    """All settings, or those of a config with their values there, a line each, as text."""
    lines = []
    for title, group in GROUPS.items():
        names = [name for name in group if config is None or name in config]
        if names:
            lines += ["", f"{title}:"]
        for name in names:
            value, made = group[name].default if config is None else config[name], group[name]
            shown = "" if value == "" else list(value) if isinstance(value, tuple) else value
            lines.append(f"  {name} = {shown}".ljust(38) + f"must {made.range}")
            lines.append(f"      {made.meaning}{f' ({made.unit})' if made.unit else ''}")
    return "\n".join(lines[1:])
