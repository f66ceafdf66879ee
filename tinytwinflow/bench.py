"""What a step and a sample cost on this machine: ratios measured in one run, next to the matrix peak."""

import resource
import statistics
import sys
import time

import torch

from .ema import average_of, update
from .losses import TwinFlowLoss
from .nets import MLP
from .recipes import loss_of, settings
from .samplers import sample


def synchronize(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(run, device, repeats=1):
    """Seconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def in_turn(runs, device, rounds=9, repeats=20):
    """Median seconds of each of several functions, called in turn so that a drift of the machine hits all."""
    for run in runs.values():
        seconds(run, device, 3)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device, repeats))
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_peak(device, n=2048):
    """Floating-point operations per second of a large float32 matrix product, the best of several."""
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def training_step(loss, batch_size, device, classes=0, width=256, depth=4):
    """A function that takes one whole training step: loss, backward, optimiser, moving average."""
    net = MLP(2, width, depth, classes).to(device)
    average = average_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=True)
    x = torch.randn(batch_size, 2, device=device)
    cond = torch.randint(classes, (batch_size,), device=device) if classes else None
    null = torch.tensor([classes], device=device) if classes else None

    def step():
        optimizer.zero_grad()
        loss(net, x, cond, null=null).total.backward()
        optimizer.step()
        update(average, net, 0.999)

    return step


def bench(device="cpu", batch_size=512, points=10000, rounds=9):
    """Measure and print. Returns the figures as a dict."""
    flow = TwinFlowLoss(order=0, share=0.0)
    plain, labelled = "flow matching", "flow matching, labels"
    guided = TwinFlowLoss(guidance=0.5)
    steps = {  # name: the step, and the one that it is a multiple of
        plain: (training_step(flow, batch_size, device), plain),
        "twinflow": (training_step(TwinFlowLoss(), batch_size, device), plain),
        "twinflow, toy recipe": (training_step(loss_of(settings("toy")), batch_size, device), plain),
        labelled: (training_step(flow, batch_size, device, classes=8), labelled),
        "twinflow, guidance 0.5": (training_step(guided, batch_size, device, classes=8), labelled),
    }
    times = in_turn({name: step for name, (step, _) in steps.items()}, device, rounds)
    net = MLP(2).to(device)
    z = torch.randn(points, 2, device=device)
    sampling = in_turn({n: lambda n=n: sample(net, z, n) for n in (1, 2, 100)}, device, rounds=3, repeats=1)
    peak = matrix_peak(device)
    products = 2 * batch_size * sum(p.numel() for p in net.parameters() if p.ndim == 2)
    share = 3 * products / times["flow matching"] / peak
    if str(device).startswith("cuda"):
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    print(f"MLP 4 x 256, batch {batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'training step':<28}{'ms':>8}{'x flow matching':>18}")
    for name, value in times.items():
        print(f"{name:<28}{1e3 * value:>8.2f}{value / times[steps[name][1]]:>18.2f}")
    print(f"{f'sampling {points:,} points':<28}{'ms':>8}{'x 1 NFE':>18}")
    for n, value in sampling.items():
        print(f"{f'{n} NFE':<28}{1e3 * value:>8.1f}{value / sampling[1]:>18.1f}")
    print(f"matrix peak {peak / 1e9:.0f} GFLOP/s float32; a flow matching step reaches {share:.0%} of it")
    print(f"peak memory of the process {memory / 2**20:.0f} MiB")
    return {"steps": times, "sampling": sampling, "peak": peak, "share_of_peak": share, "memory": memory}
