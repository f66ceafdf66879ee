"""Continuous-time consistency models (sCM, arXiv 2410.11081), on the straight path, not the trigonometric one."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.distances import squared_error
from ..method.draws import normal, uniform
from ..method.path import expand, interpolate, velocity
from .common import along, along_differences, terms


def tangent(net, x_t, t, u, cond, warm, derivative):
    """df/dt of f = x_t - t F(x_t, t, 0) along the trajectory, u - F - warm * t dF/dt.  -> F (no gradient), tangent."""
    r = torch.zeros_like(t)
    if derivative == "jvp":
        F, dF = along(net, x_t, t, r, u, cond)
    else:
        with torch.no_grad():
            F, dF = net(x_t, t, r, cond), along_differences(net, x_t, t, r, u, cond)
    return F, u - F - warm * expand(t, x_t) * dF


def bounded(g, c=0.1):
    """A tangent shortened to at most unit root-mean-square, g / (|g| + c), as sCM does."""
    length = g.square().flatten(1).mean(1).sqrt()
    return g / expand(length + c, g)


@dataclass
class SCM:
    """| F - sg(F + tangent) |^2: F moves so that f stops changing along the trajectory (Eq. 8 there).

    derivative: "jvp", forward mode, or "differences". warm_up: share of training over which the unstable
    part t dF/dt is faded in. normalise: bound the tangent's length. The paper's learnt weight of
    each t is left out. Without a frozen network u = z - x (its sCT).
    """

    derivative: str = "jvp"
    warm_up: float = 0.25
    normalise: bool = True
    helpers: ClassVar = {}
    mode: ClassVar = "few"

    def __call__(self, net, x, cond=None, generator=None, progress=1.0, **_):
        z, t = normal(x, generator), uniform(x, generator)
        x_t, u = interpolate(x, z, t), velocity(x, z)
        F_sg, g = tangent(net, x_t, t, u, cond, min(1.0, progress / self.warm_up), self.derivative)
        target = F_sg + (bounded(g) if self.normalise else g)
        return terms(consistency=squared_error(net(x_t, t, torch.zeros_like(t), cond), target).mean())
