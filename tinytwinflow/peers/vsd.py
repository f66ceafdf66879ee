"""Variational score distillation (VSD, arXiv 2305.16213), for a one-step generator (there also called Diff-Instruct).

A frozen network knows the data's velocity v, an auxiliary one learns that of the fakes; at a noised fake their
difference is the gradient of KL(p_fake || p_real).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method.draws import normal, uniform
from ..method.path import expand
from ..method.twin import generate
from .common import fake_score, moved, renoise, terms


@dataclass
class VSD:
    """Gradient in the fakes: w(t) (1 - t) (s_fake - s_real), w(t) = t^2 (Eq. 9 there), so t (1 - t)^2 (v - v_fake)."""

    helpers: ClassVar = {"original": "frozen", "fake": "trained"}
    mode: ClassVar = None

    def __call__(self, net, x, original, fake, cond=None, generator=None, **_):
        x_fake, t = generate(net, normal(x, generator), cond), uniform(x, generator, 0.02, 0.98)
        x_t, u = renoise(x_fake.detach(), t, generator)
        with torch.no_grad():
            dv = original(x_t, t, t, cond) - fake(x_t, t, t, cond)
        gradient = expand(t * (1 - t) ** 2, x) * dv
        return terms(generator=moved(x_fake, gradient), fake=fake_score(fake, x_t, t, u, cond))
