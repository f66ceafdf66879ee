"""Score identity distillation (SiD, arXiv 2404.04057): the Fisher divergence of fakes and data, by a score identity."""

from dataclasses import dataclass
from typing import ClassVar

from ..method.draws import normal, uniform
from ..method.path import denoise, expand
from ..method.twin import generate
from .common import fake_score, fixed, renoise, terms


@dataclass
class SiD:
    """w [(x^_real - x^_fake) (x^_real - x_fake) - alpha |x^_real - x^_fake|^2], with gradient through both networks
    into the noised fake; w = 1 / mean |x_fake - x^_real|, without gradient.
    """

    alpha: float = 1.0
    helpers: ClassVar = {"original": "frozen", "fake": "trained"}
    mode: ClassVar = None

    def __call__(self, net, x, original, fake, cond=None, generator=None, **_):
        x_fake, t = generate(net, normal(x, generator), cond), uniform(x, generator, 0.02, 0.98)
        x_t, u = renoise(x_fake, t, generator)
        of_data = denoise(x_t, fixed(original)(x_t, t, t, cond), t)
        of_fakes = denoise(x_t, fixed(fake)(x_t, t, t, cond), t)
        w = 1 / ((x_fake - of_data).detach().abs().flatten(1).mean(1) + 1e-6)
        difference = of_data - of_fakes
        loss = expand(w, x) * difference * (of_data - x_fake - self.alpha * difference)
        return terms(generator=loss.mean(), fake=fake_score(fake, x_t.detach(), t, u.detach(), cond))
