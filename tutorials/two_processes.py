"""Two processes take one step of TwinFlow: the same gradient as one process, what each holds, and what is sent.

torchrun --nproc-per-node 2 tutorials/two_processes.py     on CPUs; tutorial 8 does this
python tutorials/two_processes.py                          the same functions without a launcher: one process, no world
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch.distributed.tensor.debug import CommDebugMode

import tinytwinflow as ttf
from tinytwinflow.training import distributed
from tinytwinflow.training.loop import loss_of_batch, train

LOSS, NULL, SEED = ttf.TwinFlowLoss.paper(flow_share=0.5, guidance=0.5), torch.tensor([3]), 7


def build():
    """The network, the same wherever it is built."""
    torch.manual_seed(0)
    net = ttf.nets.DiT(size=4, channels=1, classes=3, width=32, depth=2, heads=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def batch(rank, step):
    """Six images and labels of a process's own."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 1, 4, 4, generator=draw), torch.randint(0, 3, (6,), generator=draw)


def start(world, parallel):
    """A State: networks whole, or made without weights and cut, and the first process deals the weights out."""
    cut = world is not None and parallel == "fsdp"
    with distributed.without_weights() if cut else nullcontext():
        net = build()
    place = partial(distributed.prepare, world=world, parallel=parallel, recompute=True)
    state = ttf.training.new_state(net, place=place)
    if cut:
        distributed.deal_out(state.net, build().state_dict() if world.rank == 0 else {})
        state.restart()
    elif world is not None:
        state.call = distributed.as_copies(state.net, world.device)
    return state


def one_step(state, world):
    """One loss and its gradient.  -> calls of the network, gathers, hand-outs of gradients"""
    calls = []
    hooks = [net.register_forward_hook(lambda *_: calls.append(1)) for net in (state.net, state.teacher)]
    turns = world.reseed(state.generator, 0)
    with CommDebugMode() as messages:
        loss_of_batch(LOSS, state, *batch(world.rank, 0), NULL, turns=turns).total.backward()
    for hook in hooks:
        hook.remove()
    sent = messages.get_comm_counts().items()  # collectives, and how often each was called
    return [len(calls), *(sum(n for name, n in sent if word in str(name)) for word in ("allgather", "reduce_scatter"))]


def alone(size):
    """The gradient of one process that plays all parts, one after another, and averages."""
    net = build()
    for rank in range(size):
        world, draw = distributed.World(rank, size, "cpu", SEED), torch.Generator()
        turns = world.reseed(draw, 0)
        x, label = batch(rank, 0)
        (LOSS(net, x, label, null=NULL, generator=draw, turns=turns).total / size).backward()
    return [p.grad for p in net.parameters()]


def ten_steps(state, world):
    """Their losses, as words."""
    rank = world.rank if world else 0
    records = train(state, LOSS, lambda i: batch(rank, i), steps=10, null=3, world=world)
    return " ".join(f"{record['total']:.2f}" for record in records)


def compare(world):
    """Both ways to spread a step; the first process tells."""
    right = alone(world.size)
    for parallel in ("ddp", "fsdp"):
        state = start(world, parallel)
        calls, gathers, handed = one_step(state, world)
        cut, parameters = parallel == "fsdp", list(state.net.parameters())
        held = sum((p.to_local() if cut else p).numel() for p in parameters)
        found = [p.grad.full_tensor() if cut else p.grad for p in parameters]
        off = max((a - b).abs().max() for a, b in zip(found, right)) / max(g.abs().max() for g in right)
        losses = ten_steps(state, world)
        if world.rank == 0:
            print(f"{parallel}: a process holds {held:,} of {sum(g.numel() for g in right):,} numbers")
            print(f"{parallel}: gradient off by {off.item():.0e}; {calls} calls, {gathers} gathers, {handed} hand-outs")
            print(f"{parallel}: loss of ten steps {losses}", flush=True)
        if off > 1e-5:
            raise SystemExit(f"{parallel}: the gradient is another than that of one process")


if __name__ == "__main__":
    with distributed.joined("cpu", SEED) as world:
        if world is None:
            print(f"one process: loss of ten steps {ten_steps(start(None, 'ddp'), None)}")
        else:
            compare(world)
