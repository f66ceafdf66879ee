"""The calls of a loss, made again on a large backbone's real configuration, without weights or a GPU, and counted.

The loss runs on tiny tensors and its calls are written down: on which network, how many rows, with or without
gradient. Then the calls are made again, in order, on the backbone on the meta device, where tensors have a shape
and no memory, while all bytes are counted.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from unittest.mock import patch

import torch
from torch.autograd import forward_ad
from torch.nn import functional as f
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..backbones.families import diffusers_class, published_backbone
from ..backbones.family import free, sizes
from ..backbones.velocity import Velocity
from ..method.draws import turns_of
from ..method.losses import TwinFlowLoss
from ..method.path import expand
from ..training.distributed import without_weights
from .memory import LiveBytes


def named_structure(name, **changes):
    """A published backbone, or with some settings changed, without weights, and its Configuration.

    Raises ValueError for an unknown name.
    """
    kind, about = published_backbone(name)
    with without_weights():
        return Velocity(diffusers_class(kind, name)(**{**about.settings, **changes})), about


def meta_backbone(name):
    """A published backbone on the meta device in bfloat16, and its Configuration."""
    net, about = named_structure(name)
    return net.to("meta", torch.bfloat16), about


def condition_for(net, rows, tokens, make=torch.empty, device="meta"):
    """A condition that fits a network: dict of (rows, ...), by default without values."""
    found = {}
    for name, axes in net.cond.items():
        lengths = {axis: tokens for axis in axes if free(axis)}
        kind = torch.bool if name.endswith("mask") else torch.bfloat16 if axes else torch.float32
        found[name] = make((rows, *sizes(axes, net.model.config, lengths)), device=device).to(kind)
    return found


@dataclass(frozen=True)
class Call:
    """A call that a loss makes: which network, how many rows, whether a gradient will go back through it."""

    network: str
    rows: int
    gradient: bool


def calls_of(loss, rows, seed=0, labels=True, steps=1):
    """The calls of so many steps of a loss on so many rows, in order; one in forward mode, which carries a tangent
    beside its answer, stands there twice. labels: whether the loss is given conditions. The features that samples are
    compared by are not counted.
    """
    made, weight = [], torch.nn.Parameter(torch.ones(()))

    def network(name):
        def field(x, t, r, cond=None):
            y = x * weight * math.exp(-0.1 * len(name)) + 0 * expand(t + r, x)
            made.extend([Call(name, len(x), y.requires_grad)] * (1 + (forward_ad.unpack_dual(y).tangent is not None)))
            return y

        return field

    names = [name for name, kind in getattr(loss, "helpers", {}).items() if kind != "features"]
    x, cond, null = torch.ones(rows, 2), torch.zeros(rows) if labels else None, torch.zeros(1)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(loss, TwinFlowLoss):
        more = {"teacher": network("teacher"), "original": network("teacher"), "null": null}
    else:
        more = {name: network(name) for name in names}
        more["teacher" if "teacher" in names else "null"] = more.get("teacher", null)
    net = network("net")
    for step in range(steps):
        when = {"turns": turns_of(seed, step), "progress": (step + 0.5) / steps}
        loss(net, x, cond=cond, generator=generator, **when, **more)
    return made


class _Fused(torch.autograd.Function):
    """Attention as fused kernels hold it: inputs, output and a number a row are kept, no matrix of all pairs."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device), mask)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


def _fused(query, key, value, attn_mask=None, *_, **__):
    return _Fused.apply(query, key, value, attn_mask)


CASTS = {  # of the functions in torch's lists of what autocast casts on CUDA, those that the backbones call
    torch.bfloat16: ((f, "linear"), (f, "conv2d"), (f, "scaled_dot_product_attention"), (torch, "matmul"),
                     (torch, "einsum")),
    torch.float32: ((f, "layer_norm"), (f, "rms_norm")),
}  # fmt: skip


def _cast(function, dtype, *args, **kwargs):
    args, kwargs = tree_map(
        lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, (args, kwargs)
    )
    return function(*args, **kwargs)


@contextmanager
def as_on_gpu(autocast):
    """Networks on the meta device hold inside what they would on a GPU: attention is fused, and with autocast tensors
    are cast as torch.autocast does, which knows no meta device.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(f, "scaled_dot_product_attention", _fused))
        for dtype, functions in CASTS.items() if autocast else ():
            for room, name in functions:
                stack.enter_context(patch.object(room, name, partial(_cast, getattr(room, name), dtype)))
        yield


def _free(parameter):
    parameter.grad = None


def bytes_of_calls(net, about, calls, free_gradients=False, autocast=False, others=None):
    """Most bytes that the calls and their backward pass hold beyond the weights, gradients included.

    net: the backbone, its blocks recomputed, which stands for every network that is called but for others, those that
    learn beside it, by name: each has gradients of its own. about: its Configuration. free_gradients: those of weights
    are let go as soon as they are there. autocast: networks run under autocast in bfloat16.
    """
    others = others or {}
    counter, networks = LiveBytes(), [net, *others.values()]
    parameters = [p for network in networks for p in network.parameters()]
    counter.hold([*parameters, *(b for network in networks for b in network.buffers())])
    start, graphs, hooks = counter.now, [], []
    if free_gradients:
        hooks = [p.register_post_accumulate_grad_hook(_free) for p in parameters if p.requires_grad]
    with counter, as_on_gpu(autocast):
        for gradient, some in groupby(calls, lambda call: call.gradient):
            # calls without gradient leave nothing behind: the largest stands for all that follow one another
            for call in some if gradient else [max(some, key=lambda call: call.rows)]:
                x, t = torch.empty(call.rows, *about.latents, device="meta"), torch.empty(call.rows, device="meta")
                with torch.set_grad_enabled(gradient):
                    y = others.get(call.network, net)(x, t, t, condition_for(net, call.rows, about.tokens))
                if gradient:
                    graphs.append(y)
                del y
        while graphs:
            y = graphs.pop()
            y.backward(torch.empty_like(y))
            del y
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return counter.peak - start


def flops_of_call(net, about):
    """Floating-point operations of one forward call on one row."""
    x, t = torch.empty(1, *about.latents, device="meta"), torch.empty(1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        net(x, t, t, condition_for(net, 1, about.tokens))
    return counted.get_total_flops()


def work_of_calls(calls, low_rank):
    """A step in forward calls of one row. A call with gradient is one, one again for its recomputed blocks, one for
    the gradient of activations and, unless the weights are frozen, one for that of the weights.
    """
    return sum(call.rows * ((3 if low_rank else 4) if call.gradient else 1) for call in calls)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
