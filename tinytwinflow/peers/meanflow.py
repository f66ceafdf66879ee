"""MeanFlow (arXiv 2505.13447): the average velocity regressed onto its own differential identity."""

from dataclasses import dataclass
from typing import ClassVar

from ..method.distances import squared_error
from ..method.draws import normal
from ..method.path import expand, interpolate, velocity
from .common import along, terms, two_times, weighed


@dataclass
class MeanFlow:
    """| F(x_t, t, r) - sg(u - (t - r) dF/dt) |^2, dF/dt along the trajectory by forward mode (Eqs. 6-10 there).

    flow_share: share of rows with r = t. power: each row's loss is divided by its own sg(d + 1e-3)^power; 0 is the
    plain squared error, 1 the paper's choice for images.
    """

    flow_share: float = 0.75
    power: float = 1.0
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, generator=None, **_):
        z, (t, r) = normal(x, generator), two_times(x, self.flow_share, generator)
        x_t, u = interpolate(x, z, t), velocity(x, z)
        _, dF = along(net, x_t, t, r, u, cond)
        d = squared_error(net(x_t, t, r, cond), u - expand(t - r, x) * dF)
        return terms(average_velocity=weighed(d, self.power).mean())
