"""Memory of a training step, counted tensor by tensor, on any device: what a method needs beyond flow matching."""

import dataclasses
import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.points import Points
from ..evaluation.features import Classifier
from ..evaluation.tables import markdown
from ..method.losses import TwinFlowLoss
from ..nets.dit import DiT, dimensions
from ..runs.build import dressed, net_of
from ..runs.settings import loss_of
from ..training.loop import autocast, loss_of_batch, train
from ..training.state import new_state
from .speed import median_seconds


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors that operations make, and of those told by `hold`.

    A storage counts once, from when it is first seen until it is freed. `peak` is the most at one time.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def hold(self, tensors):
        """Count tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf))
        return out


def uses_teacher(loss):
    """Whether a loss calls the teacher: for jumps, or as the original of guidance and of data-free training."""
    if not isinstance(loss, TwinFlowLoss):
        return "teacher" in getattr(loss, "helpers", {})
    any_step, flow, *_ = loss.shares()
    if loss.base is not None:
        return any_step + flow > 0 and uses_teacher(loss.base)
    return any_step > 0 or flow > 0 and (loss.guidance > 0 or loss.data_free)


def counter_of(state, loss):
    """A counter that holds all networks of a run; the teacher only where the loss uses it."""
    networks = [state.net, state.average, *state.helpers.values(), *([state.teacher] if uses_teacher(loss) else [])]
    counter = LiveBytes()
    counter.hold(tensor for network in networks for tensor in network.state_dict().values())
    return counter


def auxiliary(loss):
    """How many networks a loss trains and keeps frozen beside the one that generates."""
    kinds = list(getattr(loss, "helpers", {}).values())
    return {"trained": kinds.count("trained") + kinds.count("critic"), "frozen": kinds.count("frozen")}


def step_cost(loss, net, x, steps=8):
    """Bytes of a training step, and the steps themselves, a generator that goes on for ever.

    trained, frozen: auxiliary networks; net, weights: bytes of one network and of all that are held; peak: the most
    held in any of some steps until the optimiser begins, gradients, moments and intermediate results included.
    """
    state = new_state(net, lr=1e-5, helpers=getattr(loss, "helpers", None))
    records = train(state, loss, lambda step: (x, None), 10**6)
    next(records)
    counter, peaks = counter_of(state, loss), []
    weights = counter.now
    counter.hold(
        [x, *(v for moments in state.optimizer.state.values() for v in moments.values() if torch.is_tensor(v))]
    )
    state.optimizer.zero_grad()
    hook = state.optimizer.register_step_pre_hook(lambda *_: peaks.append(counter.peak))
    with counter:
        for _ in range(steps):
            next(records)
            counter.peak = 0  # without what the optimiser makes for itself, which a fused one does not
    hook.remove()
    figures = auxiliary(loss) | {
        "net": sum(tensor.nbytes for tensor in net.state_dict().values()),
        "weights": weights,
        "peak": max(peaks),
    }
    return figures, records


def costs_in_two_dimensions(configs, rounds=5, repeats=6):
    """What a training step of several methods costs on 2D data.  name -> settings  ->  name -> figures of `step_cost`.

    seconds_ratio: median step time over that of flow matching, which must be among them, all called in turn.
    """
    found, steps = {}, {}
    for name, config in configs.items():
        points = Points(config["data"], config["batch_size"])
        torch.manual_seed(0)
        net = net_of(config, points.shape, 0)
        found[name], records = step_cost(loss_of(config), net, points.batch(0)[0])
        steps[name] = partial(next, records)
    times, _ = median_seconds(steps, "cpu", rounds, repeats)
    for name, seconds in times.items():
        found[name]["seconds_ratio"] = seconds / times["flow matching"]
    return found


OF_STATE = ("weights", "gradients", "moments")
BATCHES = (12, 24)  # which divide into the parts of every loss


def costs_of_dit(losses, name, batch_size, size=32, channels=4, classes=1000):
    """Bytes of a training step of a published DiT on latents, in bfloat16 autocast.  name -> loss  ->  name -> figures.

    Counted on any machine: all bytes are a + b depth in the network's depth and c + d batch in the batch, so the
    forward passes of one and of two blocks, at the true width, with 12 and 24 samples, give those of the whole.
    graph: the most that a loss holds before its backward pass begins. Gradients take its place in the course of
    that, so a step needs weights, moments, and the larger of graph and gradients. Raises ValueError for another net.
    """
    if not name.startswith("dit-"):
        raise ValueError(f"unknown net {name!r}: choose from dit-s-2 ... dit-xl-8")
    width, depth, heads, patch = dimensions(name.removeprefix("dit-"))
    bare, found = partial(DiT, size, channels), {}
    for method, loss in losses.items():
        # all parts learn in this step, and pairs are made in one call
        loss = dataclasses.replace(loss, **{key: 1 for key in ("every", "steps") if hasattr(loss, key)})
        corners = {}
        for blocks in (1, 2):
            for samples in BATCHES:
                make = partial(bare, width=width, depth=blocks, heads=heads, patch=patch)
                net = dressed(make, classes, **getattr(loss, "needs", {}))
                corners[blocks, samples] = forward_cost(loss, net, torch.zeros(samples, channels, size, size))
        found[method] = f = {key: extrapolated(corners, key, depth, batch_size) for key in corners[1, BATCHES[0]]}
        f["graph"] = max(f.pop(key) for key in [*f] if key not in OF_STATE)
        f["peak"] = f["weights"] + f["moments"] + max(f["graph"], f["gradients"])
        f |= auxiliary(loss)
    return found


def forward_cost(loss, net, x):
    """Bytes: weights held, gradients, moments of AdamW; and by the number of networks called so far, the most that is
    there beside the weights until another is called, or the loss is done. The most of all is no such straight line.
    """
    state = new_state(net, helpers=getattr(loss, "helpers", None), features=Classifier(x.shape[1], net.classes))
    cond, null = torch.zeros(len(x), dtype=torch.long), torch.tensor([net.classes])
    counter, peaks = counter_of(state, loss), []
    weights = counter.now

    def begin(*_):
        peaks.append(counter.peak - weights)
        counter.peak = counter.now

    networks = (net, state.average, state.teacher, *state.helpers.values())
    hooks = [network.register_forward_pre_hook(begin) for network in networks]
    with counter, autocast("cpu", "bf16"):
        out = loss_of_batch(loss, state, x, cond, null, progress=0.0)
    begin()
    del out
    for hook in hooks:
        hook.remove()
    learning = sum(p.nbytes for group in state.optimizer.param_groups for p in group["params"])
    return dict(zip(OF_STATE, (weights, learning, 2 * learning))) | dict(enumerate(peaks))


def extrapolated(corners, key, depth, batch):
    """A figure, known at depths 1 and 2 and at two batch sizes and bilinear in them, at another depth and batch."""
    low, high = BATCHES
    small, large = ([corners[blocks, samples][key] for samples in BATCHES] for blocks in (1, 2))
    one, two = (a + (b - a) * (batch - low) / (high - low) for a, b in (small, large))
    return one + (two - one) * (depth - 1)


def memory_table(found):
    """The figures of `costs_of_dit` as a Markdown table in GiB, with what a method needs beyond flow matching."""
    header = "method | trained / frozen | weights | moments | graph or gradients | a step | beyond flow matching"
    base, rows = found["flow matching"]["peak"], []
    for method, f in found.items():
        parts = [f["weights"], f["moments"], max(f["graph"], f["gradients"]), f["peak"], f["peak"] - base]
        rows.append([method, f"{f['trained']} / {f['frozen']}", *(f"{part / 2**30:.1f}" for part in parts)])
    return markdown(header.split(" | "), rows)
