"""Methods on equal terms: same data, network, steps, batch and seeds; one table and one picture."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from ..bars import bar
from ..data.points import Points
from ..evaluation import pictures
from ..evaluation.tables import LINE, NFES, SEEN, comparison_table, floor_of, summary
from ..files import write_json
from ..runs.checks import refuse_misfits
from ..runs.evaluate import rows_of, yardstick
from ..runs.folder import read_config, trained
from ..runs.methods import entry, method_family
from ..runs.run import finish, make_folder, resume
from . import memory

COMPARED_SETS = ("8gaussians", "checkerboard")


def compare(names, methods, seeds, changes, out, jobs=None):
    """Train and measure every method on every data set and seed; write metrics.json, table.md, compare.png.

    methods: see `entry`. seeds: the numbers. jobs: processes, each of one thread (default: one a core). Stopped and
    called again with the same arguments it goes on where it was. A method that diverges is reported as such. Raises
    ValueError for an unknown data set, method or setting, or if `out` was made with other settings. A run measured
    before there was off_data is measured again.
    """
    began, todo = time.perf_counter(), []
    sets = {name: Points(name, 1) for name in names}
    for seed in seeds:
        for name in names:
            for method in methods:
                folder = Path(out) / Path(name).stem / f"seed-{seed}" / method.replace(" ", "-").replace("/", "-")
                nfes = (*NFES, LINE[1]) if method.startswith(LINE[0]) else NFES
                todo.append((folder, {**entry(method, changes), "seed": seed, "data": name}, method, nfes))
    results = work_off(todo, sets, train_and_measure, jobs)
    costs = costs_of_methods(methods, changes, Path(out) / "cost.json")
    costs = {method: {"family": method_family(method), **figures} for method, figures in costs.items()}
    rows, floors = summary(results, names, methods), {name: floor_of(results, name) for name in names}
    text = comparison_table(rows, floors, names, methods, costs)
    text += "".join(f"\n\n{Path(name).name}: {SEEN}" for name in names if not sets[name].held_out)
    print(text)
    content = {"seeds": list(seeds), "seconds": round(time.perf_counter() - began), "device": "cpu"}
    content |= {"training_seconds": sum(r["seconds"] for r in results), "floor": floors, "cost": costs, "rows": rows}
    write_json(Path(out) / "metrics.json", content)
    (Path(out) / "table.md").write_text(text + "\n")
    families = {method: costs[method]["family"] for method in methods}
    pictures.draw_comparison(Path(out) / "compare.png", rows, floors, names, families)
    print(f"\n{out}/table.md  {out}/compare.png  {out}/metrics.json")


def work_off(todo, sets, work, jobs=None):
    """Train and measure what is left to do, in processes of one thread, and read all results.  -> list of dicts

    todo: the arguments of `work`, a tuple a run, its folder and its settings first; work leaves the result in the
    folder's metrics.json. sets: data by name.
    """
    for folder, config, *_ in todo:
        if not (folder / "config.json").exists():
            refuse_misfits(config, sets[config["data"]], folder=folder)
            make_folder(folder, config)
        elif read_config(folder) != json.loads(json.dumps(config)):
            raise ValueError(f"{folder} was made with other settings: choose another --out")
    left = [job for job in todo if not whole(job[0] / "metrics.json")]
    jobs = min(jobs or os.cpu_count(), max(1, len(left)))
    if left:
        with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker, (os.getpid(),)) as pool:
            running = [pool.submit(work, *job) for job in left]
            try:
                for done in bar(as_completed(running), "compare", len(todo), len(todo) - len(left), "runs"):
                    done.result()
            except BrokenProcessPool:
                raise OSError("a process of the comparison was killed; the same command goes on where it was") from None
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or it would first work off what waits
                raise
    return [json.loads((folder / "metrics.json").read_text()) for folder, *_ in todo]


def whole(path):
    """Whether a run has been measured by all that the table shows."""
    return path.exists() and "off_data" in json.loads(path.read_text())["floor"]


def begin_worker(parent):
    """Begin a worker: one thread, and an end with Ctrl-C or with its parent, so that no run has two writers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_and_measure(folder, config, method, nfes, judged_in=None, net=None, more=None):
    """Train and measure one method on one data set with one seed; the result is left in its folder.

    judged_in: the folder of the classifier that judges images, by default the run's own. net: where it is not the one
    that the settings name. more: what else the result says of the run.
    """
    began, run, path = time.perf_counter(), resume(folder, net=net), Path(folder) / "metrics.json"
    before = json.loads(path.read_text())["seconds"] if path.exists() else 0
    yard = yardstick(config, run.data, judged_in or folder)
    try:
        finish(run, shown=False)
        rows, _ = rows_of(trained(folder, net=net), nfes, yard)
        diverged = None
    except FloatingPointError as error:
        rows, diverged = [], str(error)
    about = {"data": config["data"], "seed": config["seed"], "method": method, "diverged": diverged, **(more or {})}
    spent = {"seconds": round(before + time.perf_counter() - began, 1), "device": "cpu"}
    rows = [{**row, **about} for row in rows]
    write_json(path, {**about, **spent, "floor": yard.floor, "rows": rows})


def costs_of_methods(methods, changes, path):
    """What a step of each method takes, measured once and kept: see `memory.step_cost`."""
    if path.exists() and json.loads(path.read_text()).keys() == set(methods):
        return json.loads(path.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    configs = {method: entry(method, changes) for method in {LINE[0]: None, **dict.fromkeys(methods)}}
    found = memory.costs_in_two_dimensions(configs)
    torch.set_num_threads(threads)
    found = {method: found[method] for method in methods}
    write_json(path, found)
    return found
