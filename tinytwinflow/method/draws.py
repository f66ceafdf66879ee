"""Everything random: seeded streams, how a batch is divided among the parts of the loss, and what is drawn for it."""

from dataclasses import dataclass

import numpy as np
import torch


def seeded(*key):
    """A random generator whose stream depends on every number of the key."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def split(n, shares, generator=None, device="cpu"):
    """Whole numbers of rows, one for each share, that sum to n and are n * share in expectation.

    Each end of a part is rounded down after adding the same uniform number, so a part has n * share
    rows to within one; drawn only if some n * share is not whole.
    """
    ends = [round(n * sum(shares[: i + 1]), 6) for i in range(len(shares))]
    offset = 0.0
    if any(end != int(end) for end in ends):
        exact = torch.float32 if torch.device(device).type == "mps" else torch.float64
        offset = torch.rand((), generator=generator, device=device, dtype=exact).item()
    ends = [0, *(int(end + offset) for end in ends)]
    return tuple(b - a for a, b in zip(ends[:-1], ends[1:]))


def uniform(x, generator=None, low=0.0, high=1.0):
    """A number for each row of x, in float32 at least: bfloat16 cannot tell 0.99 from 0.992.  -> (B,)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return low + (high - low) * torch.rand(len(x), generator=generator, dtype=exact, device=x.device)


def normal(x, generator=None):
    """Noise in the shape of x."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def mean(values, expected):
    """Sum over the rows of a part, divided by the number of rows expected in it; 0 for a part of share 0."""
    return values.sum() / expected if expected else values.sum()


@dataclass
class Draws:
    """All that is random in one loss, a row a sample, the rows ordered part after part."""

    counts: tuple  # rows in each part: any-step, flow, adversarial, rectify
    rows: torch.Tensor  # (B,) which sample of the batch each row takes
    z: torch.Tensor  # (B, *D) base: noise of the path; twin parts: noise the fake is made of
    z_new: torch.Tensor  # (B, *D) twin parts: noise the fake is noised with; data-free base: noise of x
    t: torch.Tensor  # (B,) t, or t' in the twin parts
    r: torch.Tensor  # (B,) target time; t in the flow part
    inner: list  # N - 1 tensors, the times t_1 > ... > t_{N-1} of the any-step rows
    together: bool = False  # whether other processes draw the same counts and wait for the same calls

    def slices(self):
        ends = [sum(self.counts[:i]) for i in range(5)]
        return [slice(a, b) for a, b in zip(ends[:-1], ends[1:])]


def draw_for(loss, x, generator=None, together=None):
    """Draw everything random for a `TwinFlowLoss` and a batch like x.  (B, *D) -> Draws.

    together: a generator that is in the same state on all processes of a sharded network, for they must make the same
    calls: it draws how many rows each part has.
    """

    def rand(rows):
        return uniform(x[rows], generator)

    B = len(x)
    counts = split(B, loss.shares(), generator if together is None else together, x.device)
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
    return Draws(counts, rows, normal(x, generator), normal(x, generator), t, r, inner, together is not None)


def guided_rows(t, between, together):
    """The rows that guidance acts on, those with t in an interval.  (n,) -> their numbers (m,), their weights (m,).

    together: one row of weight 0 where there is none, for other processes make a call there.
    """
    acts = (t >= between[0]) & (t <= between[1])
    on = acts.nonzero()[:, 0]
    if together and not len(on):
        on = torch.arange(min(1, len(t)), device=t.device)
    return on, acts[on]
