"""Euler mean flows (EMF, arXiv 2602.02571): MeanFlow's identity by one Euler step of the network's own velocity.

No forward mode, which large networks and fused kernels lack, and no noise of u in the difference. It is the any-step
base of order 1 but for where the small step goes: along v in place of u.

                paper                                        here
the network     X = x_t - t F, or F                          F
dt              0.01 to 0.05 in the codes that follow it     0.01
times           two uniform ones, sorted; some with r = t    the same; half of the rows
guidance        in u                                         none
We have not found the authors' code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.distances import squared_error
from ..method.path import expand, jump
from ..ranges import as_field
from .common import Checked, lines, terms, weighed


@dataclass
class EulerMeanFlow(Checked):
    """| F - sg(u + (t - r - dt)+ [F(x', t - dt, r) - F(x_t, t, r)] / dt) |^2, x' = x_t - dt F(x_t, t, t)."""

    dt: float = as_field(0.01, "length of the step; where t - r is shorter the target is u", "(0, 1)")
    flow_share: float = as_field(0.5, "share of the rows with r = t", "[0, 1]")
    power: float = as_field(1.0, "each row is divided by its own sg(d + 1e-3)^power", "[0, inf)")
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, generator=None, turns=None, **_):
        rows = lines(x, cond, self.flow_share, generator, turns)
        F, target = net(rows.x_t, rows.t, rows.r, rows.cond), rows.u.clone()
        if jumps := rows.jumps():
            x_t, _, t, r, some = jumps
            with torch.no_grad():
                s = torch.maximum(t - self.dt, r)
                F_s = net(jump(x_t, net(x_t, t, t, some), t, s), s, r, some)
            target[rows.n :] += expand((t - r - self.dt).clamp(min=0), F_s) * (F_s - F[rows.n :].detach()) / self.dt
        return terms(average_velocity=sum(rows.means(weighed(squared_error(F, target), self.power))))
