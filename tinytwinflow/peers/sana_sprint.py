"""SANA-Sprint's recipe (arXiv 2503.09641): continuous-time consistency distillation, and a latent adversarial loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import relu

from ..method.conditions import join
from ..method.distances import squared_error
from ..method.draws import normal, uniform
from ..method.path import denoise, interpolate
from .common import fixed, renoise, terms
from .scm import bounded, tangent


@dataclass
class SanaSprint:
    """sCM with the frozen network's velocity, and a hinge loss on noised x^ = x_t - t F(x_t, t, 0).

    gan: weight of the generator's adversarial term. at_noise: share of its rows at t = 1. derivative,
    warm_up: see SCM. The paper's critic reads features of the frozen network; see DMD2 for the one here.
    """

    gan: float = 0.1
    at_noise: float = 0.5
    derivative: str = "jvp"
    warm_up: float = 0.25
    helpers: ClassVar = {"original": "frozen", "critic": "critic"}
    mode: ClassVar = "few"

    def __call__(self, net, x, original, critic, cond=None, generator=None, progress=1.0, **_):
        t, t_gan = uniform(x, generator), uniform(x, generator)
        t_gan = torch.where(uniform(x, generator) < self.at_noise, 1.0, t_gan)
        x_t = interpolate(x, normal(x, generator), t)
        with torch.no_grad():
            u = original(x_t, t, t, cond)
        F_sg, g = tangent(net, x_t, t, u, cond, min(1.0, progress / self.warm_up), self.derivative)
        x_gan = interpolate(x, normal(x, generator), t_gan)
        both = torch.cat([t, t_gan])
        F, F_gan = net(torch.cat([x_t, x_gan]), both, torch.zeros_like(both), join(cond, cond)).chunk(2)
        made, s = denoise(x_gan, F_gan, t_gan), uniform(x, generator, 0.02, 0.98)
        seen, x_real = renoise(made, s, generator)[0], renoise(x, s, generator)[0]
        judged = critic(torch.cat([x_real, seen.detach()]), s.repeat(2), s.repeat(2), join(cond, cond))
        real, fake = judged.chunk(2)
        return terms(
            consistency=squared_error(F, F_sg + bounded(g)).mean(),
            adversarial=-self.gan * fixed(critic)(seen, s, s, cond).mean(),
            critic=relu(1 - real).mean() + relu(1 + fake).mean(),
        )
