"""Stability: the twin beside its own base on a grid of data sets, rates, batches, seeds and phases.

    python tests/stability.py --device cuda --jobs 12 --out grid.jsonl     # 2D: 11 sets, 5 rates, 4 batches, 5 seeds
    python tests/stability.py --device cuda --jobs 12 --out grid.jsonl --nets unet dit          # images of 8 pixels
    python tests/stability.py --out grid.jsonl --report                    # tables in Markdown of what the file holds

A cell is a network, a loss, a phase, a rate and a batch. All its data sets and seeds are trained at once, as members
of one network that shares nothing but the drawn times. A line of the file is a cell; those that it has are not trained
again. A loss is `here`, TwinFlowLoss(), or `paper`, TwinFlowLoss.paper(), and settings, "here order=2 rectify_clip=1";
its base, share=0, is trained too. The phase `flow` is flow matching for the first quarter of the steps.

A member diverged if weights or samples are not finite, or if the mean square of its answers in training or of its
samples was ever above ASTRAY (1 + mean of x^2), where `train` stops a loss. The figure is the sliced W2 of samples of
the average at 1 NFE, 10,000 points or 2,000 images, to as many real ones, as a ratio to that of the base with the same
data, seed, rate, batch and phase. Both hold the noise of finite samples, so ratios of well trained members are drawn
towards 1.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinytwinflow import TwinFlowLoss, nets, sample
from tinytwinflow.data.toys import TOYS, draw_points
from tinytwinflow.evaluation.metrics import sliced_wasserstein
from tinytwinflow.method.draws import seeded
from tinytwinflow.ranges import settings_of
from tinytwinflow.training.loop import ASTRAY, learning_rate
from tinytwinflow.training.state import new_state

NETS = {
    "mlp": lambda: nets.MLP(2),
    "sharp": lambda: nets.MLP(2, sharp=True),
    "unet": lambda: nets.UNet(8, channels_at=(32, 64), blocks=1),
    "dit": lambda: nets.DiT(8, channels=1, width=128, depth=4, heads=4),
}
POINTS = {"rates": (1e-4, 5e-4, 1e-3, 2.5e-3, 4e-3), "batches": (32, 128, 512, 1024), "seeds": 5, "steps": 600}
POINTS |= {"samples": 10000, "sets": TOYS}
IMAGES = {"rates": (1e-4, 1e-3, 4e-3), "batches": (32, 256), "seeds": 2, "steps": 300}
IMAGES |= {"samples": 2000, "sets": ("discs",)}
GRIDS = {"mlp": POINTS, "sharp": POINTS, "unet": IMAGES, "dit": IMAGES}
PHASES = ("none", "flow")
LOSSES = ("here", "paper", "paper rectify_clip=1")
OF_TWIN = ("share", "adversarial_weight", "rectify_weight", "rectify_clip")
POOL = 2**16  # points of a set, of which batches are drawn


class Many(torch.nn.Module):
    """Copies of a network side by side: a velocity field on x (B, E, *D), one member for each of E; t, r are shared.

    `largest` (E,) is the largest mean square that the answers of each member with gradient ever had.
    """

    def __init__(self, members):
        super().__init__()
        self.one = [members[0]]  # in a list it is no part of this network: its buffers serve all members
        self.names = [name for name, _ in members[0].named_parameters()]
        stacked, _ = torch.func.stack_module_state(members)
        self.stacked = torch.nn.ParameterList(stacked[name] for name in self.names)
        self.largest = torch.zeros(len(members), device=self.stacked[0].device)

    def forward(self, x, t, r, cond=None):
        def member(weights, x):
            return torch.func.functional_call(self.one[0], weights, (x, t, r, cond))

        F = torch.vmap(member, in_dims=(0, 1), out_dims=1)(dict(zip(self.names, self.stacked)), x)
        if torch.is_grad_enabled() and len(F):
            self.largest = torch.maximum(self.largest, mean_square(F.detach()))
        return F


def mean_square(x):
    """Of each member.  (B, E, *D) -> (E,)"""
    return x.square().flatten(2).mean((0, 2))


def discs(n, generator):
    """Bright discs of all sizes, places and shades on dark ground.  -> (n, 1, 8, 8) in [-1, 1]"""
    radius, row, column, shade = torch.rand(4, n, 1, 1, generator=generator)
    axis = (torch.arange(8) + 0.5) / 8
    distance = ((axis[:, None] - 0.25 - row / 2).square() + (axis - 0.25 - column / 2).square()).sqrt()
    inside = torch.sigmoid(40 * (0.15 + radius / 5 - distance))
    return ((1 + shade) * inside - 1)[:, None]


def drawn(name, n, *key):
    """n points or images of a set."""
    return discs(n, seeded(*key)) if name == "discs" else draw_points(name, n, seeded(*key))[0]


def loss_named(name):
    """A loss by `here` or `paper` and settings."""
    kind, *texts = name.split()
    fields, given = settings_of(TwinFlowLoss), {}
    for text in texts:
        key, _, value = text.partition("=")
        given[key] = fields[key].parse(key, value)
    return {"here": TwinFlowLoss, "paper": TwinFlowLoss.paper}[kind](**given)


def base_of(name):
    """The name of a loss's base, without what only the twin reads."""
    kept = [word for word in name.split() if word.partition("=")[0] not in OF_TWIN]
    return " ".join([*kept, "share=0"])


def train_many(state, loss, batch, steps, warmup_steps):
    """The steps of `training.train`, for members that may diverge each by itself, so that nothing is stopped."""
    flow, members = dataclasses.replace(loss, order=0, share=0.0), len(state.net.largest)
    for i in range(steps):
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate(i, steps)
        state.optimizer.zero_grad()
        now = flow if i < warmup_steps else loss
        out = now(state.net, batch(i), teacher=state.teacher, generator=state.generator)
        (members * out.total).backward()  # the loss is a mean over members: each has the gradient that it has alone
        state.optimizer.step()
        state.follow(0.999, 0.99)
        state.step += 1


def run(cell, device):
    """Train the members of a cell.  -> the cell, with what became of each"""
    torch.set_num_threads(1)
    began, members = time.perf_counter(), list(itertools.product(cell["sets"], range(cell["seeds"])))
    made = []
    for _, seed in members:
        torch.manual_seed(seed)
        made.append(NETS[cell["net"]]().to(device))
    state = new_state(Many(made), lr=cell["lr"])
    pool = torch.stack([drawn(name, POOL, 0) for name in cell["sets"]]).to(device)
    of = torch.arange(len(members), device=device) // cell["seeds"]

    def batch(i):
        return pool[of, torch.randint(POOL, (cell["batch"], len(of)), generator=state.generator, device=device)]

    warmup_steps = cell["steps"] // 4 if cell["phase"] == "flow" else 0
    with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels cannot be mapped over members
        train_many(state, loss_named(cell["loss"]), batch, cell["steps"], warmup_steps)
        z = torch.randn(cell["samples"], len(of), *pool.shape[2:], generator=state.generator, device=device)
        samples = torch.cat([sample(state.average, some) for some in z.split(2000)])
    worst = torch.maximum(state.net.largest, mean_square(samples))
    whole = torch.stack([weight.flatten(1).isfinite().all(1) for weight in state.net.stacked]).all(0)
    astray = ~(worst <= ASTRAY * (1 + pool.square().flatten(1).mean(1)[of])) | ~whole
    results = []
    for e, (name, seed) in enumerate(members):
        real = drawn(name, cell["samples"], 1, seed).to(device)
        w2 = None if astray[e] else sliced_wasserstein(samples[:, e].flatten(1), real.flatten(1), projections=128)
        results.append({"set": name, "seed": seed, "w2": w2, "largest": number(worst[e])})
    return {**cell, "members": results, "seconds": round(time.perf_counter() - began, 1), "device": str(device)}


def run_into(out, cell, device):
    """Train the members of a cell and add its line to a file.  -> what became of it, in words"""
    line = run(cell, device)
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\n")
    what = f"{cell['net']}, {cell['loss']}, {cell['phase']}, lr {cell['lr']:g}, batch {cell['batch']}"
    return f"{what}: {len(lost(line))} diverged, {line['seconds']} seconds"


def number(value):
    """A number for JSON; None for what is none."""
    return value.item() if math.isfinite(value) else None


def cells_of(options):
    """The cells that are asked for, the longest first."""
    names = dict.fromkeys(name for loss in options.losses for name in (base_of(loss), loss))
    cells = []
    for net in options.nets:
        grid = {key: getattr(options, key, None) or value for key, value in GRIDS[net].items()}
        for name, phase, lr, batch in itertools.product(names, options.phases, grid["rates"], grid["batches"]):
            cell = {"net": net, "loss": name, "phase": phase, "lr": lr, "batch": batch}
            cell |= {key: grid[key] for key in ("steps", "samples", "sets", "seeds")}
            cell["settings"] = vars(loss_named(name))
            cells.append(json.loads(json.dumps(cell)))
    return sorted(cells, key=lambda cell: -cell["batch"])


def without_results(line):
    return {key: value for key, value in line.items() if key not in ("members", "seconds", "device")}


def ratios(line, base):
    """Of each member that did not diverge, nor its base: its W2 divided by that of the base.  -> dict by set, seed"""
    pairs = zip(line["members"], base["members"])
    return {(a["set"], a["seed"]): a["w2"] / b["w2"] for a, b in pairs if a["w2"] is not None and b["w2"] is not None}


def lost(line):
    return [member for member in line["members"] if member["w2"] is None]


def report(lines):
    """Tables in Markdown: all losses, then each by rate and batch."""
    at = {tuple(line[key] for key in ("net", "loss", "phase", "lr", "batch")): line for line in lines}
    groups = dict.fromkeys((net, loss, phase) for net, loss, phase, _, _ in at)
    summary = ["| network | loss | phase | diverged | ratio to its base: worst | median | where it is worst |"]
    summary, tables = [*summary, "|---" * 7 + "|"], []
    for net, loss, phase in groups:
        own = {key[3:]: line for key, line in at.items() if key[:3] == (net, loss, phase)}
        bad, total = sum(len(lost(line)) for line in own.values()), sum(len(line["members"]) for line in own.values())
        known = {}
        for (lr, batch), line in own.items():
            base = at.get((net, base_of(loss), phase, lr, batch))
            if base is not None and base is not line:
                known[lr, batch] = ratios(line, base)
        every = {(*cell, *who): ratio for cell, some in known.items() for who, ratio in some.items()}
        words = f"| {net} | {loss} | {phase} | {bad} of {total} |"
        if not every:
            summary.append(f"{words} | | |")
            continue
        lr, batch, name, seed = worst = max(every, key=every.get)
        middle = statistics.median(every.values())
        place = f"{name}, seed {seed}, lr {lr:g}, batch {batch}"
        summary.append(f"{words} {every[worst]:.2f} | {middle:.2f} | {place} |")
        batches = sorted({batch for _, batch in known})
        tables += ["", f"{net}, {loss}, phase {phase}: diverged; worst, median ratio", ""]
        tables += ["| lr | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
        tables += ["|---" * (1 + len(batches)) + "|"]
        for lr in sorted({lr for lr, _ in known}):
            row = [f"{lr:g}"]
            for batch in batches:
                some = list(known.get((lr, batch), {}).values())
                figures = f"{max(some):.2f}, {statistics.median(some):.2f}" if some else "none is left"
                row.append(f"{len(lost(own[lr, batch]))}; {figures}" if (lr, batch) in known else "")
            tables.append("| " + " | ".join(row) + " |")
    return "\n".join(summary + tables)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("stability.jsonl"), help="a line a cell")
    parser.add_argument("--report", action="store_true", help="print the tables of the file, and train nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each of one thread")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp"])
    parser.add_argument("--losses", nargs="+", default=LOSSES, help='such as "here rectify_clip=1"; bases come too')
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--sets", nargs="+", choices=(*TOYS, "discs"))
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.report:
        print(report(lines))
        return
    done = [without_results(line) for line in lines]
    left = [cell for cell in cells_of(options) if cell not in done]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = [pool.submit(run_into, options.out, cell, options.device) for cell in left]
        for count, said in enumerate(as_completed(running), 1):
            print(f"{count} of {len(left)}: {said.result()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
