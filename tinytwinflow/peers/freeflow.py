"""FreeFlow (arXiv 2511.19428): a flow map from a frozen flow model alone, without data, by prediction and correction.

Data are never read, only their shape. Jumps begin at noise: x_r = z - (1 - r) F(z, 1, r) is to move with r as the
frozen velocity says, and what errors of that leave is corrected as VSD does.

                   paper                            here
correction's t     logit-normal, leaning to noise   logit-normal of mean 0.8, spread 1
prediction's r     not known to us                  uniform
rows               3/4 and 1/4                      the same
guidance           in the frozen velocity           none
There is no public training code; the equations are those of the paper's accounts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import normal, uniform
from ..method.path import expand, jump
from ..method.twin import generate, same_time
from ..ranges import as_field
from .common import Checked, derivative, moved, renoise, terms


@dataclass
class FreeFlow(Checked):
    """F(z, 1, r) along -w (v_G - v), v_G = dx_r/dr = F - (1 - r) dF/dr; F(z, 1, 0) along -lambda (v_fake - v).

    w = 1 / (d + 1e-3)^power, d the row's mean of (v_G - v)^2 (Eqs. 7-9 there). lambda = alpha |v_G - v| / |v_fake - v|,
    means over rows of the norms (Eqs. 10-12).
    """

    alpha: float = as_field(1.0, "length of the correction's gradient, in those of the prediction's", "[0, inf)")
    power: float = as_field(1.0, "of the prediction's weight", "[0, inf)")
    share: float = as_field(0.75, "of the rows that are predicted, the others are corrected", "[0, 1]")
    helpers: ClassVar = {"original": "frozen", "fake": "trained"}
    mode: ClassVar = None

    def __call__(self, net, x, original, fake, cond=None, generator=None, **_):
        part, rest = both_parts(len(x), self.share)
        z, r, cond_n = normal(x[part], generator), uniform(x[part], generator), take(cond, part)
        one = same_time(1, z)
        F, D = net(z, one, r, cond_n), along_target(net, original, z, one, r, cond_n)
        w = (squared_error(D, torch.zeros_like(D)) + 1e-3) ** -self.power

        z, cond_k = normal(x[rest], generator), take(cond, rest)
        x_fake = generate(net, z, cond_k)
        t = torch.sigmoid(0.8 + torch.randn(len(z), generator=generator, dtype=r.dtype, device=x.device))
        x_t, u = renoise(x_fake.detach(), t, generator)
        v_fake = fake(x_t, t, t, cond_k)
        with torch.no_grad():
            D_N = v_fake - original(x_t, t, t, cond_k)
            scale = self.alpha * length(D) / (length(D_N) + 1e-6)
        return terms(
            prediction=moved(F, expand(w, F) * D),
            correction=moved(x_fake, -scale * D_N),
            fake=squared_error(v_fake, u).mean(),
        )


def both_parts(n, share):
    """The rows that are predicted, and those that are corrected, at least one each: a row alone is both."""
    first = min(max(1, round(share * n)), max(1, n - 1))
    return slice(0, first), slice(min(first, n - 1), n)


def along_target(net, original, z, one, r, cond=None):
    """D = v_G - v at x_r: how the jump's end moves with r, less how the frozen velocity would have it move."""
    F, dF = derivative(net, z, one, r, cond, dr=torch.ones_like(r))
    with torch.no_grad():
        return F - expand(one - r, z) * dF - original(jump(z, F, one, r), r, r, cond)


def length(D):
    """Mean over the rows of their norms."""
    return D.flatten(1).norm(dim=1).mean()
