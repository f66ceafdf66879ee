"""A run folder: config.json, log.jsonl, checkpoint.pt, samples.png, metrics.json.

Written in an order, and each file in a way, that a crash at any moment leaves a folder to resume.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from .data import Points, seeded
from .features import Inception
from .files import aside, load, load_weights, write_json
from .images import Images
from .latents import autoencoder
from .nets import MLP, DiT, UNet, dit, load_published
from .pictures import draw_one
from .recipes import ENGINE, RECIPES, check, loss_of
from .samplers import sample
from .train import new_state, save, train


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


def net_of(config, shape, classes):
    """The network that a run's settings describe, for samples of a shape: (D,) or (C, H, H)."""
    kind, classes = config["net"], classes if config["conditional"] else 0
    if (kind == "mlp") != (len(shape) == 1):
        raise ValueError(
            f"net {kind!r} does not fit samples of shape {tuple(shape)}: mlp is for points, others for images"
        )
    needed = {"mlp": ("width", "depth"), "unet": ("width", "depth"), "dit": ("width", "depth", "heads", "patch")}
    missing = [key for key in needed.get(kind, ()) if key not in config]
    if missing:
        raise ValueError(f"net {kind!r} needs {', '.join(missing)}, which recipe {config['recipe']} does not set")
    if kind == "mlp":
        return MLP(shape[0], config["width"], config["depth"], classes)
    channels, size = shape[0], shape[-1]
    if kind == "unet":
        return UNet(size, channels, classes, [config["width"] * times for times in (1, 2, 2)], config["depth"])
    if kind == "dit":
        return DiT(size, channels, classes, *(config[key] for key in ("width", "depth", "heads", "patch")))
    if kind.startswith("dit-"):
        return dit(kind.removeprefix("dit-"), size, channels, classes, config.get("epsilon", False))
    raise ValueError(f"unknown net {kind!r}: choose from mlp, unet, dit, dit-s-2 ... dit-xl-8")


def trained(folder, device="cpu"):
    """A run's averaged network and settings, ready to sample.  -> net, config, checkpoint.

    Raises ValueError if the folder holds no run, or its checkpoint does not fit it.
    """
    config, path = read_config(folder), Path(folder) / "checkpoint.pt"
    saved = load(path, device, keys=("average", "step", "data"))
    net = net_of(config, saved["data"]["shape"], saved["data"]["classes"]).to(device)
    load_weights(net, saved["average"], path)
    return net.requires_grad_(False), config, saved


def data_of(config):
    """The training data that a run's settings describe."""
    if "size" not in config:
        data = Points(config["data"], config["batch_size"], config["seed"])
    else:
        keys = ("data", "batch_size", "seed", "data_dir", "size", "flip", "subset")
        data = Images(*(config[key] for key in keys))
    if config["conditional"] and not data.classes:
        raise ValueError(f"{config['data']} has no labels: --set conditional=false")
    return data


def set_aside(folder):
    """Move an earlier run out of the way of a new one: folder -> folder.1, folder.2, ..."""
    if not folder.exists():
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
    print(f"{folder} moved to {folder}.{number}")


def start(folder, config, move=False):
    """Make a new run folder, having looked at its data and network; move=True first moves an earlier run away.

    Raises ValueError if anything that the settings name is not there or does not fit, or a run is there already:
    nothing is overwritten.
    """
    folder = Path(folder)
    data = data_of(config)
    with torch.device("meta"):
        net_of(config, data.shape, data.classes)
    if "size" in config and len(data.test_rows) < 12:
        kept = f"{len(data.test_rows)} images are kept to measure against, of a folder every twentieth"
        raise ValueError(f"{config['data']}: {kept}; at least 12 are needed")
    if config["init_from"]:
        first_weights(net_of(config, data.shape, data.classes), config["init_from"])
    if config.get("features", "classifier") != "classifier":
        judged = Inception(config["features"])
        if data.shape[0] != 3 and not config.get("vae"):
            raise ValueError(f"Inception takes RGB images, not {data.shape[0]} channels: --set features=classifier")
        del judged
    if config.get("vae"):
        autoencoder(config["vae"])
    if move:
        set_aside(folder)
    if (folder / "config.json").exists() or (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} already holds a run: --resume continues it, --out DIR starts another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def _cut_log(path, step):
    """Drop the log's lines after a step, and a line cut short by a crash."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except json.JSONDecodeError:
            break
    with aside(path, "w") as file:
        file.write("".join(line + "\n" for line in lines))


def first_weights(net, source):
    """Fill a network from a run folder, one of its checkpoints, or "sit:FILE" or "dit:FILE", published weights."""
    kind, colon, path = str(source).partition(":")
    if colon and kind in ("sit", "dit"):
        if not isinstance(net, DiT):
            raise ValueError(f"{source}: published weights are for a net that is a dit")
        load_published(net, path, kind)
    else:
        path = Path(source) / "checkpoint.pt" if Path(source).is_dir() else Path(source)
        load_weights(net, load(path)["average"], path)


def finished(folder):
    """Whether a run has taken its last step."""
    path = Path(folder) / "checkpoint.pt"
    return path.exists() and load(path)["step"] >= read_config(folder)["steps"]


def continue_run(folder, device="cpu", bar=True):
    """Train a run to its last step from wherever it stands, with a log line a step and checkpoints.

    A folder without checkpoint is at step 0; the setting init_from may give the first weights. Returns the
    final State. Raises ValueError if the folder, its data or its checkpoint does not fit, FloatingPointError
    if training goes astray.
    """
    folder = Path(folder)
    config, checkpoint, log = read_config(folder), folder / "checkpoint.pt", folder / "log.jsonl"
    if log.exists() and not checkpoint.exists():
        raise ValueError(f"{checkpoint}: no such checkpoint, though {log} shows that there was one")
    data = data_of(config)
    torch.manual_seed(config["seed"])
    net = net_of(config, data.shape, data.classes).to(device)
    loss = loss_of(config)
    state = new_state(net, config["lr"], seed=config["seed"], helpers=getattr(loss, "helpers", None))
    about_data = {"shape": list(data.shape), "classes": data.classes, **data.scaling}

    def write_checkpoint():
        save(checkpoint, {**state.state_dict(), "data": about_data})

    if checkpoint.exists():
        saved = load(checkpoint, keys=(*state.state_dict(), "data"))
        load_weights(net, saved["net"], checkpoint)
        state.load_state_dict(saved)
        del saved
    else:
        if config["init_from"]:
            first_weights(net, config["init_from"])
            for average in (state.average, state.teacher):
                average.load_state_dict(net.state_dict())
        write_checkpoint()

    pool, next_batch = ThreadPoolExecutor(1), {}

    def batch(step):
        """The batch of a step; the next one of a set on disk is read meanwhile."""
        x, label = next_batch.pop(step).result() if step in next_batch else data.batch(step)
        if data.on_disk:
            next_batch[step + 1] = pool.submit(data.batch, step + 1)
        return x.to(device), label.to(device) if config["conditional"] else None

    if config["compile"] != "none":
        for network in (state.net, state.teacher, *state.helpers.values()):
            network.compile()
    keys = ("warmup_steps", "base_steps", *(key for key in ENGINE if key not in ("compile", "init_from")))
    null = data.classes if config["conditional"] else None
    options = {key: config[key] for key in keys}
    records = train(state, loss, batch, config["steps"], null=null, **options)
    _cut_log(log, state.step)
    shown = None if bar else True
    bar = tqdm(records, total=config["steps"], initial=state.step, desc=folder.name, disable=shown)
    with open(log, "a") as file:
        for record in bar:
            if record["step"] % config["log_every"] == 0 or record["step"] == config["steps"]:
                file.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{record['total']:.3f}", refresh=False)
            if record["step"] % config.get("sample_every", config["steps"] + 1) == 0:
                label = torch.arange(64) % data.classes if config["conditional"] else None
                x = sampled(state.average, 64, data.shape, 1, "any", config["seed"], label)
                draw_one(folder / f"samples-{state.step:06d}.png", x.numpy(), f"step {state.step}, 1 NFE")
            if record["step"] % config["checkpoint_every"] == 0 or record["step"] == config["steps"]:
                file.flush()
                write_checkpoint()
    pool.shutdown(cancel_futures=True)
    return state


def sampled(net, n, shape, steps, mode, seed, label=None, batch_size=4000):
    """n samples for labels (n,) or None, the same noise for the same seed.  -> (n, *shape)."""
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    device = next(net.parameters()).device
    fresh, parts = torch.Generator(device).manual_seed(seeded(seed, 3).initial_seed()), []  # not the stream of z
    for rows in torch.arange(n).split(batch_size if len(shape) == 1 else batch_size // 16):
        some = None if label is None else label[rows].to(device)
        parts.append(sample(net, z[rows].to(device), steps, mode, cond=some, generator=fresh).cpu())
    return torch.cat(parts)


def read_log(folder):
    """The records of a run's log.  -> list of dicts, one a logged step."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
