"""Memory of a training step, counted tensor by tensor, on any device: what a method needs beyond flow matching."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .bench import in_turn
from .data import Points
from .recipes import loss_of
from .runs import net_of
from .train import new_state, train


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


def held(state, loss):
    """All tensors that a run keeps between steps; the teacher only where the loss uses it."""
    networks = [state.net, state.average, state.helpers]
    if getattr(loss, "helpers", {}).get("teacher") or getattr(loss, "order", 0) > 0:
        networks.append(state.teacher)
    weights = [tensor for network in networks for tensor in network.state_dict().values()]
    moments = [v for moment in state.optimizer.state.values() for v in moment.values() if torch.is_tensor(v)]
    return weights, moments


def cost(configs, rounds=5, repeats=6):
    """What one training step of several methods costs, on 2D data, in one run.  name -> settings  ->  name -> figures.

    trained, frozen: auxiliary networks; net, weights: bytes of one network and of all that are held; peak: most bytes
    held in a step, gradients, moments and intermediate results included; seconds_ratio: median step time over
    that of flow matching, all called in turn.
    """
    found, steps = {}, {}
    for name, config in configs.items():
        loss = loss_of(config)
        points = Points(config["data"], config["batch_size"])
        torch.manual_seed(0)
        net = net_of(config, points.shape, 0)
        kinds = getattr(loss, "helpers", {})
        state = new_state(net, config["lr"], helpers=kinds)
        x = points.batch(0)[0]
        records = train(state, loss, lambda step, x=x: (x, None), 10**6)
        for _ in range(3):
            next(records)
        counter = LiveBytes()
        weights, moments = held(state, loss)
        counter.hold(weights)
        bytes_of_weights = counter.now
        counter.hold(moments)
        with counter:
            next(records)
        found[name] = {
            "trained": sum(kind in ("trained", "critic") for kind in kinds.values()),
            "frozen": sum(kind == "frozen" for kind in kinds.values()),
            "net": sum(tensor.untyped_storage().nbytes() for tensor in net.state_dict().values()),
            "weights": bytes_of_weights,
            "peak": counter.peak,
        }
        steps[name] = lambda records=records: next(records)
    times = in_turn(steps, "cpu", rounds, repeats)
    for name, seconds in times.items():
        found[name]["seconds_ratio"] = seconds / times["flow matching"]
    return found
