"""SoFlow (arXiv 2512.15657): the solution function f(x_t, t, s) = x_t - (t - s) F(x_t, t, s), the same from t and from
a time l just below it on the line, for every s.

With alpha-flow's target, a = (t - l) / (t - s), the two are one method but for schedules and shares.

                     code, images                            code, CIFAR       here
flow rows            3/4                                     none              3/4
(t - l) / (t - s)    0.1 to 0.002                            1 to 0.0003       0.1 to 0.002
power, floor         1 and 0.01                              0.75 and 1e-3     1 and 1e-3
times                logit-normal, s kept below t            the same          two uniform ones, sorted
sampled by           jumps to data, noised again             the same          jumps from t to s
Like alpha-flow it is to be trained in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..method.distances import squared_error
from ..ranges import as_field
from .alpha_flow import partly
from .common import Checked, lines, terms, weighed


@dataclass
class SoFlow(Checked):
    """Flow matching on most rows; on the others F along q = (f(x_l, l, s) - sg f(x_t, t, s)) / (t - l), half of it."""

    first: float = as_field(0.1, "(t - l) / (t - s) at the beginning of training", "(0, 1]")
    last: float = as_field(0.002, "at its end, geometric between", "(0, 1]")
    flow_share: float = as_field(0.75, "share of the rows with r = t", "[0, 1]")
    power: float = as_field(1.0, "of the weight, 1 / sg(mean q^2 + 1e-3)^power", "[0, inf)")
    helpers: ClassVar = {}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, generator=None, progress=1.0, turns=None, **_):
        rows = lines(x, cond, self.flow_share, generator, turns)
        rho = self.first * (self.last / self.first) ** progress
        F = net(rows.x_t, rows.t, rows.r, rows.cond)
        q = F.detach() - rows.u
        if jumps := rows.jumps():
            x_t, u, t, s, some = jumps
            q[rows.n :] = (F[rows.n :].detach() - partly(net, x_t, t, s, u, rho, some)) / rho
        flow, consistency = rows.means(weighed(squared_error(F, F.detach() - q), self.power))
        return terms(flow=flow, consistency=0.5 * consistency)
