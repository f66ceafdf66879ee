"""Drifting (arXiv 2602.04770): a one-step generator drawn onto its own samples plus a force, towards data, off fakes.

                    paper and code, images            code, 2D                here
temperatures        0.02, 0.05, 0.2 of the mean       0.05, absolute          as for images, in both
                    distance, each force normalised
small weights       code: at least 1e-3, paper: none  none                    none: in 2D they would be all there is
compared in         many layers of a masked           the points              the points; images in the features of a
                    autoencoder                                               small classifier, see `helpers` in `peers`
labels              a batch a class, guidance         none                    rows meet those of their own label
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.draws import normal
from ..method.twin import generate
from .common import terms

APART = -1e9  # the logit of a pair that does not meet


def force(x, y, temperature, apart):
    """The force V on fakes: what data y draw them by, less what other fakes do (Algorithm 2 there).

    x (G, D), y (P, D); apart (G, G + P), pairs with a fake and with data that do not meet. A pair's weight is the
    geometric mean of its softmax over the row and over the column, of logits -distance / temperature, and each side
    is multiplied by the other's mass: V is zero where fakes and data are distributed alike.  -> (G, D)
    """
    logits = (-torch.cdist(x, torch.cat([x, y])) / temperature).masked_fill(apart, APART)
    A = (0.5 * (logits.log_softmax(1) + logits.log_softmax(0))).exp()
    fakes, data = A.split([len(x), len(y)], dim=1)
    return fakes.sum(1, keepdim=True) * (data @ y) - data.sum(1, keepdim=True) * (fakes @ x)


@torch.no_grad()
def drift(x, y, temperatures, same=None):
    """The sum over temperatures of forces of unit root-mean-square, and the length of a unit.  -> (G, D), scalar

    x (G, D), y (P, D). same: (G, G + P), pairs of one label, or None. In units of the mean distance / sqrt(D).
    """
    apart = torch.zeros(len(x), len(x) + len(y), dtype=torch.bool, device=x.device) if same is None else ~same
    met = ~apart
    mean_distance = (torch.cdist(x, torch.cat([x, y])) * met).sum() / met.sum()
    unit = mean_distance / x.shape[1] ** 0.5
    apart = apart | torch.eye(len(x), len(x) + len(y), dtype=torch.bool, device=x.device)
    x, y = (a - y.mean(0) for a in (x, y))  # a force does not depend on it, its rounding does
    forces = [force(x / unit, y / unit, R * x.shape[1] ** 0.5, apart) for R in temperatures]
    return sum(V / (V.square().mean() + 1e-8).sqrt() for V in forces), unit


@dataclass
class Drifting:
    """| f / s - sg(f / s + V) |^2, f the features of x_fake = z - F(z, 1, 0), or x_fake, and s the length of a unit.

    The value says nothing of how far training is: every force has unit size. temperatures: of the kernel, in mean
    distances. With labels fakes meet data and fakes of their own label, so one that a batch has once has no force:
    take batches of several rows a label. Raises ValueError for other conditions, and for a batch of one row.
    """

    temperatures: tuple = (0.02, 0.05, 0.2)
    helpers: ClassVar = {"features": "features"}
    mode: ClassVar = None

    def __post_init__(self):
        if not self.temperatures or not all(isinstance(R, int | float) and R > 0 for R in self.temperatures):
            raise ValueError(f"temperatures must be numbers > 0, got {self.temperatures!r}")

    def __call__(self, net, x, features=None, cond=None, generator=None, **_):
        if len(x) < 2:
            raise ValueError("drifting compares samples with one another: it needs batches of 2 rows or more")
        same = None
        if cond is not None:
            if not torch.is_tensor(cond) or cond.ndim != 1:
                raise ValueError("drifting compares samples of one label: cond is None or (B,) labels")
            same = cond[:, None] == torch.cat([cond, cond])
        x_fake = generate(net, normal(x, generator), cond)
        f, y = (a.flatten(1) if features is None else features.features(a) for a in (x_fake, x))
        exact = torch.promote_types(f.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # what is subtracted is nearly equal
            V, unit = drift(*(a.to(exact) for a in (f, y)), self.temperatures, same)
        return terms(drift=((f - f.detach()) / unit - V).square().mean())
