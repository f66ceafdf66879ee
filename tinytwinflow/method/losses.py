"""TwinFlowLoss: base + self-adversarial + rectification (Eq. 10), each at the least cost we know.

Every row of the batch carries one part of the loss, and one forward with gradient serves them all:

    part          network input             is drawn onto                                   equation
    any-step      F(x_t, t, r)              a small true step, then the teacher's jumps     1
    flow          F(x_t, t, t)              u = z - x                                       1, N = 0
    adversarial   F(x_t', -t', -t')         z' - x_fake, the fakes made without gradient    2
    rectify       F(z, 1, 0)                itself + dv, the gap at its own noised fake     9

`reference.py` computes the same numbers with one forward per symbol; the tests hold the two together.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .conditions import join, repeat, take
from .draws import Draws, mean, normal, split, uniform
from .path import expand, interpolate, jump, same_shape, velocity
from .twin import gap, generate


def squared_error(a, b):
    """Mean over a sample's elements of (a - b)^2, the default metric.  (B, *D), (B, *D) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def normalised_error(a, b, c=1e-3):
    """The released code's metric: d / sqrt(d + c^2), d the squared metric, without gradient through the root.

    Its gradient has the length of a root-mean-square error's, so a step does not vanish with the error.
    """
    d = squared_error(a, b)
    return d / (d.detach() + c**2).sqrt()


DISTANCES = {"squared": squared_error, "normalised": normalised_error}


class Losses(NamedTuple):
    """What a loss returns: scalars, of which only `total` carries a gradient. total = base +
    adversarial + rectify (weights included); gap is the mean of dv^2 at the noised fakes."""

    total: torch.Tensor
    base: torch.Tensor
    adversarial: torch.Tensor
    rectify: torch.Tensor
    gap: torch.Tensor


@dataclass
class TwinFlowLoss:
    """The TwinFlow loss.  loss(net, x, cond, teacher) -> Losses.

    Defaults are the paper's but for flow_share. The toy recipe departs further; README says why.

    order          N of Eq. 1: teacher jumps after the small step; 0 is flow matching alone
    share          the paper's lambda: share of the batch in the two twin parts, half each
    flow_share     share of the base rows with r = t. In the paper they are only those with t - r < dt,
                   1 in 20; but the gap is read from the velocity, so it must be good. All other base
                   rows have t - r >= dt here. Released code: 1/3 within 5 % of r = t
    one_step_share share of the any-step rows put at t = 1, r = 0, the jump that one-step sampling makes;
                   0 in the paper, 1/2 in the released code
    dt             length of the small true step
    times          (a, b) > 0 of the Kumaraswamy law of t in the base rows; (1, 1) is uniform
    even_inner     teacher's times evenly spaced (released code), not t_i ~ U(r, t_{i-1}) (paper)
    metric         "squared" (mean over elements) or "normalised" (released code), see `distance`
    adversarial_weight, rectify_weight   1 in the paper; released code: rectify_weight 0.5
    rectify_clip   clips dv elementwise; None in the paper, 1 in the released code
    gain           bounds (t - r) / dt, the weight that the error of F gets in the regression form of
                   Eq. 1; no bound in the paper. With one, long jumps need no clip and escape its bias
                   (a clip draws the mean of what is clipped, u's noise, towards its median)
    clip           clips the any-step correction elementwise
    guidance       w: u becomes u + w (v(x_t, t, c) - v(x_t, t, null)) in the base rows; read from the network's
                   own average, whose v is guided already, it comes to rest at the weight w / (1 - w)
    guidance_range times t where guidance acts
    data_free      never read x, only its shape: see `_base_pairs`

    Each part is a sum over its rows divided by the rows expected in it, share * B. Where that is not whole the numbers
    of rows are drawn at random around it, so the expected gradient is the same for every batch size, 1 included.
    """

    order: int = 2
    share: float = 1 / 3
    flow_share: float = 0.5
    one_step_share: float = 0.0
    dt: float = 0.01
    times: tuple = (1.0, 1.0)
    even_inner: bool = False
    metric: str = "squared"
    adversarial_weight: float = 1.0
    rectify_weight: float = 1.0
    rectify_clip: float | None = None
    gain: float = math.inf
    clip: float = 1.0
    guidance: float = 0.0
    guidance_range: tuple = (0.0, 1.0)
    data_free: bool = False

    def __post_init__(self):
        def need(ok, what):
            if not ok:
                raise ValueError(what)

        need(isinstance(self.order, int) and self.order >= 0, f"order must be a whole number >= 0, got {self.order!r}")
        for name in ("share", "flow_share", "one_step_share"):
            need(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        need(0 < self.dt < 1, f"dt must lie in (0, 1), got {self.dt!r}")
        for name in ("times", "guidance_range"):
            pair = getattr(self, name)
            two = isinstance(pair, tuple | list) and [isinstance(a, int | float) for a in pair] == [True, True]
            need(two, f"{name} must be two numbers, got {pair!r}")
        need(min(self.times) > 0, f"times must be two positive numbers, got {self.times!r}")
        need(self.metric in DISTANCES, f"unknown metric {self.metric!r}: choose from {', '.join(DISTANCES)}")
        for name in ("adversarial_weight", "rectify_weight", "guidance"):
            need(0 <= getattr(self, name) < math.inf, f"{name} must be a number >= 0, got {getattr(self, name)!r}")
        for name in ("gain", "clip", "rectify_clip"):
            value = getattr(self, name)
            need(value is None and name == "rectify_clip" or value > 0, f"{name} must be > 0, got {value!r}")
        low, high = self.guidance_range
        need(0 <= low <= high <= 1, f"guidance_range must be two times 0 <= low <= high <= 1, got {low}, {high}")

    def shares(self):
        """Expected share of the batch in each part: any-step, flow, adversarial, rectify."""
        flow = 1.0 if self.order == 0 else self.flow_share
        return ((1 - self.share) * (1 - flow), (1 - self.share) * flow, self.share / 2, self.share / 2)

    def __call__(self, net, x, cond=None, teacher=None, null=None, original=None, generator=None, together=None):
        """Draw the random numbers and compute the loss of a batch.

        net, teacher, original: velocity fields net(x, t, r, cond). teacher is F^-, used without gradient (default: net
        itself; in practice its EMA). original gives the velocities of guidance and of data-free training (default:
        teacher). x (B, *D). cond: None, tensor or dict, leading dimension B; null: the same for "no condition",
        leading dimension 1 or B, needed for guidance. generator: on the device of x. together: a generator that is in
        the same state on all processes of a sharded network, for they must make the same calls: it draws how many rows
        each part has. Returns Losses. Raises ValueError if x is not a floating-point batch, cond or null has another
        length, null is missing, or an answer of net, teacher or original has another shape than x.
        """
        if not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
            raise ValueError(f"x must be a floating-point batch (B, *D), got {x.dtype} of shape {tuple(x.shape)}")
        if self.guidance and (cond is None or null is None):
            raise ValueError("guidance > 0 needs cond and null, the condition that stands for none")
        for name, value in cond.items() if isinstance(cond, dict) else [("cond", cond)]:
            if value is not None and len(value) != len(x):
                raise ValueError(f"{name} has {len(value)} rows, x has {len(x)}")
        if self.data_free and original is None and teacher is None:
            raise ValueError("data_free needs original, the frozen network whose velocity is learnt from")
        return self.evaluate(self.draw(x, generator, together), net, x, cond, teacher, null, original)

    def draw(self, x, generator=None, together=None):
        """Draw everything random for a batch like x.  (B, *D) -> Draws."""

        def rand(rows):
            return uniform(x[rows], generator)

        B = len(x)
        counts = split(B, self.shares(), generator if together is None else together, x.device)
        any_step, base = slice(0, counts[0]), slice(counts[0] + counts[1], B)
        a, b = self.times
        t = (1 - rand(slice(B)) ** (1 / b)) ** (1 / a)
        t[base] = rand(base)
        one_step = rand(any_step) < self.one_step_share
        t[any_step] = torch.where(one_step, 1.0, self.dt + (1 - self.dt) * t[any_step])
        r = t.clone()
        r[any_step] = torch.where(one_step, 0.0, rand(any_step) * (t[any_step] - self.dt))
        inner, t_i = [], t[any_step] - self.dt
        for i in range(1, self.order):
            step = 1 / (self.order - i + 1) if self.even_inner else rand(any_step)
            t_i = t_i - step * (t_i - r[any_step])
            inner.append(t_i)
        rows = torch.randperm(B, generator=generator, device=x.device)
        return Draws(counts, rows, normal(x, generator), normal(x, generator), t, r, inner, together is not None)

    def evaluate(self, draws, net, x, cond=None, teacher=None, null=None, original=None):
        """The loss for given draws.  See `__call__`."""
        teacher = net if teacher is None else teacher
        original = teacher if original is None else original
        any_step, flow, adversarial, rectify = draws.slices()
        base = slice(0, flow.stop)
        x, cond = x[draws.rows], take(cond, draws.rows)
        z, z_new, t, r = draws.z, draws.z_new, draws.t, draws.r

        with torch.no_grad():
            x_t, u = self._base_pairs(draws, base, net, x, cond, null, original)
            x_fake = self._fakes(draws, adversarial, net, cond)
            x_t_fake = interpolate(x_fake, z_new[adversarial], t[adversarial])
            u_fake = velocity(x_fake, z_new[adversarial])

        F = net(
            torch.cat([x_t, x_t_fake, z[rectify]]),
            torch.cat([t[base], -t[adversarial], torch.ones_like(t[rectify])]),
            torch.cat([r[base], -t[adversarial], torch.zeros_like(t[rectify])]),
            cond,
        )

        F_sg = same_shape(F, x, "net's answer and x").detach()
        with torch.no_grad():
            correction = self._any_step_correction(draws, any_step, F_sg[any_step], x_t, u, cond, teacher)
            dv = self._gap_at_fakes(draws, rectify, F_sg[rectify], net, cond)
            target = torch.cat([F_sg[any_step] - correction, u[flow], u_fake, F_sg[rectify] + dv])

        d = DISTANCES[self.metric](F, target)
        expected = [len(x) * share for share in self.shares()]
        base_loss = mean(d[base], expected[0] + expected[1])
        adversarial_loss = self.adversarial_weight * mean(d[adversarial], expected[2])
        rectify_loss = self.rectify_weight * mean(d[rectify], expected[3])
        total = base_loss + adversarial_loss + rectify_loss
        gap_size = mean(squared_error(dv, torch.zeros_like(dv)), expected[3])
        return Losses(total, base_loss.detach(), adversarial_loss.detach(), rectify_loss.detach(), gap_size)

    def _base_pairs(self, draws, base, net, x, cond, null, original):
        """Points x_t and velocities u of the base rows.

        Data-free, x is the network's own sample and u the original's velocity at x_t: the straight line's own z - x
        would teach the network what it already makes.
        """
        z, t, cond = draws.z[base], draws.t[base], take(cond, base)
        if self.data_free and len(z):
            x_t = interpolate(generate(net, draws.z_new[base], cond), z, t)
            u = same_shape(original(x_t, t, t, cond), x_t, "original's answer and x")
        else:
            x_t, u = interpolate(x[base], z, t), velocity(x[base], z)
        if self.guidance:
            low, high = self.guidance_range
            acts = (t >= low) & (t <= high)
            on = acts.nonzero()[:, 0]
            if draws.together and not len(on):
                on = torch.arange(min(1, len(t)), device=t.device)  # a call of no effect, for others make one
            if len(on):
                both = join(take(cond, on), take(repeat(null, len(x)), draws.rows[base][on]))
                x_on, t_on = torch.cat([x_t[on], x_t[on]]), t[on].repeat(2)
                v, v_null = same_shape(original(x_on, t_on, t_on, both), x_on, "original's answer and x").chunk(2)
                u[on] += self.guidance * expand(acts[on], v) * (v - v_null)
        return x_t, u

    def _fakes(self, draws, rows, net, cond):
        """x_fake = sg(z - F(z, 1, 0)) for the adversarial rows (Eq. 2)."""
        z = draws.z[rows]
        return generate(net, z, take(cond, rows)) if len(z) else z

    def _any_step_correction(self, draws, rows, F, x_t, u, cond, teacher):
        """clip([(t - r) F - sum] / dt - u), the gradient of the any-step part (Eq. 1).

        Where (t - r) / dt exceeds the gain, dt gives way to (t - r) / gain as the divisor.
        """
        if not len(F):
            return F
        t, r, u, cond = draws.t[rows], draws.r[rows], u[rows], take(cond, rows)
        t_i = t - self.dt
        x_i = jump(x_t[rows], u, t, t_i)
        teacher_sum = torch.zeros_like(F)
        for t_next in [*draws.inner, r]:
            F_i = same_shape(teacher(x_i, t_i, t_next, cond), x_i, "teacher's answer and x")
            step = expand(t_i - t_next, F) * F_i
            teacher_sum, x_i, t_i = teacher_sum + step, x_i - step, t_next
        divisor = expand(((t - r) / self.gain).clamp(min=self.dt), F)
        correction = (expand(t - r, F) * F - teacher_sum - self.dt * u) / divisor
        return correction.clamp(-self.clip, self.clip)

    def _gap_at_fakes(self, draws, rows, F, net, cond):
        """dv = v - v_fake at the noised one-step samples z - F(z, 1, 0) of the rectify rows (Eq. 9)."""
        if not len(F):
            return F
        z, z_new, t = draws.z[rows], draws.z_new[rows], draws.t[rows]
        dv = gap(net, interpolate(z - F, z_new, t), t, take(cond, rows))
        return dv if self.rectify_clip is None else dv.clamp(-self.rectify_clip, self.rectify_clip)
