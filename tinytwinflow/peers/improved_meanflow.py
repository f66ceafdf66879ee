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
from ..method.path import expand
from ..ranges import as_field
from .common import Checked, along, lines, terms, weighed


@dataclass
class ImprovedMeanFlow(Checked):
    """| V - u |^2, V = F + (t - r) sg(dF/dt), dF/dt along the network's own v = F(x_t, t, t), by forward mode.

    MeanFlow's derivative is along u = z - x, whose noise it multiplies; v has averaged it away.
    """

    flow_share: float = as_field(0.5, "share of the rows with r = t", "[0, 1]")
    power: float = as_field(1.0, "each row is divided by its own sg(d + 1e-3)^power", "[0, inf)")
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, generator=None, turns=None, **_):
        rows = lines(x, cond, self.flow_share, generator, turns)
        target = self.target(rows)
        if jumps := rows.jumps():
            x_t, _, t, r, some = jumps
            with torch.no_grad():
                v = net(x_t, t, t, some)
            target[rows.n :] -= expand(t - r, v) * along(net, x_t, t, r, v, some)[1]
        d = squared_error(net(rows.x_t, rows.t, rows.r, rows.cond), target)
        return terms(average_velocity=sum(rows.means(weighed(d, self.power))))

    def target(self, rows):
        """What V is drawn onto."""
        return rows.u.clone()
