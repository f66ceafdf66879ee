"""alpha-flow (arXiv 2510.20771): from flow matching to MeanFlow by way of a step that shrinks.

A jump is drawn onto a part a of the line and the network's own jump over the rest: at a = 1 that is the line alone, as
a goes to 0 it is MeanFlow's identity.

                 paper                    code                          here
the weight       1 / a                    a, of e / (e + 1e-3), e ~ a^2 the same, but 1e-3 goes with a^2, or where a
                                                                        is small it alone is left of the weight
a below 0.005    MeanFlow                 the same, by forward mode     the same
target           as it is                 clipped to [-4, 4]            as it is
times            two logit-normal ones    the same                      two uniform ones
Where a is small q is a small difference made large: train it in float32, bfloat16 rounds it away.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.distances import squared_error
from ..method.path import expand, jump
from ..ranges import as_field
from .common import Checked, along, lines, terms, weighed


def partly(net, x_t, t, r, u, a, cond=None):
    """Average velocity from t to r of a step of the line, over a part a of the time, and the network's own jump over
    the rest, without gradient: a u + (1 - a) F(x_s, s, r), s = t - a (t - r).
    """
    s = t - a * (t - r)
    with torch.no_grad():
        return a * u + (1 - a) * net(jump(x_t, u, t, s), s, r, cond)


@dataclass
class AlphaFlow(Checked):
    """F is moved along q = (F - target) / a, with weight 1 / sg(mean q^2 + 1e-3)^power.

    target: see `partly`; at a = 1, and where r = t, u. a: 1 - sigmoid(25 (progress - 1/2)), and 1 above 1 - smallest;
    below smallest q is MeanFlow's, F - u + (t - r) dF/dt.
    """

    flow_share: float = as_field(0.5, "share of the rows with r = t", "[0, 1]")
    power: float = as_field(1.0, "of the weight", "[0, inf)")
    smallest: float = as_field(0.005, "a below which it is MeanFlow's, and 1 - a below which it is 1", "(0, 0.5)")
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def part(self, progress):
        a = 1 / (1 + math.exp(25 * (progress - 0.5)))
        return 1.0 if a > 1 - self.smallest else a if a >= self.smallest else 0.0

    def __call__(self, net, x, cond=None, generator=None, progress=1.0, turns=None, **_):
        rows, a = lines(x, cond, self.flow_share, generator, turns), self.part(progress)
        F = net(rows.x_t, rows.t, rows.r, rows.cond)
        q = F.detach() - rows.u
        if a < 1 and (jumps := rows.jumps()):
            x_t, u, t, r, some = jumps
            if a == 0:
                q[rows.n :] += expand(t - r, u) * along(net, x_t, t, r, u, some)[1]
            else:
                q[rows.n :] = (F[rows.n :].detach() - partly(net, x_t, t, r, u, a, some)) / a
        d = weighed(squared_error(F, F.detach() - q), self.power)
        return terms(average_velocity=sum(rows.means(d)))
