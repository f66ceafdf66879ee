"""What a step and a sample cost on this machine: ratios measured in one run, next to the matrix peak."""

import functools
import resource
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..method.losses import TwinFlowLoss
from ..method.samplers import sample
from ..nets import MLP, dit
from ..training.distributed import compile_as
from ..training.ema import average_of, update
from ..training.loop import autocast, matrix_units
from ..training.optimizers import optimizer_of


def on_gpu(device):
    """Whether a device is a GPU of CUDA."""
    return torch.device(device).type == "cuda"


def synchronize(device):
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_a_call(run, device, repeats=1):
    """Seconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def graphs_compiled():
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def settle(run, device, quiet=3, most=40):
    """Call until so many calls in a row have compiled nothing.  -> calls, their seconds"""
    calls, seconds, still = 0, 0.0, 0
    while still < quiet and calls < most:
        graphs = graphs_compiled()
        seconds += seconds_a_call(run, device)
        calls, still = calls + 1, still + 1 if graphs_compiled() == graphs else 0
    return calls, seconds


def median_seconds(runs, device, rounds, repeats):
    """Median seconds of each of several functions, called in turn so that a drift of the machine hits all.

    -> dict, and the seconds by which the first calls of all were longer than that: of compiling, where there is any
    """
    first = {name: settle(run, device) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_a_call(run, device, repeats))
    usual = {name: statistics.median(values) for name, values in times.items()}
    return usual, sum(seconds - calls * usual[name] for name, (calls, seconds) in first.items())


def matrix_peak(device, dtype):
    """Floating-point operations per second of a large matrix product, the best of several."""
    n = 8192 if on_gpu(device) else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds_a_call(lambda: a @ b, device) for _ in range(8))


def peak_memory(step, device):
    """Most memory held in a step that is not the first, in bytes: on CUDA by tensors, elsewhere by the process up to
    now.
    """
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    step()
    if on_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


STEPS = {
    "flow matching": TwinFlowLoss(order=0, share=0.0),
    "twinflow, order 2": TwinFlowLoss(order=2),
    "twinflow, order 2, guidance 0.5": TwinFlowLoss(order=2, guidance=0.5),
    "twinflow, order 8": TwinFlowLoss(),
}


def training_steps(net, shape, batch_size, device, precision):
    """Functions that each take one whole training step with one of the losses in STEPS: forward, backward, optimiser,
    moving average as teacher. They share one network, so that the memory is that of one.  -> dict, the average
    """
    average = average_of(net)
    optimizer = optimizer_of([net], lr=1e-6)
    x = torch.randn(batch_size, *shape, device=device)
    cond = torch.randint(net.classes, (batch_size,), device=device)
    null = torch.tensor([net.classes], device=device)

    def step(loss):
        optimizer.zero_grad()
        with autocast(device, precision):
            total = loss(net, x, cond, average, null).total
        with matrix_units(device, precision):
            total.backward()
        optimizer.step()
        update(average, net, 0.999)

    return {name: functools.partial(step, loss) for name, loss in STEPS.items()}, average


def net_to_measure(name, device):
    """A network with labels to measure.  -> net, shape of a sample, what it is, batch size, samples to draw."""
    if name == "mlp":
        return MLP(2, classes=8), (2,), "MLP 4 x 256", 512, 10000
    if not name.startswith("dit-"):
        raise ValueError(f"unknown net {name!r}: choose mlp, or dit-s-2 ... dit-xl-8")
    if on_gpu(device):
        with torch.device(device):
            net = dit(name.removeprefix("dit-"))
        return net, (4, 32, 32), f"{name}, 32 x 32 x 4 latents", 64, 64
    with torch.device("meta"):
        dit(name.removeprefix("dit-"))
    return dit("s-8"), (4, 32, 32), f"dit-s-8 (on a CPU in place of {name}), 32 x 32 x 4 latents", 16, 16


def usual_precision(device):
    return "bf16" if on_gpu(device) else "float32"


def measure_steps(net, shape, batch_size, points, device, precision, compile="none", rounds=9, repeats=2):
    """What a training step with each loss in STEPS costs a network with labels, and sampling so many points at 1, 2 and
    100 NFE; 0 points: no sampling.

    -> dict: steps, sampling: seconds by name and by NFE; memory: bytes of a step by name; peak: operations a second of
    a matrix product; share_of_peak: of that, what a flow matching step reaches; compile_seconds, graphs: of all that
    torch.compile made.
    """
    graphs, net = graphs_compiled(), net.to(device)
    steps, average = training_steps(net, shape, batch_size, device, precision)
    with FlopCounterMode(display=False) as counter:
        steps["flow matching"]()
    compile_as(net, compile)
    compile_as(average, compile)
    times, compiling = median_seconds(steps, device, rounds, repeats)
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    with matrix_units(device, precision):
        peak = matrix_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    share = counter.get_total_flops() / times["flow matching"] / peak

    z = torch.randn(points, *shape, device=device)
    cond = torch.zeros(points, dtype=torch.long, device=device)

    def draw(n):
        with autocast(device, precision):
            sample(average, z, n, cond=cond)

    calls = {n: functools.partial(draw, n) for n in (1, 2) if points}
    sampling, more = median_seconds(calls, device, rounds=min(3, rounds), repeats=1)
    if points:
        sampling[100] = seconds_a_call(functools.partial(draw, 100), device)
    figures = {"steps": times, "sampling": sampling, "memory": memory, "peak": peak, "share_of_peak": share}
    return figures | {"compile_seconds": compiling + more, "graphs": graphs_compiled() - graphs}


def bench_steps(device="cpu", net="mlp", batch_size=None, points=None, rounds=9, precision=None, compile="none"):
    """Measure and print. Returns the figures of `measure_steps`."""
    net, shape, title, usual, many = net_to_measure(net, device)
    batch_size, points, repeats = batch_size or usual, points or many, 20 if len(shape) == 1 else 2
    precision = precision or usual_precision(device)
    found = measure_steps(net, shape, batch_size, points, device, precision, compile, rounds, repeats)

    where = f"{precision}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{title}, batch {batch_size}, {where}, compile {compile}")
    print(f"{'training step':<32}{'ms':>10}{'x flow matching':>18}{'peak MiB':>12}")
    for name, value in found["steps"].items():
        ratio = value / found["steps"]["flow matching"]
        print(f"{name:<32}{1e3 * value:>10.2f}{ratio:>18.2f}{found['memory'][name] / 2**20:>12,.0f}")
    print(f"{f'sampling {points:,}':<32}{'ms':>10}{'x 1 NFE':>18}")
    for n, value in found["sampling"].items():
        print(f"{f'{n} NFE':<32}{1e3 * value:>10.1f}{value / found['sampling'][1]:>18.1f}")
    reached = f"a flow matching step reaches {found['share_of_peak']:.0%} of it"
    print(f"matrix peak {found['peak'] / 1e9:,.0f} GFLOP/s {precision}; {reached}")
    if compile != "none":
        print(f"compiled {found['graphs']} graphs in {found['compile_seconds']:.0f} s")
    return found
