"""What a run folder holds, read back: settings, log, the trained network, samples of it."""

import json
from pathlib import Path

import torch

from ..backbones import states
from ..training import sharded
from .build import net_of
from .config import check
from ..method.draws import seeded
from ..files import fill, read_checkpoint, load_weights
from ..backbones.velocity_files import load_velocity as load_backbone
from .recipes import RECIPES
from ..method.samplers import sample
from ..method.conditions import move, take


def read_config(folder):
    """Settings of a run. Raises ValueError if the folder holds none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so {folder} is no run folder")
    try:
        config = json.loads(path.read_text())
        check(config)
        missing = RECIPES[config["recipe"]].keys() - config.keys() or {"seed"} - config.keys()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a run ({error})") from None
    if missing:
        raise ValueError(f"{path}: not the settings of a run ({', '.join(sorted(missing))} missing)")
    return config


def has_checkpoint(folder):
    return (Path(folder) / "checkpoint.pt").exists() or sharded.newest(folder) is not None


def finished(folder):
    """Whether a run has taken its last step."""
    if not has_checkpoint(folder):
        return False
    path = sharded.newest(folder)
    step = sharded.about(path)["step"] if path else read_checkpoint(Path(folder) / "checkpoint.pt")["step"]
    return step >= read_config(folder)["steps"]


def read_log(folder):
    """The records of a run's log.  -> list of dicts, one a logged step; not a last line cut short by a crash."""
    records = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def refuse_backbone(folder, config):
    """Raise ValueError if a run is of a backbone, whose samples need prompts and whose worth is judged elsewhere."""
    if "model" in config:
        raise ValueError(f"{folder} is a run of a backbone: it makes images of prompts, python -m tinytwinflow paint")


def trained(folder, device="cpu"):
    """A run's averaged network and settings, ready to sample.  -> net, config, checkpoint with its step and data.

    Raises ValueError if the folder holds no run, or its checkpoint does not fit it.
    """
    config, path = read_config(folder), sharded.newest(folder)
    refuse_backbone(folder, config)
    if path is not None:
        saved = sharded.about(path)
        net = net_of(config, saved["data"]["shape"], saved["data"]["classes"])
        sharded.read_pieces(path, {"average": net.state_dict()})
        net.to(device)
    else:
        path = Path(folder) / "checkpoint.pt"
        saved = read_checkpoint(path, device, keys=("average", "step", "data"))
        net = net_of(config, saved["data"]["shape"], saved["data"]["classes"]).to(device)
        load_weights(net, saved["average"], path)
    return net.requires_grad_(False), config, saved


def backbone_of(folder):
    """The backbone of a run, with its trained weights or adapters.  -> net, config, shape of its latents, step

    Raises ValueError if the folder holds no run of a backbone, or the checkpoint does not fit.
    """
    folder = Path(folder)
    config, path = read_config(folder), sharded.newest(folder)
    if "model" not in config:
        raise ValueError(f"{folder} is no run of a backbone: python -m tinytwinflow sample draws from it")
    net = states.build_backbone(config)
    own = states.saved_weights(net, config)
    if path is not None:
        saved = sharded.about(path)
        sharded.read_pieces(path, {"net": own})
    else:
        path = folder / "checkpoint.pt"
        saved = read_checkpoint(path, keys=("net", "step", "data"))
        fill(own, saved["net"], path)
    return net.requires_grad_(False), config, tuple(saved["data"]["shape"]), saved["step"]


def painter(folder, device="cpu"):
    """A backbone ready to sample from: of a run, or a diffusers flow transformer.  -> net(x, t, r, cond), shape, source

    shape of its latents, None if it is no run; source: what it is, in words. Raises ValueError if it is neither.
    """
    where = str(Path(folder).resolve())
    if not (Path(folder) / "log.jsonl").exists():
        return load_backbone(folder, torch.bfloat16).to(device).requires_grad_(False), None, where
    net, config, shape, step = backbone_of(folder)
    return states.view(net.to(device), config), shape, f"{where}, step {step}"


def sampled(net, n, shape, steps, mode, seed, cond=None, device=None, batch_size=4000):
    """n samples for a condition of n rows or None, the same noise for the same seed.  -> (n, *shape), on the CPU.

    device: of the network, where it has no parameters to tell.
    """
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    device = next(net.parameters()).device if device is None else device
    fresh, parts = torch.Generator(device).manual_seed(seeded(seed, 3).initial_seed()), []  # not the stream of z
    for rows in torch.arange(n).split(batch_size if len(shape) == 1 else batch_size // 16):
        some = move(take(cond, rows), device)
        parts.append(sample(net, z[rows].to(device), steps, mode, cond=some, generator=fresh).cpu())
    return torch.cat(parts)
