"""Many processes, one model: DDP for networks that fit on a device, FSDP2 for those that do not.

    torchrun --nproc-per-node 8 -m tinytwinflow train imagenet --device cuda --set parallel=fsdp

Each process works on its own rows of the batch with its own noise. DDP keeps the whole network on every process and
averages the gradients. FSDP2 keeps a piece of every block on each, gathers a block while it is used, and hands
each process the mean gradient of its own piece, in float32. parallel=hsdp does so among the processes of one machine
and averages the gradients of pieces between machines, where the network is slow.
"""

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..files import reason
from ..method.draws import seeded, turns_of

PARALLEL = ("ddp", "fsdp", "hsdp")
COMPILE = ("none", "default", "graphs")  # graphs: of CUDA, for small networks, whose kernels are waited for
MOST_GRAPHS = 64  # how often code may be compiled: each kind of block, with and without gradient, as net and as teacher
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "timed out")


def device_of(name):
    """The name of a device. Raises ValueError if torch does not know it or it is not on this machine."""
    try:
        place = torch.device(name)
        if place.type not in ("cpu", "cuda", "mps") or place.type == "cpu" and place.index:
            raise RuntimeError("choose from cpu, cuda, cuda:1 ... and mps")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is unknown or not on this machine ({reason(error)})") from error
    return name


def refuse_graphs(compile, device):
    """Raise ValueError if CUDA graphs are asked for elsewhere."""
    if compile == "graphs" and not device.startswith("cuda"):
        raise ValueError(f"compile graphs is for device cuda, got {device}: choose default there")


@dataclass
class World:
    """The processes of a run and which of them this one is; the loop of `train` asks it where they must agree."""

    rank: int
    size: int
    device: str
    seed: int = 0
    local: int = 1  # processes on one machine

    def mean(self, values):
        """The mean over processes of a tensor, the same on all; what is not finite on one is not finite on any."""
        dist.all_reduce(values)
        return values / self.size

    def reseed(self, generator, step):
        """The noise of a step is each process's own. -> turns, a generator on the CPU in the same state on all."""
        generator.manual_seed(seeded(self.seed, 4, step, self.rank, self.size).initial_seed())
        return turns_of(self.seed, step)

    def sync(self, network, last):
        """Send gradients only after the last part of an accumulated batch."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        elif isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = last

    def first(self, action):
        """The first process acts while the others wait. What it raises if it fails all of them raise."""
        error = [None]
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError, FloatingPointError) as raised:
                error = [raised]
        dist.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]


def meet(device="cpu", seed=0):
    """Meet the other processes that torchrun started; None without torchrun. cuda: each takes its own GPU."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    device, local = torch.device(device), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), str(device), seed, int(os.environ["LOCAL_WORLD_SIZE"]))


@contextmanager
def joined(device="cpu", seed=0):
    """`join` for as long as the context lasts. Raises ConnectionError in one line if another process dies."""
    world = meet(device, seed)
    try:
        yield world
    except RuntimeError as error:
        if world is None or not any(word in str(error) for word in LOST):
            raise
        raise ConnectionError(f"process {world.rank}: another process of the run has ended") from error
    finally:
        if world is not None:
            dist.destroy_process_group()


@contextmanager
def without_weights():
    """Networks made inside have their parameters on the meta device: shapes without memory. The rest is real."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def blocks_of(net):
    """The layers that repeat, in the order of use: what is gathered, recomputed and compiled one at a time."""
    blocks = getattr(net, "blocks", ())
    return list(blocks() if callable(blocks) and not isinstance(blocks, nn.ModuleList) else blocks)


def forget(block):
    """Keep only a block's input for the backward pass, and compute the block again there."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_as(net, how):
    """Compile a network in place: "default", or "graphs", which replays its kernels as one CUDA graph.

    By default its blocks are compiled, those of one kind once and for any number of rows; a network without blocks as a
    whole. Graphs are of the whole network, and each number of rows has its own.
    """
    if how == "none":
        return
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    blocks = blocks_of(net) if how == "default" else []
    for module in blocks or [net]:
        forward = module.forward
        if getattr(forward, "__self__", None) is not module:
            raise ValueError(f"{type(module).__name__}.forward is no method of its own: choose compile none")
        # a method: in a deep copy of the network it is the copy's
        module.forward = MethodType(compiled(forward.__func__, how), module)


def compiled(forward, how):
    """A module's forward, compiled so that other calls do not make it compile again.

    Rows are marked as what varies; a tensor that comes twice, or is a part of another, is given as a copy. So is the
    answer of a CUDA graph, for its next call writes over it.
    """
    fast = torch.compile(forward, mode="reduce-overhead") if how == "graphs" else torch.compile(forward)

    @wraps(forward)  # whose name a file of the whole network keeps
    def call(module, *args, **kwargs):
        leaves, kind = tree_flatten((args, kwargs))
        rows = next((len(leaf) for leaf in leaves if torch.is_tensor(leaf) and leaf.ndim), 0)
        for i, leaf in enumerate(leaves):
            if torch.is_tensor(leaf):
                twice = any(leaf is before for before in leaves[:i])
                if twice or leaf._is_view() or leaf.storage_offset():
                    leaves[i] = leaf.clone()
                if how == "default" and leaf.ndim and len(leaf) == rows:
                    torch._dynamo.maybe_mark_dynamic(leaves[i], 0)
        args, kwargs = tree_unflatten(leaves, kind)
        answer = fast(module, *args, **kwargs)
        return answer.clone() if how == "graphs" else answer

    return call


def prepare(net, world=None, parallel="ddp", precision="float32", recompute=False, compile="none"):
    """Make a network ready to train on one device or on its share of many, in place.  -> net

    Under FSDP2 the network may be on the meta device and then comes back with memory but without values, see
    `deal_out`; precision "bf16" gathers bfloat16 copies of float32 pieces and sums gradients in float32. A network
    without `blocks` is one piece. Times stay as they are: inputs are not cast.
    """
    blocks = blocks_of(net)
    if recompute and not blocks:
        raise ValueError(f"recompute needs a network with blocks, {type(net).__name__} has none")
    compile_as(net, compile)
    if recompute and any(parameter.requires_grad for parameter in net.parameters()):
        for block in blocks:
            forget(block)
    if world is not None and parallel != "ddp":
        kind = torch.device(world.device).type
        sizes = {"pieces": world.size}
        if parallel == "hsdp":
            sizes = {"copies": world.size // world.local, "pieces": world.local}
        mesh = dist.device_mesh.init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        reduced = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(reduced, reduced and torch.float32, cast_forward_inputs=False)
        for module in (*blocks, net):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        net._apply(lambda p: torch.empty_like(p, device=world.device) if p.is_meta else p.to(world.device))
    return net


def deal_out(net, weights):
    """Give a sharded network its weights: the first process holds them all, the others an empty dict."""
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def as_copies(net, device):
    """The network as the loss calls it where each process has a copy: DDP averages the gradients."""
    on = [torch.device(device)] if torch.device(device).type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for the last argument
        return DistributedDataParallel(net, on, broadcast_buffers=False)


def first(world, action):
    """The first process acts while the others wait; one process alone just acts. If it fails, it does so on all."""
    return action() if world is None else world.first(action)
