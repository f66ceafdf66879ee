"""Progressive distillation (arXiv 2202.00512): a student takes in one step what its teacher takes in two, in stages."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import mean, normal, split, uniform
from ..method.path import interpolate
from .common import grid_neighbours, terms
from .shortcut import two_jumps

STAGES = 7  # 64, 32, ..., 1 steps; the first teacher takes 128 steps of its velocity


@dataclass
class Progressive:
    """Stage after stage: F(x_t, t, t - 1/N) is two steps of the frozen network, the student of the stage before.

    rehearse: share of rows that keep the jumps of earlier stages, so that one network also samples in
    2, 4, 8 steps; the paper has none, and a network for each number of steps. truncated: weight the error by
    max(1, SNR) of x^, the paper's choice, in place of the error of the velocity.
    """

    rehearse: float = 0.25
    truncated: bool = False
    helpers: ClassVar = {"original": "frozen", "teacher": "average"}
    refill: ClassVar = tuple(stage / STAGES for stage in range(1, STAGES))
    mode: ClassVar = "any"

    def __call__(self, net, x, original, cond=None, generator=None, progress=0.0, turns=None, **_):
        stage = min(int(progress * STAGES + 1e-9), STAGES - 1)
        shares = (self.rehearse, 1 - self.rehearse) if stage else (0.0, 1.0)
        (k, _), divisors = split(len(x), shares, turns or generator)
        old, new = slice(0, k), slice(k, None)
        u = uniform(x, generator)
        intervals = torch.full_like(u, 2.0 ** (STAGES - 1 - stage))
        intervals[old] = 2.0 ** (STAGES - 1 - (u[old] * stage).floor())
        t, r = grid_neighbours(uniform(x, generator), intervals)
        x_t = interpolate(x, normal(x, generator), t)
        with torch.no_grad():
            target = torch.empty_like(x)
            if k:
                target[old] = original(x_t[old], t[old], r[old], take(cond, old))
            if k < len(x):
                shortest = intervals[new] == 2 ** (STAGES - 1)
                target[new] = two_jumps(original, x_t[new], t[new], r[new], shortest, take(cond, new))
        weight = t**2 * torch.maximum(torch.ones_like(t), ((1 - t) / t) ** 2) if self.truncated else 1.0
        d = weight * squared_error(net(x_t, t, r, cond), target)
        parts = zip(shares, (old, new), divisors)
        return terms(distillation=sum(share * mean(d[rows], divisor) for share, rows, divisor in parts))
