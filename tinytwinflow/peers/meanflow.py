"""MeanFlow (arXiv 2505.13447): the average velocity regressed onto its own differential identity."""

from dataclasses import dataclass
from typing import ClassVar

from ..method.distances import squared_error
from ..method.path import expand
from .common import along, lines, terms, weighed


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

    def __call__(self, net, x, cond=None, generator=None, turns=None, **_):
        rows = lines(x, cond, self.flow_share, generator, turns)
        target = rows.u.clone()
        if jumps := rows.jumps():
            x_t, u, t, r, some = jumps
            target[rows.n :] -= expand(t - r, u) * along(net, x_t, t, r, u, some)[1]
        d = squared_error(net(rows.x_t, rows.t, rows.r, rows.cond), target)
        return terms(average_velocity=sum(rows.means(weighed(d, self.power))))
