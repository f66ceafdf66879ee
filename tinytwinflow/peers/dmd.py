"""Distribution matching distillation (DMD, arXiv 2311.18828): VSD's gradient, evened out over t, and a regression."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import normal, uniform
from ..method.path import denoise, expand
from ..method.samplers import sample
from ..method.twin import generate
from .common import fake_score, moved, renoise, terms, twin_of


@torch.no_grad()
def matching(x_fake, x_t, t, original, fake, cond):
    """(x^_fake - x^_real) / mean |x_fake - x^_real|, the direction in which the fakes are wrong (Eqs. 7, 8 there)."""
    real = denoise(x_t, original(x_t, t, t, cond), t)
    gradient = denoise(x_t, fake(x_t, t, t, cond), t) - real
    return gradient / expand((x_fake - real).abs().flatten(1).mean(1) + 1e-6, x_t)


@dataclass
class DMD:
    """That gradient for the generator, and regression onto noise-sample pairs of the frozen network (Eq. 9 there).

    regression: its weight; a squared error stands in for LPIPS. pairs: how many (z, x) are made, with `steps` Euler
    steps, when distillation begins; with labels they are made as they are needed. share: pairs per row of the batch.
    own_fakes: the network's own negative times learn the fakes' velocity, in place of another network.
    """

    regression: float = 0.25
    pairs: int = 16384
    steps: int = 64
    share: float = 0.25
    own_fakes: bool = False
    kept: tuple | None = field(default=None, init=False, repr=False)
    mode: ClassVar = None

    @property
    def helpers(self):
        return {"original": "frozen"} | ({} if self.own_fakes else {"fake": "trained"})

    def some_pairs(self, x, cond, original, generator):
        """Rows of the pairs. They follow from the frozen network alone, so a resumed run makes the same again."""
        if cond is not None:
            z = normal(x, generator)
            return z, sample(original, z, self.steps, "multi", cond=cond)
        if self.kept is None or self.kept[0] is not original:
            own = torch.Generator(x.device).manual_seed(0)
            z = torch.randn(self.pairs, *x.shape[1:], generator=own, dtype=x.dtype, device=x.device)
            self.kept = original, z, torch.cat([sample(original, some, self.steps, "multi") for some in z.split(4096)])
        rows = (uniform(x, generator) * self.pairs).long()
        return tuple(known[rows] for known in self.kept[1:])

    def __call__(self, net, x, original, fake=None, cond=None, generator=None, **_):
        fake = twin_of(net) if self.own_fakes else fake
        x_fake, t = generate(net, normal(x, generator), cond), uniform(x, generator, 0.02, 0.98)
        x_t, u = renoise(x_fake.detach(), t, generator)
        part = slice(0, max(1, round(self.share * len(x))))
        z, target = self.some_pairs(x[part], take(cond, part), original, generator)
        return terms(
            generator=moved(x_fake, matching(x_fake, x_t, t, original, fake, cond)),
            regression=self.regression * squared_error(generate(net, z, take(cond, part)), target).mean(),
            fake=fake_score(fake, x_t, t, u, cond),
        )
