"""APEX (arXiv 2604.12322): the fakes' branch told apart by a shifted condition, c' = A c + b, not by negative time.

The network knows both conditions, see `nets.Shifted`. As printed the two terms have no one-step generator as their
fixed point: at t = 1 both branches see nothing but noise, F(z, 1, c') follows F(z, 1, c), and what is left draws
F(z, 1, c) onto z - E[x]; the tests show it. What works has the any-step base, whose jumps know the data, and the gap
of the two branches at noised fakes, both as in TwinFlow.

                 paper, `printed`                     released code            here
fakes' branch    shifted condition                    negative time            shifted condition
x_f              x_t - t F(x_t, t, c), with gradient  sg(z - F(z, 1, 0))       sg(z - F(z, 1, 0))
its noise        that of x_t                          fresh                    fresh
the jump         F(x_t, t, c), no second time         any-step base            any-step base, order 8
mixed target     all rows                             none                     the rows that teach the velocity
gap dv           none                                 at the one-step rows     at the one-step rows
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import mean, normal, shuffled, split, uniform
from ..method.losses import TwinFlowLoss
from ..method.path import denoise, interpolate, velocity
from ..ranges import as_field
from .common import Checked, terms


def branches(net):
    """The twin's field of a network with shifted conditions: negative times ask the shifted branch at |t|, |r|."""

    def field(x, t, r, cond=None):
        return net(x, t.abs(), r.abs(), {"cond": cond, "shift": torch.signbit(t).long()})

    return field


@dataclass
class APEX(Checked):
    """TwinFlow on the two branches, and t (1 - t) |F(x_t, t, t, c) - [(1 - mixing) u + mixing v_f]|^2 (Eqs. 22-24).

    v_f = sg F(x_t, t, t, c').
    """

    mixing: float = as_field(0.5, "the paper's lambda", "[0, 1]")
    mixed_share: float = as_field(0.25, "share of the rows with the mixed target, in place of the flow rows", "[0, 1]")
    weight: float = as_field(0.3, "weight of the twin's terms", "[0, inf)")
    printed: bool = as_field(False, "Eqs. 10-12 and 22-25 as they stand, F(x_t, t, c) asked at r = 0")
    helpers: ClassVar = {"teacher": "average"}
    needs: ClassVar = {"shifted": True}
    mode: ClassVar = "any"

    def __call__(self, net, x, cond=None, teacher=None, generator=None, turns=None, **_):
        field = branches(net)
        if self.printed:
            t = uniform(x, generator)
            return terms(**self.as_printed(field, x, normal(x, generator), t, torch.zeros_like(t), cond))
        (n, _), (by, by_twin) = split(len(x), (self.mixed_share, 1 - self.mixed_share), turns or generator)
        x, cond = shuffled(x, cond, generator)
        parts = {}
        if n:
            t = uniform(x[:n], generator)
            mixed, _ = self.mixed(field, x[:n], normal(x[:n], generator), t, t, take(cond, slice(n)))
            parts["mixed"] = mean(mixed, by)
        if n < len(x):
            loss = TwinFlowLoss(flow_share=0.0, adversarial_weight=self.weight, rectify_weight=self.weight)
            teacher = field if teacher is None else branches(teacher)
            more = {"teacher": teacher, "generator": generator, "turns": turns}
            twin = loss(field, x[n:], take(cond, slice(n, None)), **more)
            parts["twin"] = (len(x) - n) / by_twin * twin.total
        return terms(**parts)

    def mixed(self, field, x, z, t, r, cond):
        """t (1 - t) |F - [(1 - mixing) u + mixing v_f]|^2, a number a row, and F."""
        x_t, u = interpolate(x, z, t), velocity(x, z)
        F = field(x_t, t, r, cond)
        with torch.no_grad():
            target = (1 - self.mixing) * u + self.mixing * field(x_t, -t, -r, cond)
        return t * (1 - t) * squared_error(F, target), F

    def as_printed(self, field, x, z, t, r, cond):
        mixed, F = self.mixed(field, x, z, t, r, cond)
        x_f = denoise(interpolate(x, z, t), F, t)
        F_f = field(interpolate(x_f, z, t), -t, -r, cond)
        return {"fake": squared_error(F_f, velocity(x_f, z)).mean(), "mixed": mixed.mean()}
