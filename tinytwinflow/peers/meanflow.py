"""MeanFlow (arXiv 2505.13447): the average velocity regressed onto its own differential identity."""

from dataclasses import dataclass
from typing import ClassVar

from ..method.distances import squared_error
from ..method.path import expand
from ..ranges import as_field
from .common import Checked, along, lines, terms, weighed


@dataclass
class MeanFlow(Checked):
    """| F(x_t, t, r) - sg(u - (t - r) dF/dt) |^2, dF/dt along the trajectory by forward mode (Eqs. 6-10 there)."""

    flow_share: float = as_field(0.75, "share of the rows with r = t", "[0, 1]")
    power: float = as_field(
        1.0, "each row is divided by its own sg(d + 1e-3)^power; 1 is the paper's for images", "[0, inf)"
    )
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
