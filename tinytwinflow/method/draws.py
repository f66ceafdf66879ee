"""Everything random: seeded streams, how a batch is divided among the parts of the loss, and what is drawn for it."""

from dataclasses import dataclass

import numpy as np
import torch

from .conditions import take


def seeded(*key):
    """A random generator whose stream depends on every number of the key."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def coin(turns=None):
    """A number in [0, 1) that decides what is computed. -> float; turns: a generator, best on the CPU: see `split`."""
    return torch.rand((), generator=turns, device="cpu" if turns is None else turns.device).item()


def turns_of(seed, step):
    """What draws the turns of a step, on the CPU; the same on all processes."""
    return seeded(seed, 5, step)


def split(n, shares, turns=None):
    """How many of n rows each part has, and the number that divides the sum over them.  -> two tuples, a number a part

    The counts are n * share, rounded, and at least one wherever there is a share: the same at every step, so that
    compiled code meets the same shapes, and each part is a mean over its own rows. Where there are fewer rows than
    parts these take turns: the counts, n * share rounded up or down, are drawn so that they are n * share in
    expectation, and that is the divisor. turns: the generator; of one on the CPU nobody waits for an accelerator.
    """
    due, live = [n * share for share in shares], [i for i, share in enumerate(shares) if share]
    if n < len(live):
        ends = [round(sum(due[: i + 1]), 6) for i in range(len(due))]
        offset = coin(turns)
        ends = [0, *(int(end + offset) for end in ends)]
        return tuple(b - a for a, b in zip(ends[:-1], ends[1:])), tuple(due)
    counts = [max(1, int(rows + 1e-6)) if rows else 0 for rows in due]
    while (left := n - sum(counts)) > 0:
        counts[max(live, key=lambda i: due[i] - counts[i])] += 1
    for _ in range(-left):
        counts[max((i for i in live if counts[i] > 1), key=lambda i: counts[i] - due[i])] -= 1
    return tuple(counts), tuple(counts)


def uniform(x, generator=None, low=0.0, high=1.0):
    """A number for each row of x, in float32 at least: bfloat16 cannot tell 0.99 from 0.992.  -> (B,)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return low + (high - low) * torch.rand(len(x), generator=generator, dtype=exact, device=x.device)


def normal(x, generator=None):
    """Noise in the shape of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def shuffled(x, cond=None, generator=None):
    """A batch and its condition in random order: what a row is for shall not follow from its place."""
    rows = torch.randperm(len(x), generator=generator, device=x.device)
    return x[rows], take(cond, rows)


def mean(values, divisor):
    """Sum over the rows of a part, divided by its divisor, see `split`; 0 for a part of share 0."""
    return values.sum() / divisor if divisor else values.sum()


@dataclass
class Draws:
    """All that is random in one loss, a row a sample, the rows ordered part after part."""

    counts: tuple  # rows in each part: any-step, flow, adversarial, rectify
    divisors: tuple  # of the sums over them, see `split`
    rows: torch.Tensor  # (B,) which sample of the batch each row takes
    z: torch.Tensor  # (B, *D) base: noise of the path; twin parts: noise the fake is made of
    z_new: torch.Tensor  # (B, *D) twin parts: noise the fake is noised with; data-free base: noise of x
    t: torch.Tensor  # (B,) t, or t' in the twin parts
    r: torch.Tensor  # (B,) target time; t in the flow part
    inner: list  # N - 1 tensors, the times t_1 > ... > t_{N-1} of the any-step rows

    def slices(self):
        ends = [sum(self.counts[:i]) for i in range(5)]
        return [slice(a, b) for a, b in zip(ends[:-1], ends[1:])]


def draw_for(loss, x, generator=None, turns=None):
    """Draw everything random for a `TwinFlowLoss` and a batch like x.  (B, *D) -> Draws.

    turns: draws the parts that a batch of few rows has, see `split`, by default the same generator. It is in the same
    state on all processes of a sharded network, for they must make the same calls.
    """

    def rand(rows):
        return uniform(x[rows], generator)

    B = len(x)
    counts, divisors = split(B, loss.shares(), turns or generator)
    any_step, twin = slice(0, counts[0]), slice(counts[0] + counts[1], B)
    a, b = loss.times
    t = (1 - rand(slice(B)) ** (1 / b)) ** (1 / a)
    t[twin] = rand(twin)
    one_step = rand(any_step) < loss.one_step_share
    t[any_step] = torch.where(one_step, 1.0, loss.dt + (1 - loss.dt) * t[any_step])
    r = t.clone()
    r[any_step] = torch.where(one_step, 0.0, rand(any_step) * (t[any_step] - loss.dt))
    inner, t_i = [], t[any_step] - loss.dt
    for i in range(1, loss.order):
        step = 1 / (loss.order - i + 1) if loss.even_inner else rand(any_step)
        t_i = t_i - step * (t_i - r[any_step])
        inner.append(t_i)
    rows = torch.randperm(B, generator=generator, device=x.device)
    return Draws(counts, divisors, rows, normal(x, generator), normal(x, generator), t, r, inner)
