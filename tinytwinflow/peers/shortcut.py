"""Shortcut models (arXiv 2410.12557): flow matching, and jumps taught by two jumps of half the length."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import normal, uniform
from ..method.path import interpolate, jump, velocity
from .common import grid_neighbours, terms


@dataclass
class Shortcut:
    """Flow matching on most rows; on the others F(x_t, t, t - 2d) = mean of two jumps of d.

    share: of rows that bootstrap. finest: 1 / d of the shortest jump, which is taught by two steps of
    the velocity; longer ones, in powers of two, by the moving average's jumps.
    """

    share: float = 0.25
    finest: int = 128
    helpers: ClassVar = {"teacher": "average"}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, teacher=None, generator=None, **_):
        teacher = net if teacher is None else teacher
        z, k = normal(x, generator), max(1, round(self.share * len(x)))
        t = uniform(x, generator)
        doublings = self.finest.bit_length() - 1
        intervals = 2.0 ** (uniform(x, generator)[:k] * doublings).floor()  # 1 ... finest / 2 jumps of length 2d
        r = t.clone()
        t[:k], r[:k] = grid_neighbours(t[:k], intervals)
        x_t = interpolate(x, z, t)
        with torch.no_grad():
            target, some = velocity(x, z), take(cond, slice(0, k))
            target[:k] = two_jumps(teacher, x_t[:k], t[:k], r[:k], intervals == self.finest / 2, some)
        d = squared_error(net(x_t, t, r, cond), target)
        return terms(bootstrap=d[:k].sum() / len(x), flow=d[k:].sum() / len(x))


def two_jumps(net, x_t, t, r, shortest, cond):
    """Average velocity of two jumps of equal length from t to r; where `shortest` they are steps of the velocity."""
    middle = (t + r) / 2
    first = net(x_t, t, torch.where(shortest, t, middle), cond)
    second = net(jump(x_t, first, t, middle), middle, torch.where(shortest, middle, r), cond)
    return (first + second) / 2
