"""What several peers share: time grids, terms of a loss, fakes, weights held fixed, derivatives along a path."""

from collections import namedtuple
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..method.conditions import take
from ..method.distances import squared_error
from ..method.draws import mean, normal, shuffled, split, uniform
from ..method.path import denoise, expand, interpolate, velocity
from ..ranges import plain, settings_of


def grid_neighbours(u, intervals):
    """Points n / intervals and (n - 1) / intervals of even time grids, n uniform in 1..intervals for u in [0, 1)."""
    n = (u * intervals).floor() + 1
    return n / intervals, (n - 1) / intervals


@cache
def _named(*names):
    return namedtuple("Terms", names)


def terms(**parts):
    """The terms of a loss and their sum: a named tuple (total, ...) of scalars, each with its graph."""
    return _named("total", *parts)(sum(parts.values()), *parts.values())


class Checked:
    """A loss whose settings are fields made by `as_field`. Raises ValueError for one out of its range."""

    def __post_init__(self):
        for name, setting in settings_of(type(self)).items():
            setting.check(name, plain(getattr(self, name)))


class Lines(NamedTuple):
    """Points of the lines between data and noise, a row each, of which the first n are flow rows: r = t there."""

    x: torch.Tensor
    cond: object
    x_t: torch.Tensor
    u: torch.Tensor
    t: torch.Tensor
    r: torch.Tensor
    n: int
    shares: tuple
    divisors: tuple

    def jumps(self):
        """x_t, u, t, r and cond of the rows with t > r; None where there are none."""
        rows = slice(self.n, None)
        return None if self.n == len(self.x) else (*(a[rows] for a in self[2:6]), take(self.cond, rows))

    def means(self, d):
        """The mean of d (B,) over the flow rows and that over the others, each times its share of the batch."""
        parts = zip(self.shares, (d[: self.n], d[self.n :]), self.divisors)
        return [share * mean(part, divisor) for share, part, divisor in parts]


def lines(x, cond, flow_share, generator=None, turns=None):
    """A batch in random order on its lines to noise, t and r the larger and the smaller of two uniform times.

    flow_share: share of the rows with r = t, as many at each step; turns: for batches of one row, see `draws.split`.
    """
    shares = flow_share, 1 - flow_share
    (n, _), divisors = split(len(x), shares, turns or generator)
    x, cond = shuffled(x, cond, generator)
    z = normal(x, generator)
    r, t = torch.stack([uniform(x, generator), uniform(x, generator)]).sort(0)[0]
    r = torch.cat([t[:n], r[n:]])
    return Lines(x, cond, interpolate(x, z, t), velocity(x, z), t, r, n, shares, divisors)


def weighed(d, power, floor=1e-3):
    """Errors (B,), each divided by its own sg(d + floor)^power: 0 leaves them, 1/2 and 1 bound what one row can do."""
    return d / (d.detach() + floor) ** power


def clean(net, x_t, t, cond=None):
    """Consistency function f(x_t, t) = x_t - t F(x_t, t, 0), the jump to data; f(x, 0) = x by construction."""
    return denoise(x_t, net(x_t, t, torch.zeros_like(t), cond), t)


def renoise(x, t, generator=None):
    """Samples carried to times t with fresh noise.  (B, *D), (B,) -> x_t and u = z - x."""
    z = normal(x, generator)
    return interpolate(x, z, t), velocity(x, z)


class _Fixed(torch.autograd.Function):
    """A call of a network with a graph of its own, of which the backward pass asks for the input's gradient alone.

    The weights stay what they are, so blocks that are computed again in the backward pass do again what they did.
    """

    @staticmethod
    def forward(ctx, net, x, *rest):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = net(ctx.x, *rest)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, gradient):
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # whether the caller said retain_graph
        (gradient,) = torch.autograd.grad(ctx.y, ctx.x, gradient, retain_graph=again)
        return None, gradient, *[None] * (len(ctx.needs_input_grad) - 2)


def fixed(net):
    """The same function with its weights held fixed: gradient passes to its input x, none to its weights."""
    return partial(_Fixed.apply, net) if isinstance(net, nn.Module) else net


def twin_of(net):
    """The fakes' velocity field that a network holds at negative times, asked at positive ones."""
    return lambda x, t, r, cond=None: net(x, -t, -r, cond)


def fake_score(fake, x_t, t, u, cond=None):
    """Flow matching of the auxiliary network on fakes, which makes it the fakes' velocity field."""
    return squared_error(fake(x_t, t, t, cond), u).mean()


def moved(x, gradient):
    """A loss whose gradient in x is `gradient`, up to the mean over all elements: half of |x - sg(x - gradient)|^2."""
    return 0.5 * squared_error(x, (x - gradient).detach()).mean()


def derivative(net, x_t, t, r, cond=None, dx=None, dt=None, dr=None):
    """F and its derivative in the direction (dx, dt, dr), in forward mode, without gradient.

    x_t, dx (B, *D), t, r, dt, dr (B,).  -> two (B, *D). Attention's fused kernels have no forward mode, so the plain
    one runs.
    """
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        pairs = zip((x_t, t, r), (dx, dt, dr))
        moving = [a if da is None else forward_ad.make_dual(a, da) for a, da in pairs]
        F, dF = forward_ad.unpack_dual(net(*moving, cond))
    return F, torch.zeros_like(F) if dF is None else dF


def along(net, x_t, t, r, u, cond=None):
    """F and its derivative along the path, dF/dt = u dF/dx + dF/dt, see `derivative`."""
    return derivative(net, x_t, t, r, cond, dx=u, dt=torch.ones_like(t))


@torch.no_grad()
def along_differences(net, x_t, t, r, u, cond=None, step=0.005):
    """The derivative of `along` by differences: F at t + step and t - step, times kept in [r, 1]; error O(step^2)."""
    ahead, behind = (t + step).clamp(max=1.0), torch.maximum(t - step, r)
    F = [net(x_t + expand(s - t, x_t) * u, s, r, cond) for s in (ahead, behind)]
    return (F[0] - F[1]) / expand(ahead - behind, x_t)
