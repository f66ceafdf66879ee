"""A run: settings, data and network made once, then the loop; with a folder that a crash at any moment leaves whole.

    run = begin(configured("toy", steps=500), folder="runs/mine")
    for record in steps(run):
        print(record["step"], record.get("total"))  # see `train`: terms are there when a line of the log is due

The folder holds config.json, log.jsonl, the checkpoint, pictures and, once it is measured, metrics.json.
"""

import json
import math
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..bars import bar, terms_in
from ..data.batches import known_of, null_of, read_ahead
from ..files import aside, full_disk_named, write_json
from ..training.checkpoints import NAME, has_checkpoint, keep_state, read_saved, restore_state
from ..training.distributed import World, first, refuse_graphs
from ..training.loop import ASTRAY, OPTIONS, read_terms, train
from ..training.state import State
from .build import data_of, state_of
from .checks import refuse_misfits, same_data
from .drawing import draw_look, look
from .folder import Trained, read_config, read_log
from .settings import loss_of

RESULTS = ("metrics.json", "samples.png")  # of a measured run, in the order in which they are written


@dataclass
class Run:
    """A network in training on data, in a folder or in memory alone."""

    config: dict
    data: object  # see `data.batches.DataSet`
    state: State
    device: str = "cpu"
    folder: Path | None = None
    world: World | None = None

    @property
    def writes(self):
        """Whether this process is the one that writes."""
        return self.folder is not None and (self.world is None or self.world.rank == 0)

    @property
    def in_pieces(self):
        return self.config["parallel"] != "ddp"

    def keep(self, x=None):
        """Write a checkpoint, if there is a folder. Raises FloatingPointError, and leaves the last one, if a loss term
        that was not read yet or the samples are plainly astray.

        x: the samples of `look`, where they have been made.
        """
        read_terms(self.state)
        if self.folder is not None:
            if self.state.step and not (width := (look(self) if x is None else x).square().mean()) < ASTRAY:
                raise FloatingPointError(
                    f"step {self.state.step}: samples have spread {width.sqrt():.3g}, data have 1; lower lr"
                )
            keep_state(self.folder, self.state, known_of(self.data), self.in_pieces, self.world)

    def trained(self):
        """What has been learnt so far, ready to sample."""
        saved = {"step": self.state.step, "data": known_of(self.data)}
        return Trained(self.state.average, self.config, saved, self.folder, self.data)


def begin(config, folder=None, device="cpu", world=None, data=None, net=None, replace=False, measured=True):
    """A new run, and its folder if it is to have one: nothing is written before everything is found to fit.  -> Run

    data, net: where they are given and not what the settings name. world: the processes that train together. replace:
    a run that is in the folder already is moved out of the way. measured: images too few to be measured are refused.
    Raises ValueError if anything that the settings name is not there or does not fit, or a run is in the folder.
    """
    folder, device = folder and Path(folder), world.device if world else device
    refuse_graphs(config["compile"], device)
    data = data_of(config, world) if data is None else data
    first(world, lambda: refuse_misfits(config, data, net, None if replace else folder, measured))
    state = state_of(config, data, device, world, net=net)
    run = Run(config, data, state, device, folder, world)
    if folder is not None:
        first(world, lambda: make_folder(folder, config, replace))
        run.keep()
    return run


def resume(folder, device="cpu", world=None, data=None, net=None):
    """The run of a folder as its last checkpoint left it; without one, at step 0.  -> Run

    Raises ValueError if the folder or its checkpoint does not fit, or the data are not those that it was begun with.
    """
    folder, device = Path(folder), world.device if world else device
    config, fresh, log = read_config(folder), not has_checkpoint(folder), folder / "log.jsonl"
    if log.exists() and fresh:
        raise ValueError(f"{folder / NAME}: no such checkpoint, though {log} shows that there was one")
    data = data_of(config, world) if data is None else data
    saved, path = (None, None) if fresh else read_saved(folder)
    if not fresh:
        same_data(data, saved["data"], folder)
    run = Run(config, data, state_of(config, data, device, world, fresh, net), device, folder, world)
    if fresh:
        run.keep()
    else:
        restore_state(run.state, saved, path)
    return run


def steps(run):
    """Train to the last step: a generator of records, each after what is due is in the folder, log line and checkpoint.

    Raises FloatingPointError if training goes astray.
    """
    config, data = run.config, run.data
    null = null_of(data) if config["conditional"] else None
    options = {name: config[name] for name in OPTIONS}
    due = math.gcd(config["log_every"], config["checkpoint_every"], config.get("sample_every", 0))
    if run.writes:
        _cut_log(run.folder, run.state.step)
        if run.state.step < config["steps"]:  # results of an earlier step; the end of training writes them anew
            for name in RESULTS:
                (run.folder / name).unlink(missing_ok=True)
    with read_ahead(data) as read:

        def batch(step):
            x, cond = read(step)
            return x, cond if config["conditional"] else None

        for record in train(run.state, loss_of(config), batch, null=null, world=run.world, read_every=due, **options):
            if run.folder is not None:
                _leave(run, record)
            yield record


def finish(run, shown=True, stoppable=False):
    """Train to the last step, with a bar.  -> the run

    Ctrl-C and a cluster's SIGTERM end it after a step, with a checkpoint, where one process trains alone. Then it
    raises KeyboardInterrupt; stoppable: it returns.
    """
    hidden = not (shown and (run.writes or run.folder is None))
    name, total = run.folder.name if run.folder else run.config["recipe"], run.config["steps"]
    with _asked_to_stop(run.world is None) as asked, bar(None, name, total, run.state.step, "steps", hidden) as told:
        for record in steps(run):
            terms_in(told, record)
            told.update()
            if asked and record["step"] < total:
                run.keep()
                if not stoppable:
                    raise KeyboardInterrupt
                break
    return run


@contextmanager
def _asked_to_stop(noted):
    """Note Ctrl-C and SIGTERM in the list that it gives, and interrupt only at the second."""
    asked = []
    if not noted or threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield asked
        return

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_folder(folder, config, replace=False):
    """Make the folder of a new run, with its settings; replace: an earlier run becomes folder.1, folder.2, ...

    Raises ValueError if what is to be replaced is no run, or the folder that one is in.
    """
    folder = Path(folder)
    if replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        try:
            read_config(folder)
        except ValueError as error:
            raise ValueError(f"{folder} is there and no run, so it is not moved: choose another --out") from error
        if Path.cwd().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} is the folder that we are in, so it is not moved: choose another --out")
        number = 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
        print(f"{folder} moved to {folder}.{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def _cut_log(folder, step):
    """Drop the log's lines after a step, and a line cut short by a crash."""
    log = folder / "log.jsonl"
    records = [record for record in read_log(folder) if record["step"] <= step] if log.exists() else []
    with aside(log, "w") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def _leave(run, record):
    """What a step leaves in the folder: a line of the log, a picture, a checkpoint, each when it is due."""
    config, step, last = run.config, record["step"], record["step"] == run.config["steps"]
    if run.writes and (step % config["log_every"] == 0 or last):
        log = run.folder / "log.jsonl"
        with full_disk_named(log), open(log, "a") as file:
            file.write(json.dumps(record) + "\n")
    x, final = None, "model" in config and last  # of others, `evaluate` draws the last
    if final or step % config.get("sample_every", config["steps"] + 1) == 0:
        x = draw_look(run, "samples.png" if final else f"samples-{step:06d}.png")
    if step % config["checkpoint_every"] == 0 or last:
        run.keep(x)
