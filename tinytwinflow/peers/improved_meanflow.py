"""Improved mean flows (iMF, arXiv 2512.02012): MeanFlow as a regression of a velocity, onto a target without network.

                 paper                              code                                here
the tangent v    F(x_t, t, t), or a head of it      a head, trained beside at t - r     F(x_t, t, t)
times            two logit-normal ones, sorted      the same; r = t in half the rows    two uniform ones; the same
power, floor     1                                  1 and 0.01 of the sum over elements 1 and 1e-3 of their mean
guidance         learnt with its scale              the same                            none
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.distances import squared_error
from ..method.draws import normal
from ..method.path import expand, interpolate, velocity
from .common import along, terms, two_times, weighed


@dataclass
class ImprovedMeanFlow:
    """| V - u |^2, V = F + (t - r) sg(dF/dt), dF/dt along the network's own v = F(x_t, t, t), by forward mode.

    MeanFlow's derivative is along u = z - x, whose noise it multiplies; v has averaged it away. flow_share: share of
    rows with r = t. power: see MeanFlow.
    """

    flow_share: float = 0.5
    power: float = 1.0
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, generator=None, **_):
        z, (t, r) = normal(x, generator), two_times(x, self.flow_share, generator)
        x_t = interpolate(x, z, t)
        with torch.no_grad():
            v = net(x_t, t, t, cond)
        _, dF = along(net, x_t, t, r, v, cond)
        V = net(x_t, t, r, cond) + expand(t - r, x) * dF
        return terms(average_velocity=weighed(squared_error(V, self.target(x, z, x_t, t)), self.power).mean())

    def target(self, x, z, x_t, t):
        return velocity(x, z)
