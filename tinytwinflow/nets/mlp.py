"""A multilayer perceptron for points: the smallest network that is a velocity field."""

import math

import torch
from torch import nn

from .times import check_labels, check_times


class MLP(nn.Module):
    """Velocity field for points.  net(x, t, r, cond) : (B, dim), (B,), (B,), (B,) -> (B, dim), in the type of x.

    t and r lie in [-1, 1]. |t| enters by sines and cosines, r through |t| - |r|, so that r = t is the
    same input, zero, at every t. The sign of t switches on a second first and last layer, both zero
    in a new network: the twin is born equal to the real field and learns only how fakes differ, so
    the gap of the two velocities starts at zero and their common errors cancel in it.

    `sharp` doubles x, takes rectified units for smooth ones, and makes the inner layers residual, each fed with units
    that the times scale and shift, as in a DiT. One jump has to tear the noise apart where the borders between modes
    run, and a network that is steep there learns it in fewer steps; the price is a velocity that is smooth only
    piecewise, so methods that differentiate the network in time do better without.

    With `classes`, cond holds labels in [0, classes]; the last one, `classes` itself, is the null
    label "no class". Raises ValueError for a shape or label that does not fit, and for a time
    outside [-1, 1].
    """

    def __init__(self, dim, width=256, depth=4, classes=0, frequencies=8, sharp=False):
        super().__init__()
        if min(dim, width, depth, frequencies) < 1 or classes < 0:
            raise ValueError(f"dim, width, depth and frequencies must be at least 1, got {dim}, {width}, {depth}")
        self.dim, self.classes = dim, classes
        self.scale, self.unit = (2.0, nn.functional.relu) if sharp else (1.0, nn.functional.silu)
        self.register_buffer("k", torch.arange(1, frequencies + 1) * math.pi / 2, persistent=False)
        sizes = [dim + 4 * frequencies] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:]))
        self.modulation = nn.Linear(4 * frequencies, 2 * width * (depth - 1)) if sharp and depth > 1 else None
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.out = nn.Linear(width, dim)
        self.twin_in, self.twin_out = nn.Linear(sizes[0], width), nn.Linear(width, dim)
        for layer in filter(None, (self.out, self.twin_in, self.twin_out, self.modulation)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.modulation:  # units as they are: each layer's shift 0, then its scale 1
            nn.init.ones_(self.modulation.bias.view(-1, 2, width)[:, 1])

    def embed(self, t):
        """Sines and cosines of a time.  (B,) -> (B, 2 * frequencies)."""
        angle = t[:, None] * self.k
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, x, t, r, cond=None):
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, this network takes (B, {self.dim})")
        check_times(x, t, r)
        labels = check_labels(cond, len(x), self.classes)
        dtype = self.out.weight.dtype
        twin = torch.signbit(t)[:, None].to(dtype)
        times = torch.cat([self.embed(t.abs()), self.embed(t.abs() - r.abs())], dim=1).to(dtype)
        inputs = torch.cat([self.scale * x.to(dtype), times], dim=1)
        h = self.layers[0](inputs) + twin * self.twin_in(inputs)
        if self.classes:
            h = h + self.label(labels)
        if self.modulation is None:
            for layer in self.layers[1:]:
                h = layer(self.unit(h))
        else:
            parts = self.modulation(times).chunk(2 * len(self.layers) - 2, dim=1)
            for layer, shift, scale in zip(self.layers[1:], parts[::2], parts[1::2]):
                h = h + layer(torch.addcmul(shift, self.unit(h), scale))
        h = self.unit(h)
        return (self.out(h) + twin * self.twin_out(h)).to(x.dtype)
