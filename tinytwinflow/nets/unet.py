"""A compact U-Net for images of 16 to 64 pixels: convolutions, with attention where the image is smallest."""

import math

import torch
from torch import nn
from torch.nn import functional as f

from .dit import Attention
from .times import Times, check_image, check_labels, check_times


def norm(channels):
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions around which the input is carried; the condition scales and shifts in between."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(width, 2 * outputs)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.carry = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, c):
        scale, shift = self.condition(f.silu(c))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(f.silu(self.norm1(x)))
        return self.carry(x) + self.conv2(f.silu(self.norm2(h) * (1 + scale) + shift))


class Middle(nn.Module):
    """Attention over all pixels of a small image, around which the input is carried."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.attention = norm(channels), Attention(channels, heads=max(1, channels // 64))
        nn.init.zeros_(self.attention.proj.weight)

    def forward(self, x):
        return x + self.attention(self.norm(x).flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """Velocity field for images.  net(x, t, r, cond) : (B, C, H, H), (B,), (B,), (B,) -> (B, C, H, H), float32.

    t and r lie in [-1, 1]; see `Times` for how they enter. With `classes`, cond holds labels in
    [0, classes]; the last one is the null label. `channels_at`: channels at each resolution, each half
    the one before; size must halve that often. A new network is zero. Raises ValueError for a size,
    shape, label or time that does not fit.
    """

    def __init__(self, size=28, channels=1, classes=0, channels_at=(64, 128, 256), blocks=2):
        super().__init__()
        if size % 2 ** (len(channels_at) - 1) or any(c % 4 for c in channels_at):
            raise ValueError(f"size {size} must halve {len(channels_at) - 1} times, channels be multiples of 4")
        self.size, self.channels, self.classes = size, channels, classes
        width = 4 * channels_at[0]
        self.times = Times(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Conv2d(channels, channels_at[0], 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [channels_at[0]]
        for level, now in enumerate(channels_at):
            if level:
                self.down.append(nn.Conv2d(kept[-1], now, 3, stride=2, padding=1))
                kept.append(now)
            for _ in range(blocks):
                self.down.append(Residual(kept[-1], now, width))
                kept.append(now)
        self.middle = nn.ModuleList([Residual(now, now, width), Middle(now), Residual(now, now, width)])
        for level, below in reversed(list(enumerate(channels_at))):
            for _ in range(blocks + 1):
                self.up.append(Residual(now + kept.pop(), below, width))
                now = below
            if level:
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.last_norm, self.last = norm(now), nn.Conv2d(now, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def blocks(self):
        """The layers of residual connections, in the order of use."""
        return [layer for layer in (*self.down, *self.middle, *self.up) if isinstance(layer, Residual | Middle)]

    def forward(self, x, t, r, cond=None):
        check_image(x, self.channels, self.size)
        check_times(x, t, r)
        labels = check_labels(cond, len(x), self.classes)
        dtype = self.first.weight.dtype
        c = self.times(t, r)
        c = c.to(dtype) if labels is None else (c + self.label(labels)).to(dtype)
        h = self.first(x.to(dtype))
        kept = [h]
        for layer in self.down:
            h = layer(h, c) if isinstance(layer, Residual) else layer(h)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, c) if isinstance(layer, Residual) else layer(h)
        for layer in self.up:
            if isinstance(layer, Residual):
                h = layer(torch.cat([h, kept.pop()], dim=1), c)
            else:
                h = layer(f.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.last(f.silu(self.last_norm(h))).float()
