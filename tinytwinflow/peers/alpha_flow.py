"""alpha-flow (arXiv 2510.20771): from flow matching to MeanFlow by way of a step that shrinks.

A jump is drawn onto a part a of the line and the network's own jump over the rest: at a = 1 that is the line alone, as
a goes to 0 it is MeanFlow's identity.

                 paper                    code                          here
the weight       1 / a                    a, of e / (e + 1e-3), e ~ a^2 the same, but 1e-3 goes with a^2, or where a
                                                                        is small it alone is left of the weight
a below 0.005    MeanFlow                 the same, by forward mode     the same
target           as it is                 clipped to [-4, 4]            as it is
times            two logit-normal ones    the same                      two uniform ones
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.distances import squared_error
from ..method.draws import normal
from ..method.path import expand, interpolate, jump, velocity
from .common import along, terms, two_times, weighed


def partly(net, x_t, t, r, u, a, cond=None):
    """Average velocity from t to r of a step of the line, over a part a of the time, and the network's own jump over
    the rest, without gradient: a u + (1 - a) F(x_s, s, r), s = t - a (t - r).
    """
    s = t - a * (t - r)
    with torch.no_grad():
        return a * u + (1 - a) * net(jump(x_t, u, t, s), s, r, cond)


@dataclass
class AlphaFlow:
    """F is moved along q = (F - target) / a, with weight 1 / sg(mean q^2 + 1e-3)^power.

    target: see `partly`; at a = 1, and where r = t, u. a: 1 - sigmoid(25 (progress - 1/2)), 1 above 1 - smallest;
    below smallest q is MeanFlow's, F - u + (t - r) dF/dt. flow_share: share of rows with r = t.
    """

    flow_share: float = 0.5
    power: float = 1.0
    smallest: float = 0.005
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def part(self, progress):
        a = 1 / (1 + math.exp(25 * (progress - 0.5)))
        return 1.0 if a > 1 - self.smallest else a if a >= self.smallest else 0.0

    def __call__(self, net, x, cond=None, generator=None, progress=1.0, **_):
        z, (t, r) = normal(x, generator), two_times(x, self.flow_share, generator)
        x_t, u, a = interpolate(x, z, t), velocity(x, z), self.part(progress)
        F = net(x_t, t, r, cond)
        if a == 0:
            q = F.detach() - u + expand(t - r, x) * along(net, x_t, t, r, u, cond)[1]
        else:
            target = u if a == 1 else partly(net, x_t, t, r, u, a, cond)
            q = torch.where(expand(t > r, x) > 0, (F.detach() - target) / a, F.detach() - u)
        return terms(average_velocity=weighed(squared_error(F, F.detach() - q), self.power).mean())
