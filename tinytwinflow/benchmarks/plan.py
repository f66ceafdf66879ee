"""What a training step of a large backbone needs: bytes, operations and traffic, on one GPU and on many."""

import copy
import math

import torch

from ..backbones.quantised import PACKAGES
from ..backbones.states import adapt
from ..evaluation.tables import markdown
from ..training.distributed import forget
from ..training.in_backward import as_matrix, in_backward
from .calls import bytes_of, bytes_of_calls, calls_of, flops_of_call, meta_backbone, work_of_calls
from .few_bits import keep_in
from .memory import LiveBytes

LARGE_CARD, SMALL_CARD = 79 * 2**30, 23 * 2**30  # what a card of 80 GB and one of 24 GB have to give
ON_BACKBONES = ("twinflow", "dmd2", "sana-sprint")
TRAININGS = {  # what learns, in which precision it is kept, its optimiser; and the settings of recipe text for it
    "adapters": (
        "rank 64 on the linear layers of attention and MLPs (SANA's MLPs are convolutions, which get none), float32, "
        "with their average; AdamW; the backbone bf16, frozen", (),
    ),
    "in backward": (
        "all parameters, bf16, no average; Adafactor inside the backward pass, random rounding",
        ("lora_rank=0", "optimizer=adafactor"),
    ),
    "float32": (
        "all parameters and one average, float32; AdamW; computed in bf16",
        ("lora_rank=0", "weights=float32", "precision=bf16"),
    ),
}  # fmt: skip


def bytes_of_optimiser_step(shape):
    """Most bytes that a step of one bfloat16 parameter inside the backward pass holds beyond it, for a moment."""
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    optimizer = in_backward([("parameter", parameter)], lr=1e-5)
    counter = LiveBytes()
    counter.hold([parameter])
    start = counter.now
    with counter:
        parameter.sum().backward()
    optimizer.stop()
    return counter.peak - start


def calls_of_steps(loss, batch_size, steps=96):
    """The calls of so many steps, enough to have drawn each division of the rows among the parts, the rarest 1 in 6."""
    return [tuple(calls_of(loss, batch_size, seed)) for seed in range(steps)]


def heaviest_steps(steps):
    """Of all steps those that may need most: none whose calls are, in order and with as many rows, within another's."""

    def within(step, other):
        rest = iter(other)
        return all(any(covers(there, call) for there in rest) for call in step)

    def covers(there, call):
        same = there.gradient == call.gradient and (there.network == call.network or not call.gradient)
        return same and there.rows >= call.rows

    kept = []
    for step in sorted(dict.fromkeys(steps), key=lambda step: -sum(call.rows for call in step)):
        if not any(within(step, other) for other in kept):
            kept.append(step)
    return kept


def needs_of_step(name, loss, batch_size, training, rank=64, kept=None):
    """Bytes and floating-point operations of a training step of a backbone; see TRAININGS. kept: what the frozen
    weights under adapters are quantised to, see `few_bits`.

    weights: all networks that the loss needs, and averages; optimiser: its state; passing: the most that any step
    makes and lets go, gradients included; peak: their sum; flops: the mean of the steps.
    """
    net, about = meta_backbone(name)
    low_rank, layerwise = training == "adapters", training == "in backward"
    operations = flops_of_call(net, about)
    for block in net.blocks():
        forget(block)
    helpers = {key: kind for key, kind in getattr(loss, "helpers", {}).items() if kind != "average"}
    learning = 1 + sum(kind != "frozen" for kind in helpers.values())
    if kept is not None:
        keep_in(net, kept)
    if low_rank:
        adapt(net, rank)
    elif not layerwise:
        net.float()
    trained = [p for p in net.parameters() if p.requires_grad]
    whole, moments = bytes_of(net.parameters()), 2 * bytes_of(trained)
    if low_rank:
        weights = whole + (learning - 1) * bytes_of(trained)
    elif layerwise:
        weights = whole * (1 + len(helpers))
        moments = 4 * sum(sum(as_matrix(p).shape) for p in trained)  # a number a row and a column
    else:
        weights = whole * (2 + len(helpers))
    optimiser, steps = learning * moments, calls_of_steps(loss, batch_size)
    others = {key: copy.deepcopy(net) for key, kind in helpers.items() if kind != "frozen"}
    how = {"free_gradients": layerwise, "autocast": not (low_rank or layerwise), "others": others}
    passing = max(bytes_of_calls(net, about, calls, **how) for calls in heaviest_steps(steps))
    if layerwise:
        passing += bytes_of_optimiser_step(max(trained, key=torch.numel).shape)
    return {
        "trained": learning * sum(p.numel() for p in trained),
        "weights": weights,
        "optimiser": optimiser,
        "passing": passing,
        "peak": weights + optimiser + passing,
        "flops": operations * sum(work_of_calls(calls, low_rank) for calls in steps) / len(steps),
    }


RATE = 250e12  # operations a second of one H100 in such a step: 548 TFLOP in 2.1 s, see tutorials/scaling.md
WITHIN, BETWEEN, GPUS = 450e9, 400e9, 8  # bytes a second into a GPU by NVLink, into a machine by its network; of GPUs


def traffic_of_step(net, calls, machines=1, parallel="fsdp"):
    """Bytes that a step brings to each GPU from its own machine, and to each machine from the others.

    A forward pass gathers the weights in bfloat16, each call anew, and the backward pass once more; then it hands out
    gradients in float32. Among so many machines of 8; hsdp: weights within one, gradients of pieces between them.
    """
    gathered = 2 * sum(p.numel() for p in net.parameters()) * (len(calls) + 1)
    handed = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    within = (gathered + handed) * (GPUS - 1) / GPUS
    between = gathered + handed if parallel == "fsdp" else 2 * handed
    return within, between * (machines - 1) / machines


def print_spread(name, loss, batch_size, figures):
    """Print how training all parameters in float32 spreads over 8, 64 and 1,000 GPUs, so many rows on each.

    figures: of such a step on one GPU, see `needs_of_step`.
    """
    net, about = meta_backbone(name)  # in bfloat16, as pieces are gathered
    steps = calls_of_steps(loss, batch_size)
    block = 2 * max(bytes_of(block.parameters()) for block in net.blocks())
    gradients = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    for each in net.blocks():
        forget(each)
    passing = (bytes_of_calls(net, about, calls, free_gradients=True, autocast=True) for calls in heaviest_steps(steps))
    own, held = block + max(passing), figures["weights"] + figures["optimiser"] + gradients
    rows = []
    for machines, parallel in ((1, "fsdp"), (8, "fsdp"), (8, "hsdp"), (125, "fsdp"), (125, "hsdp")):
        pieces = GPUS * (machines if parallel == "fsdp" else 1)
        within, between = traffic_of_step(net, max(steps, key=len), machines, parallel)
        numbers = [(held / pieces + own) / 2**30, within / 1e9, between / 1e9]
        numbers += [max(within / WITHIN, between / BETWEEN), figures["flops"] / RATE]
        rows.append([str(GPUS * machines), parallel, *(f"{number:.1f}" for number in numbers)])
    header = "GPUs | parallel | held, GiB | from its machine, GB | to its machine, GB | receiving, s | computing, s"
    print("\nall parameters in float32, with an average, on machines of 8 GPUs; a step:\n")
    print(markdown(header.split(" | "), rows))


def largest_batch(figures, batch_size, name, loss, training, memory=LARGE_CARD, kept=None):
    """The most rows whose step fits into the memory of a card; 0 if one row does not.

    figures: of a step of batch_size rows. Bytes grow with the rows along a few straight lines, so each guess is where
    the line through the last two comes to what there is.
    """
    if figures["weights"] + figures["optimiser"] >= memory:
        return 0
    last, rows = (batch_size, figures["peak"]), batch_size + 8
    for _ in range(5):
        now = rows, needs_of_step(name, loss, rows, training, kept=kept)["peak"]
        slope = max(1, (now[1] - last[1]) / (now[0] - last[0]))
        last, rows = now, min(max(0, math.floor(now[0] + (memory - now[1]) / slope)), 10**4)
        if rows in (0, now[0]):
            break
    return rows


def print_needs(name, losses, batch_size):
    """Print what a step of each loss needs with each training, a row each, as a Markdown table in GiB.

    -> dict (method, training) -> the figures of `needs_of_step`.
    """
    net, about = meta_backbone(name)
    count, operations = sum(p.numel() for p in net.model.parameters()), flops_of_call(net, about)
    size = " x ".join(map(str, about.latents))
    print(f"{name}: {count / 1e9:.2f} B parameters; latents {size}, {about.tokens} tokens of text, ", end="")
    print(f"batch {batch_size}; one forward call on one row is {operations / 1e12:.1f} TFLOP")
    for training, (what, _) in TRAININGS.items():
        print(f"- {training}: {what}")
    found, rows = {}, []
    for method, loss in losses.items():
        for training in TRAININGS:
            figures = found[method, training] = needs_of_step(name, loss, batch_size, training)
            sizes = (f"{figures[key] / 2**30:.1f}" for key in ("weights", "optimiser", "passing", "peak"))
            learnt, work = f"{figures['trained'] / 1e6:,.0f} M", f"{figures['flops'] / 1e15:.2f}"
            most = largest_batch(figures, batch_size, name, loss, training)
            rows.append([method, training, learnt, *sizes, str(most), work])
    header = "method | what learns | parameters | weights | optimiser | passing | a step | rows on 80 GB | PFLOP"
    print("\n" + markdown(header.split(" | "), rows))
    return found


def print_few_bits(name, loss, batch_size):
    """Print what a step needs with adapters on quantised weights, as a Markdown table in GiB."""
    rows = []
    for kept in PACKAGES:
        figures = needs_of_step(name, loss, batch_size, "adapters", kept=kept)
        sizes = (f"{figures[key] / 2**30:.1f}" for key in ("weights", "optimiser", "passing", "peak"))
        rows.append([kept, *sizes, str(largest_batch(figures, batch_size, name, loss, "adapters", SMALL_CARD, kept))])
    print("\nadapters on quantised weights, setting `quantize`:\n")
    print(markdown("backbone | weights | optimiser | passing | a step | rows on 24 GB".split(" | "), rows))
