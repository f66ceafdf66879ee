"""Consistency models (arXiv 2303.01469): one function f(x_t, t) that is the same all along a trajectory.

Training (with the improvements of arXiv 2310.14189) takes neighbours of a trajectory from one data-noise
pair; distillation from one step of a frozen flow model.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.draws import normal, uniform
from ..method.path import interpolate, jump
from .common import clean, grid_neighbours, terms


def pseudo_huber(a, b, c):
    """sqrt(|a - b|^2 + c^2) - c per sample; c = 0 the distance, its gradient of the same length for every error."""
    return ((a - b).square().flatten(1).sum(1) + c**2 + 1e-12).sqrt() - c


@dataclass
class ConsistencyTraining:
    """d(f(x_t, t), sg f(x_s, s)) / (t - s), x_t and x_s of one data-noise pair, s one grid point below t.

    first, last: the grid doubles from `first` intervals to `last` over training. c: of the pseudo-Huber
    distance, per element; None takes squared error.
    """

    first: int = 10
    last: int = 160
    c: float | None = 0.03
    helpers: ClassVar = {}
    mode: ClassVar = "few"

    def intervals(self, progress):
        doublings = math.log2(self.last / self.first)
        return min(self.last, self.first * 2 ** int(progress * (doublings + 1)))

    def __call__(self, net, x, cond=None, generator=None, progress=0.0, **_):
        z = normal(x, generator)
        t, s = grid_neighbours(uniform(x, generator), self.intervals(progress))
        x_t = interpolate(x, z, t)
        with torch.no_grad():
            target = clean(net, interpolate(x, z, s), s, cond)
        return terms(consistency=agree(clean(net, x_t, t, cond), target, t - s, self.c))


def agree(a, b, interval, c):
    """Mean of d(a, b) / interval over a batch."""
    d = (a - b).square().flatten(1).sum(1) if c is None else pseudo_huber(a, b, c * a[0].numel() ** 0.5)
    return (d / interval).mean()


@dataclass
class ConsistencyDistillation:
    """d(f(x_t, t), f^-(x_s, s)) / (t - s): x_s one step of the frozen model away, f^- the moving average (Eq. 7 there).

    steps: intervals of the grid. heun: second-order step, as in the paper; else Euler. c: see ConsistencyTraining.
    """

    steps: int = 40
    heun: bool = True
    c: float | None = None
    helpers: ClassVar = {"original": "frozen", "teacher": "average"}
    mode: ClassVar = "few"

    def __call__(self, net, x, original, cond=None, teacher=None, generator=None, **_):
        t, s = grid_neighbours(uniform(x, generator), self.steps)
        x_t = interpolate(x, normal(x, generator), t)
        with torch.no_grad():
            v = original(x_t, t, t, cond)
            if self.heun:
                v = (v + original(jump(x_t, v, t, s), s, s, cond)) / 2
            target = clean(net if teacher is None else teacher, jump(x_t, v, t, s), s, cond)
        return terms(consistency=agree(clean(net, x_t, t, cond), target, t - s, self.c))
