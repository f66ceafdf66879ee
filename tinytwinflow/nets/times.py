"""What every network does with its inputs other than x: embeds both times, and checks times and labels."""

import math

import torch
from torch import nn

from ..method.path import check_time


class Sinusoids(nn.Module):
    """Embedding of one time: cosines and sines, then a small MLP.  (B,) -> (B, width), in float32.

    The frequencies and parameter names are those of DiT and SiT. Everything is computed in float32
    whatever the precision of the weights or of autocast: bfloat16 cannot tell 0.99 from 0.992, so a small
    step dt would vanish in it.
    """

    def __init__(self, width, features=256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t):
        half = self.features // 2
        k = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angle = t.float()[:, None] * k
        with torch.autocast(t.device.type, enabled=False):
            h = torch.cat([angle.cos(), angle.sin()], dim=1)
            for layer in (self.mlp[0], self.mlp[2]):
                h = nn.functional.linear(h, layer.weight.float(), layer.bias.float())
                h = nn.functional.silu(h) if layer is self.mlp[0] else h
        return h


class Times(nn.Module):
    """Embedding of both times, emb(|t|) + (t - r) emb_r(r) + [t < 0] emb_twin(|t|).  (B,), (B,) -> (B, width).

    At r = t > 0 only the first term is left, so a pretrained flow model stays the function it was. The
    other two begin at zero: a new jump starts as the velocity, and the twin as the real field. `shown`
    is what the first term embeds in place of |t|, for a network whose time has another unit.
    """

    def __init__(self, width):
        super().__init__()
        self.t, self.r, self.twin = Sinusoids(width), Sinusoids(width), Sinusoids(width)
        for embedding in (self.r, self.twin):
            nn.init.zeros_(embedding.mlp[2].weight)

    def forward(self, t, r, shown=None):
        length, twin = (t - r).float()[:, None], torch.signbit(t).float()[:, None]
        return self.t(t.abs() if shown is None else shown) + length * self.r(r) + twin * self.twin(t.abs())


def check_times(x, t, r):
    """Raise ValueError unless t and r hold one time in [-1, 1] for each row of x."""
    if t.shape != x.shape[:1] or r.shape != x.shape[:1]:
        raise ValueError(f"t and r must have shape ({len(x)},), got {tuple(t.shape)} and {tuple(r.shape)}")
    check_time(t, low=-1.0)
    check_time(r, low=-1.0, name="r")


def check_image(x, channels, size):
    """Raise ValueError unless x is a batch of images (B, channels, size, size)."""
    if x.ndim != 4 or x.shape[1:] != (channels, size, size):
        raise ValueError(f"x has shape {tuple(x.shape)}, this network takes (B, {channels}, {size}, {size})")


def check_labels(cond, n, classes):
    """Labels as a network with so many classes takes them, of any whole kind: n in [0, classes], or None without.

    The last one, `classes` itself, is the null label. Raises ValueError for anything else; values are
    looked at on the CPU only.
    """
    if not classes:
        if cond is not None:
            raise ValueError("this network is unconditional: it takes no cond")
        return None
    if cond is None:
        raise ValueError(f"this network is conditional: cond must hold labels in [0, {classes}]")
    if not torch.is_tensor(cond):
        raise ValueError(f"labels must be a tensor of {n} whole numbers, got {type(cond).__name__}")
    if cond.shape != (n,) or cond.is_floating_point() or cond.is_complex():
        raise ValueError(f"labels must be {n} whole numbers, got {cond.dtype} of shape {tuple(cond.shape)}")
    looked_at = cond.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and n and not (0 <= cond.min() and cond.max() <= classes):
        raise ValueError(f"labels must lie in [0, {classes}], got {cond.min()} to {cond.max()}")
    return cond.long()
