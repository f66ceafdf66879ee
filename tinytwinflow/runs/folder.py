"""A run folder read back: settings, log, the trained network, samples of it."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..backbones import states
from ..backbones.lora_files import adapter_file
from ..backbones.pipelines import attach_weights
from ..backbones.velocity_files import holds_model
from ..files import damage_named
from ..method.conditions import check_rows, move, take
from ..method.draws import seeded
from ..method.samplers import sample
from ..ranges import plain
from ..training.checkpoints import fill_from, has_checkpoint, read_saved
from ..training.distributed import without_weights
from .build import net_of
from .recipes import RECIPES
from .settings import check


class Trained(NamedTuple):
    """A trained network, ready to sample: what is measured and drawn."""

    net: torch.nn.Module
    config: dict
    saved: dict  # "step", and "data": shape, classes and scaling
    folder: Path | None = None
    data: object = None  # the data set, where it is at hand


def read_config(folder):
    """Settings of a run. Raises ValueError if the folder holds none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so {folder} is no run folder")
    with damage_named(path, "not the settings of a run"):
        config = json.loads(path.read_text())
    return checked(config, path)


def checked(config, path):
    """The settings of a run as a file has them. Raises ValueError that names it unless they are whole and fit."""
    with damage_named(path, "not the settings of a run"):
        known = RECIPES[config["recipe"]].keys() | {"recipe"}
    if known != config.keys():
        odd = [f"{name} missing" for name in sorted(known - config.keys())]
        odd += [f"{name} unknown" for name in sorted(config.keys() - known)]
        raise ValueError(f"{path}: not the settings of a run ({', '.join(odd)})")
    with damage_named(path, "not the settings of a run"):
        check(config)
    return config


def finished(folder):
    """Whether a run has taken its last step."""
    return has_checkpoint(folder) and read_saved(folder)[0]["step"] >= read_config(folder)["steps"]


def read_log(folder):
    """The records of a run's log.  -> list of dicts, one a logged step; not a last line cut short by a crash."""
    path, records = Path(folder) / "log.jsonl", []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = dict(json.loads(line))
            fits = {"step", "total"} <= record.keys() and {*map(type, record.values())} <= {int, float}
        except (ValueError, TypeError):
            fits = False
        if fits:
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is no record of a step")
    return records


def trained(folder, device="cpu", net=None):
    """A run's averaged network, ready to sample.  -> Trained

    net: the network, where it is of the user's own. Raises ValueError if the folder holds no run or one of a backbone,
    or its checkpoint does not fit it.
    """
    config = read_config(folder)
    refuse_backbone(folder, config)
    saved, path = read_saved(folder, "average")
    net = net_again(config, saved, path) if net is None else net
    fill_from(saved, path, "average", net.state_dict())
    saved = {"step": saved["step"], "data": saved["data"]}
    return Trained(net.to(device).requires_grad_(False).eval(), config, saved, Path(folder))


def net_again(config, saved, path):
    """The network that a checkpoint is of, without its weights. Raises ValueError that names it if there is none."""
    try:
        return net_of(config, saved["data"]["shape"], saved["data"]["classes"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_backbone(folder, config):
    """Raise ValueError if a run is of a backbone, whose samples need prompts and whose worth is judged elsewhere."""
    if "model" in config:
        raise ValueError(f"{folder} is a run of a backbone: it makes images of prompts, python -m tinytwinflow paint")


def _refuse_no_backbone(folder, config):
    if "model" not in config:
        raise ValueError(f"{folder} is no run of a backbone: python -m tinytwinflow sample draws from it")


def backbone_of(folder):
    """The backbone of a run, with its trained weights, their average if there is one, or adapters.  -> net, config,
    shape of its latents, step

    Raises ValueError if the folder holds no run of a backbone, or the checkpoint does not fit.
    """
    config = read_config(folder)
    _refuse_no_backbone(folder, config)
    part = "net" if config["lora_rank"] or config["optimizer"] == "adafactor" else "average"  # adapters hold theirs
    saved, path = read_saved(folder, part)
    net = states.build_backbone(config)
    fill_from(saved, path, part, states.saved_weights(net, config))
    return net.requires_grad_(False), config, tuple(saved["data"]["shape"]), saved["step"]


def adapters_of_run(folder):
    """The adapters of a run, its average's; the backbone that they sit on is not read.  -> AdapterFile"""
    config = read_config(folder)
    _refuse_no_backbone(folder, config)
    if not config["lora_rank"]:
        raise ValueError(f"{folder} is a run of all weights and has no adapters: choose a folder, not a file, for it")
    saved, path = read_saved(folder, "net")
    with without_weights():
        net = states.build_backbone(config, weights=False)
    own = {name: torch.empty_like(value, device="cpu") for name, value in states.saved_weights(net, config).items()}
    fill_from(saved, path, "net", own)
    net.load_state_dict(own, strict=False, assign=True)
    said = {"model": Path(config["model"]).name, "step": saved["step"], "shape": list(saved["data"]["shape"])}
    return adapter_file(net, **said)._replace(path=str(path))


def attach(pipeline, source, mode="any", part="transformer"):
    """Show a pipeline of diffusers the second time, so that one step is a jump, and give it what was trained.

    pipeline: of a family that `backbones.families` knows, on any device, in any precision; offloading is switched on
    after this. source: a run of recipe text, what `python -m tinytwinflow export` wrote of one, or the folder of a
    transformer with an embedder of r, as the authors publish them. mode: "any", jumps from each time to the next, or
    "multi", the velocity. part: the transformer's name in the pipeline; of two, each is attached with its own weights.
    What the model was trained to do without guidance is done without: guidance_scale=1, of Qwen-Image
    true_cfg_scale=1, of Z-Image guidance_scale=0.  -> the pipeline

    Raises ValueError, in one line, if the pipeline has no such part, is attached already or is of no known family, or
    the weights are of another model.
    """
    if isinstance(source, str | os.PathLike) and _is_run(source):
        source = adapters_of_run(source) if read_config(source).get("lora_rank") else backbone_of(source)[0]
    return attach_weights(pipeline, source, mode, part)


def painter(source):
    """What `attach` will find: whether it is a whole model, the shape of its latents, and what it is, in words.

    shape: None if it is no run. Raises ValueError for the run of no backbone.
    """
    where = str(Path(source).resolve())
    if not _is_run(source):
        return holds_model(source), None, where
    config = read_config(source)
    _refuse_no_backbone(source, config)
    saved, _ = read_saved(source, "net")
    return not config["lora_rank"], tuple(saved["data"]["shape"]), f"{where}, step {saved['step']}"


def _is_run(folder):
    return (Path(folder) / "log.jsonl").exists()


def condition_of(own, n, cond=None):
    """What n samples of a trained network are drawn for: a label for all, n rows as given, or each label in turn.

    own: see `Trained`. Raises ValueError for a label that it does not know, or another number of rows.
    """
    refuse_backbone(own.folder, own.config)
    classes = own.saved["data"]["classes"] if own.config["conditional"] else 0
    if cond is None:
        if own.config["conditional"] and not classes:
            raise ValueError(f"this model is conditional: cond must hold {n} rows")
        return torch.arange(n) % classes if classes else None
    cond = move(cond if isinstance(cond, dict) else plain(cond), "cpu")
    if not isinstance(cond, dict):
        if not cond.is_floating_point():
            cond = cond.long()
            if not (0 <= cond.min() and cond.max() < classes):
                known = f"labels 0 to {classes - 1}" if classes else "no labels, it is not conditional"
                raise ValueError(f"cond {cond.tolist()}: this run knows {known}")
        cond = cond.expand(n) if cond.ndim == 0 else cond
    check_rows(cond, n)
    return cond


def sampled(
    net, n, shape, steps, mode, seed, cond=None, device=None, batch_size=4000, tell=None, time_shape=(1.0, 1.0, 1.0)
):
    """n samples for a condition of n rows or None, the same noise for the same seed.  -> (n, *shape), on the CPU.

    time_shape: of the times between jumps, mode "any", see `samplers.time_grid`; other modes have even ones.
    device: of the network, where it has no parameters to tell. tell: called with the rows x calls that are done.
    """
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    device = next(net.parameters()).device if device is None else device
    fresh, parts = torch.Generator(device).manual_seed(seeded(seed, 3).initial_seed()), []  # not the stream of z
    times = time_shape if mode == "any" else (1.0, 1.0, 1.0)
    for rows in torch.arange(n).split(batch_size if len(shape) == 1 else batch_size // 16):
        some = move(take(cond, rows), device)
        parts.append(sample(net, z[rows].to(device), steps, mode, cond=some, shape=times, generator=fresh).cpu())
        if tell is not None:
            tell(len(rows) * steps)
    return torch.cat(parts)
