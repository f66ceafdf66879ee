"""The pieces of `report`: each measures on one device, in the seconds that it has, and yields rows as it finds them.

A row is a dict: what; ms, milliseconds, and to, the row of the piece that they are compared with; bytes, the most
memory held; beside, other figures by name. On a CPU small stand-ins take the places of what is measured on a GPU. A
ValueError says why a piece cannot be measured here.
"""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from ..runs.build import data_of, state_of
from ..runs.evaluate import rows_of, yardstick
from ..runs.methods import FLOW_MATCHING, RCGM
from ..runs.recipes import configured
from ..runs.run import begin, finish
from ..runs.settings import loss_of
from ..training.loop import OPTIONS, PRECISIONS, train
from .calls import calls_of
from .plan import needs_of_step
from .speed import (
    STEPS,
    measure_steps,
    median_seconds,
    net_to_measure,
    on_gpu,
    peak_memory,
    training_steps,
    usual_precision,
)
from .speed_backbone import loss_for, measure_backbone

SMALL = ("width=16", "depth=1", "heads=2", "size=16", "batch_size=6")  # recipe fashion on a CPU
METHODS = {"flow matching": FLOW_MATCHING, "base alone": RCGM, "twinflow": {}}


def row(what, seconds=None, to=None, memory=None, beside=None):
    """A row without what is not given."""
    found = {"ms": seconds and 1e3 * seconds, "to": to, "bytes": memory, "beside": beside}
    return {"what": what} | {key: value for key, value in found.items() if value is not None}


def sampling_rows(seconds, count):
    """Rows of sampling so many at once.  seconds: by NFE"""
    whats = {n: f"sampling {count}, {n} NFE" for n in seconds}
    return [row(whats[n], value, whats[1]) for n, value in seconds.items()]


def gpu_tests(device, seconds):
    """The tests of the repository that need a GPU, those marked `gpu` under tests/ of the current directory."""
    if not on_gpu(device):
        raise ValueError("no GPU")
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise ValueError("no tests here")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", *files]
    ended = subprocess.run(command, capture_output=True, text=True)
    said = (ended.stderr + ended.stdout).strip()
    if ended.returncode:
        print(said, file=sys.stderr)
        raise AssertionError(said.splitlines()[-1])
    yield row(said.splitlines()[-1])


def dit_here(device):
    """DiT-XL/2, on a CPU one block of DiT-S/8.  -> net, shape, batch, samples, precision; these in words"""
    net, shape, title, batch, many = net_to_measure("dit-xl-2", device)
    if not on_gpu(device):
        title, net.blocks = f"one block of {title}", net.blocks[:1]
    precision = usual_precision(device)
    return (net.to(device), shape, batch, many, precision), f"{title}, batch {batch}, {precision}"


def dit_steps(device, seconds, compile="none"):
    """A step of DiT-XL/2 with each loss; compiled, also what compiling took, and sampling."""
    (net, shape, batch, many, precision), about = dit_here(device)
    points = 0 if compile == "none" else many
    found = measure_steps(net, shape, batch, points, device, precision, compile, rounds=5 if on_gpu(device) else 3)
    beside = {"": about, "share of the matrix peak": found["share_of_peak"], "that peak, TFLOP/s": found["peak"] / 1e12}
    if compile != "none":
        beside |= {"seconds to compile": found["compile_seconds"], "graphs": found["graphs"]}
    for name, value in found["steps"].items():
        yield row(name, value, "flow matching", found["memory"][name], beside if name == "flow matching" else None)
    yield from sampling_rows(found["sampling"], many)


def casts(device, seconds):
    """What keeping the weights in bf16 beside those in float32 would save at most: their casts, one a call."""
    (net, shape, batch, _, precision), about = dit_here(device)
    name = "twinflow, order 2"
    steps, _ = training_steps(net, shape, batch, device, precision)
    runs = {name: steps[name], "cast": lambda: [p.to(torch.bfloat16) for p in net.parameters()]}
    times, _ = median_seconds(runs, device, rounds=5, repeats=2)
    calls = len(calls_of(STEPS[name], batch))
    yield row(name, times[name], name, beside={"": about})
    yield row("all weights cast once to bf16", times["cast"], name)
    yield row(f"the casts of the {calls} calls of a step", calls * times["cast"], name, beside={"calls": calls})


def fashion(device, **changes):
    """The settings of recipe fashion, of its stand-in on a CPU."""
    return configured("fashion", () if on_gpu(device) else SMALL, **changes)


def fashion_runs(device, **changes):
    """Functions that each take a whole training step of the recipe, on random images, with a method's loss; all train
    one network.  -> dict, rows of a step
    """
    config = fashion(device, warmup_steps=0, base_steps=0, **changes)
    shape = (1, config["size"], config["size"])
    state = state_of(config, SimpleNamespace(shape=shape, classes=10), device)
    x = torch.randn(config["batch_size"], *shape, device=device)
    label = torch.randint(10, (len(x),), device=device)
    options = {name: config[name] for name in OPTIONS} | {"steps": 10**6, "null": 10, "read_every": config["log_every"]}
    losses = {method: loss_of(config | own) for method, own in METHODS.items()}
    return {name: partial(next, train(state, loss, lambda _: (x, label), **options)) for name, loss in losses.items()}


def fashion_steps(device, seconds):
    """A step of recipe fashion in each precision, and in bf16 compiled and as CUDA graphs."""
    kinds = [(precision, "none") for precision in PRECISIONS if on_gpu(device) or precision != "tf32"]
    kinds += [("bf16", "default"), *([("bf16", "graphs")] if on_gpu(device) else [])]
    for precision, compile in kinds:
        runs = fashion_runs(device, precision=precision, compile=compile)
        times, compiling = median_seconds(runs, device, rounds=3, repeats=6)
        kind = f"{precision}, {'eager' if compile == 'none' else f'compile {compile}'}"
        beside = {"": f"batch {fashion(device)['batch_size']}"}
        beside |= {} if compile == "none" else {"seconds to compile": compiling}
        for method, run in runs.items():
            more = beside if method == "flow matching" else None
            yield row(f"{method}, {kind}", times[method], f"flow matching, {kind}", peak_memory(run, device), more)
        torch.compiler.reset()


def backbone(device, seconds, name, training, rows, compile="none"):
    """A step of a large backbone and samples of it, and the bytes that were counted for such a step."""
    found = measure_backbone(name, training, rows, device, nfes=(1, 10), compile=compile)
    shape, times = " x ".join(map(str, found["shape"])), found["step"]
    what = "" if on_gpu(device) else "one layer of two heads, "
    beside = {"": f"{what}latents {shape}, batch {rows}", "million parameters learn": found["parameters"] / 1e6}
    beside |= {"longest, ms": 1e3 * max(times)}
    yield row(f"a step, mean of {len(times)}", sum(times) / len(times), memory=found["memory"], beside=beside)
    yield from sampling_rows(found["sampling"], rows)
    if on_gpu(device):  # on a CPU a process holds more than tensors
        needs = needs_of_step(name, loss_for("twinflow", training), rows, training)
        yield row("counted for such a step", memory=needs["peak"])


def fashion_trained(device, seconds):
    """Recipe fashion trained by three methods, each for a third of the time, as many steps as that allows.

    Judged by one classifier, on fewer samples than the recipe's.
    """
    ends, few = time.perf_counter() + seconds, {"eval_samples": 2000 if on_gpu(device) else 200}
    data = data_of(fashion(device))
    yard = yardstick(fashion(device, **few), data, device=device)
    times, compiling = median_seconds(fashion_runs(device), device, rounds=3, repeats=1)
    for left, (method, changes) in zip((3, 2, 1), METHODS.items()):
        third = (ends - time.perf_counter()) / left
        steps = max(10, int((0.7 * third - compiling) / times[method]))  # the rest is for sampling and measuring
        config, began = fashion(device, **few, **changes, steps=steps), time.perf_counter()
        trained = finish(begin(config, device=device, data=data), shown=False).trained()
        beside = {"steps": steps, "seconds": time.perf_counter() - began, "batch": config["batch_size"]}
        found, _ = rows_of(trained, (1, 4, 100), yard)
        beside |= {f"at {one['nfe']} NFE": one["frechet"] for one in found}
        yield row(f"Frechet distance, {method}", beside=beside)
    yield row("Frechet distance, real images", beside={"": f"{len(yard.real)} samples", "at": yard.floor["frechet"]})
