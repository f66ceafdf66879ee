"""DMD2 (arXiv 2405.14867): DMD without pairs; the fakes have a faster network, and a critic sees data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from ..method.draws import coin, normal, uniform
from ..method.twin import generate
from .common import fake_score, fixed, moved, renoise, terms
from .dmd import matching


@dataclass
class DMD2:
    """DMD's gradient, and an adversarial loss on noised samples.

    every: the generator moves in one of so many steps, drawn at random; the paper's two time scales. gan,
    critic_weight: weights of the generator's and of the critic's adversarial terms. A critic is a
    network of the same kind, each element of whose output is a logit for "real"; the paper's is a head on
    the fakes' network, which a velocity field gives no access to.
    """

    every: int = 2
    gan: float = 0.1
    critic_weight: float = 1.0
    helpers: ClassVar = {"original": "frozen", "fake": "trained", "critic": "critic"}
    mode: ClassVar = None

    def __call__(self, net, x, original, fake, critic, cond=None, generator=None, turns=None, **_):
        z, t = normal(x, generator), uniform(x, generator, 0.02, 0.98)
        on = coin(turns or generator) * self.every < 1
        with torch.set_grad_enabled(on):
            x_fake = generate(net, z, cond)
        x_t, u = renoise(x_fake.detach(), t, generator)
        x_real, _ = renoise(x, t, generator)
        real, made = critic(x_real, t, t, cond), critic(x_t, t, t, cond)
        own = {"fake": fake_score(fake, x_t, t, u, cond)}
        own["critic"] = self.critic_weight * (softplus(-real).mean() + softplus(made).mean())
        if not on:
            zero = torch.zeros((), device=x.device)
            return terms(generator=zero, adversarial=zero, **own)
        seen, _ = renoise(x_fake, t, generator)
        adversarial = self.gan * softplus(-fixed(critic)(seen, t, t, cond)).mean()
        generator_loss = moved(x_fake, matching(x_fake, x_t, t, original, fake, cond))
        return terms(generator=generator_loss, adversarial=adversarial, **own)
