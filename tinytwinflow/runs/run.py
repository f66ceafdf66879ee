"""A run folder: config.json, log.jsonl, checkpoint.pt, samples.png, metrics.json.

Written in an order, and each file in a way, that a crash at any moment leaves a folder to resume.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from ..backbones import states
from ..training import sharded
from .build import data_of, first_weights, net_of, state_of
from .config import loss_of
from ..evaluation.features import Inception
from ..files import aside, check_weights, read_checkpoint, write_json
from .folder import has_checkpoint, read_config, read_log, sampled
from ..data.latents import autoencoder
from ..evaluation.pictures import draw_one
from .recipes import ENGINE, PLACING
from ..training.distributed import blocks_of, without_weights
from ..training.loop import autocast, train
from ..training.checkpoints import write_checkpoint
from ..method.conditions import move, take


def set_aside(folder):
    """Move an earlier run out of the way of a new one: folder -> folder.1, folder.2, ..."""
    if not folder.exists():
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
    print(f"{folder} moved to {folder}.{number}")


def enough_to_measure(config, data):
    """Raise ValueError if too few images are kept from training for the metrics of a run."""
    kept = f"{config['data']}: {len(data.test_rows)} images are kept to measure against, of a folder every twentieth"
    if len(data.test_rows) < 12:
        raise ValueError(f"{kept}; at least 12 are needed")
    for draw in (0, 1) if config["conditional"] else ():
        labels = data.test.labels[data.fresh_rows(config["eval_samples"], draw)]
        if labels.bincount().max() < 2:
            raise ValueError(f"{kept}; diversity needs two of one class among the {len(labels)} that are looked at")


def start(folder, config, move=False):
    """Make a new run folder, having looked at its data and network; move=True first moves an earlier run away.

    Raises ValueError if anything that the settings name is not there or does not fit, or a run is there already:
    nothing is overwritten.
    """
    folder = Path(folder)
    data = data_of(config)
    if "model" in config:
        with without_weights():
            net = states.build_backbone(config, weights=False)
        x, cond = data.batch(0)
        net.check(x, cond), net.check(x[:1], data.null)
    else:
        with torch.device("meta"):
            net = net_of(config, data.shape, data.classes)
    if config["recompute"] and not blocks_of(net):
        raise ValueError(f"recompute is for networks with blocks, net {config['net']!r} has none")
    if "size" in config:
        enough_to_measure(config, data)
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
    if (folder / "config.json").exists() or has_checkpoint(folder):
        raise ValueError(f"{folder} already holds a run: --resume continues it, --out DIR starts another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def _cut_log(folder, step):
    """Drop the log's lines after a step, and a line cut short by a crash."""
    log = folder / "log.jsonl"
    records = [record for record in read_log(folder) if record["step"] <= step] if log.exists() else []
    with aside(log, "w") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def continue_run(folder, device="cpu", bar=True, world=None):
    """Train a run to its last step from wherever it stands, with a log line a step and checkpoints.

    A folder without checkpoint is at step 0; the setting init_from may give the first weights. world: the processes
    that train it together, the first of which writes all but the pieces of a sharded checkpoint. Returns the
    final State. Raises ValueError if the folder, its data or its checkpoint does not fit, FloatingPointError
    if training goes astray.
    """
    folder, device = Path(folder), world.device if world else device
    config, checkpoint, log = read_config(folder), folder / "checkpoint.pt", folder / "log.jsonl"
    writes, fresh, in_pieces = (
        world is None or world.rank == 0,
        not has_checkpoint(folder),
        config["parallel"] != "ddp",
    )
    if log.exists() and fresh:
        raise ValueError(f"{checkpoint}: no such checkpoint, though {log} shows that there was one")
    data = data_of(config, world)
    state = state_of(config, data.shape, data.classes, device, world, fresh)
    about_data = {"shape": list(data.shape), "classes": data.classes, **data.scaling}

    def write():
        if in_pieces:
            sharded.save_pieces(folder, state, about_data)
        elif writes:
            write_checkpoint(checkpoint, {**state.state_dict(), "data": about_data})

    if fresh:
        write()
    elif in_pieces:
        sharded.load_pieces(sharded.newest(folder), state)
    else:
        saved = read_checkpoint(checkpoint, keys=(*state.state_dict(), "data"))
        for name, weights in state.weights().items():
            check_weights(weights, saved[name], checkpoint)
        state.load_state_dict(saved)
        del saved

    pool, next_batch = ThreadPoolExecutor(1), {}

    def batch(step):
        """The batch of a step; the next one of a set on disk is read meanwhile."""
        x, label = next_batch.pop(step).result() if step in next_batch else data.batch(step)
        if data.on_disk:
            next_batch[step + 1] = pool.submit(data.batch, step + 1)
        return x.to(device), move(label, device) if config["conditional"] else None

    keys = ("warmup_steps", "base_steps", *(key for key in ENGINE if key not in PLACING))
    null = getattr(data, "null", data.classes) if config["conditional"] else None
    options = {key: config[key] for key in keys}
    records = train(state, loss_of(config), batch, config["steps"], null=null, world=world, **options)
    if writes:
        _cut_log(folder, state.step)
    hidden = None if bar and writes else True
    bar = tqdm(records, total=config["steps"], initial=state.step, desc=folder.name, disable=hidden)
    with open(log if writes else os.devnull, "a") as file:
        for record in bar:
            if record["step"] % config["log_every"] == 0 or record["step"] == config["steps"]:
                file.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{record['total']:.3f}", refresh=False)
            last = "model" in config and record["step"] == config["steps"]  # of others, `evaluate` draws the last
            if last or record["step"] % config.get("sample_every", config["steps"] + 1) == 0:
                n, cond = pictured(config, data)
                with autocast(device, config["precision"] if in_pieces else "float32"):
                    x = sampled(state.average, n, data.shape, 1, "any", config["seed"], cond, device)
                if writes:
                    name = "samples.png" if last else f"samples-{state.step:06d}.png"
                    draw_one(folder / name, x.numpy(), f"step {state.step}, 1 NFE")
            if record["step"] % config["checkpoint_every"] == 0 or record["step"] == config["steps"]:
                file.flush()
                write()
    pool.shutdown(cancel_futures=True)
    return state


def pictured(config, data):
    """How many samples the pictures of a run in training show, and their condition: a few prompts or each label."""
    if "model" in config:
        cond = take(data.batch(0)[1], slice(0, 4))
        return len(next(iter(cond.values()))), cond
    return 64, torch.arange(64) % data.classes if config["conditional"] else None
