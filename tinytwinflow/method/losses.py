"""TwinFlowLoss: base + self-adversarial + rectification (Eq. 10), each at the least cost we know.

Every row of the batch carries one part of the loss, and one forward with gradient serves them all:

    part          network input             is drawn onto                                   equation
    any-step      F(x_t, t, r)              a small true step, then the teacher's jumps     1
    flow          F(x_t, t, t)              u = z - x                                       1, N = 0
    adversarial   F(x_t', -t', -t')         z' - x_fake, the fakes made without gradient    2
    rectify       F(z, 1, 0)                itself + dv, the gap at its own noised fake     9

`reference.py` computes the same numbers with one forward per symbol; the tests hold the two together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..ranges import as_field, plain, settings_of
from .bases import on_base
from .conditions import apart, as_null, check_rows, join, repeat, take
from .distances import DISTANCES, normalised_error, squared_error
from .draws import draw_for, mean
from .path import check_batch, expand, interpolate, jump, same_shape, velocity
from .twin import check_field, gap, generate


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

    The defaults are what we recommend, and what the recipes train with but for what they say; `TwinFlowLoss.paper()` is
    what is printed. What each setting means is written beside it, and `python -m tinytwinflow settings` lists them all.

    setting          here      paper                            released code
    order            8         2                                2
    flow_share       1/2       rows with t - r < dt, 1 in 20    1/3, within 5 % of r = t
    one_step_share   0.3       0                                1/2
    even_inner       yes       no                               yes
    gain, clip       4, 10     no bound, 1                      no bound, 1
    twin weights     0.3       1, 1                             1, and 0.5 for the rectification
    rectify_clip     none      none                             1
    metric           squared   "a metric"                       normalised
    jump_c           none      none                             1e-3, in all parts

    With a gain, long jumps need no clip and escape its bias: a clip draws the mean of what is clipped, u's noise,
    towards its median.

    A squared error draws an answer to the mean of targets that disagree, and where the border between two modes moves
    the mean lies on neither. With a jump_c jumps have the normalised metric, which draws to the median, on one of them;
    the velocity is a mean, and its rows stay squared. It takes two fifths of the samples between modes away in 2D
    (recipe toy: 0.12), and does no good to images.

    Each part is the mean over its rows, whose number is share * B rounded, and the base weighs its two parts by their
    shares; a batch of fewer rows than parts has some of them, drawn at random. So the expected gradient is the same for
    every batch size, 1 included.
    Raises ValueError for a setting out of its range.
    """

    order: int = as_field(8, "N of Eq. 1: teacher jumps after the small step; 0 is flow matching alone", "[0, inf)")
    share: float = as_field(1 / 3, "the paper's lambda: share of the batch in the two twin parts, half each", "[0, 1]")
    flow_share: float = as_field(0.5, "share of the base rows with r = t, which train the gap's velocity", "[0, 1]")
    one_step_share: float = as_field(
        0.3, "share of the any-step rows at t = 1, r = 0, the jump of one-step sampling", "[0, 1]"
    )
    dt: float = as_field(0.01, "length of the small true step; any-step rows have t - r >= dt", "(0, 1)")
    times: tuple = as_field(
        (1.0, 1.0), "a, b of the Kumaraswamy law of t in the base rows; 1, 1 is uniform", "(0, inf)", length=2
    )
    even_inner: bool = as_field(True, "teacher's times evenly spaced, not t_i ~ U(r, t_{i-1})")
    metric: str = as_field("squared", "distance of an answer to its target, over elements", choices=tuple(DISTANCES))
    jump_c: float | None = as_field(
        None,
        "any-step rows have the normalised metric with this c; None: that of the others",
        "(0, inf)",
        kind=float,
        none=True,
    )
    adversarial_weight: float = as_field(0.3, "weight of the self-adversarial term", "[0, inf)")
    rectify_weight: float = as_field(0.3, "weight of the rectification", "[0, inf)")
    rectify_clip: float | None = as_field(None, "clips dv elementwise", "(0, inf]", kind=float, none=True)
    gain: float = as_field(
        4.0, "bounds (t - r) / dt, the weight that the error of F has in the regression form of Eq. 1", "(0, inf]"
    )
    clip: float = as_field(10.0, "clips the any-step correction elementwise", "(0, inf]")
    guidance: float = as_field(
        0.0, "w: u becomes u + w (v(x_t, t, c) - v(x_t, t, null)) in base rows; it rests at w / (1 - w)", "[0, inf)"
    )
    guidance_range: tuple = as_field((0.0, 1.0), "times t where guidance acts, computed at all t", "[0, 1]", length=2)
    data_free: bool = as_field(False, "never read x, only its shape: see `_base_pairs`")
    # another base loss for Eq. 1, of the contract in `peers`, which needs no helpers; of the settings above it leaves
    # share, metric, both weights and rectify_clip to be read
    base: Callable | None = None

    @classmethod
    def paper(cls, **changes):
        """What the paper prints, with changes: one base row in twenty at r = t, those with t - r < dt; no gain."""
        printed = {"order": 2, "flow_share": 0.05, "one_step_share": 0.0, "even_inner": False, "gain": float("inf")}
        printed |= {"clip": 1.0, "adversarial_weight": 1.0, "rectify_weight": 1.0}
        return cls(**printed | changes)

    def __post_init__(self):
        for name, setting in settings_of(type(self)).items():
            setattr(self, name, plain(getattr(self, name)))
            setting.check(name, getattr(self, name))
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range must be two times low <= high, got {low}, {high}")
        if self.base is not None and not callable(self.base):
            raise ValueError(f"base must be a loss, see `peers`, or None, got {self.base!r}")
        if hasattr(self.base, "needs"):
            raise ValueError(f"a base takes every network, {self.base} needs one with {self.base.needs}")
        if set(getattr(self.base, "helpers", {}).values()) - {"average"}:
            raise ValueError(f"a base needs no network beside the average, {self.base} needs {self.base.helpers}")
        if self.base is not None and (self.guidance or self.data_free):
            raise ValueError(
                "guidance and data_free are of the any-step base: guidance=0, data_free=False with another"
            )

    def shares(self):
        """Expected share of the batch in each part: any-step, flow, adversarial, rectify."""
        flow = 1.0 if self.order == 0 else self.flow_share
        return ((1 - self.share) * (1 - flow), (1 - self.share) * flow, self.share / 2, self.share / 2)

    def __call__(
        self, net, x, cond=None, teacher=None, null=None, original=None, generator=None, turns=None, progress=1.0
    ):
        """Draw the random numbers and compute the loss of a batch.

        net, teacher, original: velocity fields net(x, t, r, cond). teacher is F^-, used without gradient (default: net
        itself; in practice its EMA). original gives the velocities of guidance and of data-free training (default:
        teacher). x (B, *D). cond: None, tensor or dict, leading dimension B; null: the same for "no condition",
        leading dimension 1 or B, or a label, needed for guidance; see `conditions.apart`. generator: on the device of
        x. turns: see `draws.draw_for`. progress: how far training is, 0 to 1, for a base that asks for it.
        Returns Losses. Raises ValueError if x is not a floating-point batch, cond or null has another length, null is
        missing, or an answer of net, teacher or original has another shape than x.
        """
        check_field(net)
        check_batch(x, "x")
        check_rows(cond, len(x))
        if self.guidance and (cond is None or null is None):
            raise ValueError("guidance > 0 needs cond and null, the condition that stands for none")
        if self.data_free and original is None and teacher is None:
            raise ValueError("data_free needs original, the frozen network whose velocity is learnt from")
        cond, null = apart(cond, as_null(null, x.device))
        if self.base is not None:
            more = {
                "teacher": net if teacher is None else teacher,
                "null": null,
                "generator": generator,
                "turns": turns,
            }
            return Losses(*on_base(self, net, x, cond, progress, **more))
        return self.evaluate(draw_for(self, x, generator, turns), net, x, cond, teacher, null, original)

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
        if self.jump_c is not None:
            d = torch.cat([normalised_error(F[any_step], target[any_step], self.jump_c), d[any_step.stop :]])
        of_part = [mean(d[part], divisor) for part, divisor in zip(draws.slices(), draws.divisors)]
        jumps, flows, *_ = self.shares()
        base_loss = (jumps * of_part[0] + flows * of_part[1]) / ((jumps + flows) or 1)
        adversarial_loss = self.adversarial_weight * of_part[2]
        rectify_loss = self.rectify_weight * of_part[3]
        total = base_loss + adversarial_loss + rectify_loss
        gap_size = mean(squared_error(dv, torch.zeros_like(dv)), draws.divisors[3])
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
        if self.guidance and len(z):
            low, high = self.guidance_range
            both = join(cond, take(repeat(null, len(x)), draws.rows[base]))
            twice, times = torch.cat([x_t, x_t]), t.repeat(2)
            v, v_null = same_shape(original(twice, times, times, both), twice, "original's answer and x").chunk(2)
            u = torch.where(expand((low <= t) & (t <= high), u) > 0, u + self.guidance * (v - v_null), u)
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
