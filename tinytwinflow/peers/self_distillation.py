"""Adversarial self-distillation (ASD, arXiv 2511.01419): n-step samples past a critic that knows (n + 1)-step ones.

A method for causal video; this is its form for images and points. Both samples are the network's own, so the critic
has little to tell apart, and what it says is a hint, not a target; DMD beside it holds them to the data.

                    paper                                  here
the critic          heads on the fakes' network, one an n  a network of its own, told n as its second time
renoised            each sample to a time of its own       the same time
R1, R2              as the GAN it builds on                by differences, as the code it builds on
gradient            not said of (n + 1)-step samples       none; of n steps the last has one
guidance, causality yes                                    none
There is no public code of it. Train it in float32: in bfloat16 the critic's slope, of a small difference, is rounding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from ..method.draws import coin, normal, uniform
from ..method.samplers import sample
from ..method.twin import same_time
from ..ranges import as_field
from .common import Checked, clean, fake_score, fixed, moved, renoise, terms
from .dmd import matching


def few_steps(net, z, n, cond=None, generator=None):
    """A sample of n steps, to data and noised again, the last of them with gradient."""
    x, t = z, same_time(1, z)
    for left in range(n - 1, 0, -1):
        with torch.no_grad():
            x = clean(net, x, t, cond)
        t = same_time(left / n, z)
        x, _ = renoise(x, t, generator)
    return clean(net, x, t, cond)


@dataclass
class SelfDistillation(Checked):
    """DMD's gradient for samples of n steps, n drawn from 1 to `most`, and a relativistic loss past the critic D_n.

    The generator has softplus(-[D_n(x_n) - D_n(x_n+1)]), the critic the same with both exchanged, both noised to one
    time, and a penalty on its slope.
    """

    most: int = as_field(3, "the largest n", "[1, inf)")
    gan: float = as_field(0.1, "weight of the generator's term past the critic", "[0, inf)")
    critic_weight: float = as_field(1.0, "weight of the critic's own", "[0, inf)")
    penalty: float = as_field(0.1, "weight of the square of the critic's slope at both samples", "[0, inf)")
    helpers: ClassVar = {"original": "frozen", "fake": "trained", "critic": "critic"}
    mode: ClassVar = "few"

    def __call__(self, net, x, original, fake, critic, cond=None, generator=None, turns=None, **_):
        n, t = 1 + int(coin(turns or generator) * self.most), uniform(x, generator, 0.02, 0.98)
        made = few_steps(net, normal(x, generator), n, cond, generator)
        better = sample(net, normal(x, generator), n + 1, "few", cond=cond, generator=generator)
        which = t * n / (self.most + 1)
        x_t, u = renoise(made.detach(), t, generator)
        seen, seen_better = renoise(made, t, generator)[0], renoise(better, t, generator)[0]
        D, D_better = (critic(some, t, which, cond) for some in (seen.detach(), seen_better))
        adversarial = fixed(critic)(seen, t, which, cond) - D_better.detach()
        both = ((seen.detach(), D), (seen_better, D_better))
        slopes = sum(slope(critic, some, logits, t, which, cond, generator) for some, logits in both)
        return terms(
            generator=moved(made, matching(made, x_t, t, original, fake, cond)),
            adversarial=self.gan * softplus(-adversarial).mean(),
            fake=fake_score(fake, x_t, t, u, cond),
            critic=self.critic_weight * (softplus(D - D_better).mean() + self.penalty / 2 * slopes),
        )


def slope(critic, x, logits, t, r, cond=None, generator=None, step=0.01):
    """Mean square of the slope of a critic, whose logits at x are these, in a random direction, by a difference."""
    near = critic(x + step * normal(x, generator), t, r, cond)
    return ((near - logits) / step).square().mean()
