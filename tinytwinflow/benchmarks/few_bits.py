"""What training adapters takes on a backbone of quantised weights, counted without the packages and without weights."""

from functools import partial

import torch
from torch import nn

from ..backbones.quantised import bytes_of_weight


def keep_in(net, kind):
    """Let a `Velocity` on the meta device stand for one whose weights are quantised, in place: its linear layers hold
    so many bytes, and make them whole for a product, as the packages do.
    """
    for name, layer in net.model.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(f"{net.family.embedder}."):
            size = bytes_of_weight(kind, *layer.weight.shape)
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
            layer.forward = partial(_product, layer, kind)


def _product(layer, kind, x):
    shape = layer.out_features, layer.in_features
    if kind == "nf4":
        return _NF4.apply(x, layer.bias, shape)
    whole = x.new_empty(shape)
    if kind == "float8":  # scaled in float32
        whole = (x.new_empty(shape, dtype=torch.float32) * x.new_empty(shape[0], 1, dtype=torch.float32)).to(x.dtype)
    y = x @ whole.mT  # whole is kept for the backward pass
    y = y * x.new_empty(shape[0]) if kind == "int8" else y
    return y if layer.bias is None else y.add_(layer.bias) if kind == "int8" else y + layer.bias


class _NF4(torch.autograd.Function):
    """x W^T + b, where W is made for this, and again in the backward pass."""

    @staticmethod
    def forward(ctx, x, bias, shape):
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None, None
