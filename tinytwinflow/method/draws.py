"""How a batch is divided among the parts of the loss, and everything random in it."""

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
