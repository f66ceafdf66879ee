"""The paper's equations, one function each, as they are printed: the oracle of the fast losses.

One forward per symbol, every intermediate named, nothing merged or saved; slow on purpose. Read it
next to the paper (arXiv 2512.05150). Each function takes all its random numbers as arguments and
returns one value per sample, (B,). `d` is the squared error averaged over a sample's elements.
F(x, t, r) is the network, F_ (the paper's F^-) its copy without gradient.
"""

import torch

from .path import denoise, expand, interpolate, jump, noise, velocity


def squared(a, b):
    """d(a, b) = mean over a sample's elements of (a - b)^2.  (B, *D), (B, *D) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def normalised(a, b, c=1e-3):
    """The released code's metric: w d(a, b), w = 1 / (c sqrt(d / c^2 + 1)) without gradient.  -> (B,)."""
    d = squared(a, b)
    w = 1 / (c * torch.sqrt(d.detach() / c**2 + 1))
    return w * d


def flow_matching(F, x, z, t, cond=None, u=None, d=squared):
    """Order N = 0 of Eq. 1: F(x_t, t, t) = u.  u defaults to z - x."""
    x_t = interpolate(x, z, t)
    u = velocity(x, z) if u is None else u
    return d(F(x_t, t, t, cond), u)


def any_step_jump(F_, x_t, u, t, r, inner, dt, cond=None):
    """Right side of Eq. 1: dt u + sum over i of (t_i - t_{i+1}) F^-(x_{t_i}, t_i, t_{i+1}).

    `inner` lists t_1 .. t_{N-1}, each (B,), falling from t_0 = t - dt to t_N = r.
    """
    t_i = t - dt
    x_i = jump(x_t, u, t, t_i)
    total = dt * u
    for t_next in [*inner, r]:
        F_i = F_(x_i, t_i, t_next, cond)
        total = total + expand(t_i - t_next, x_t) * F_i
        x_i = jump(x_i, F_i, t_i, t_next)
        t_i = t_next
    return total


def base(F, F_, x, z, t, r, inner, dt=0.01, clip=1.0, gain=float("inf"), cond=None, u=None, d=squared):
    """L_base (Eq. 1) in the regression form with the clipped correction.

    target = F^-(x_t, t, r) - clip([(t - r) F^- - sum] / dt - u), the sum being Eq. 1's. F^- at
    (x_t, t, r) is the value of the network being trained, so the correction, not the lag of a
    teacher, is the gradient. Rows with t - r < dt are plain flow matching. A finite gain (not in the
    paper) scales the bracket's weight (t - r) / dt down to it before the clip.
    """
    x_t = interpolate(x, z, t)
    u = velocity(x, z) if u is None else u
    F_x = F(x_t, t, r, cond)
    F_sg = F_x.detach()
    with torch.no_grad():
        sum_ = any_step_jump(F_, x_t, u, t, r, inner, dt, cond) - dt * u
        correction = (expand(t - r, x_t) * F_sg - sum_) / dt - u
        scale = (gain * dt / (t - r).clamp(min=dt)).clamp(max=1)
        target = F_sg - (expand(scale, x_t) * correction).clamp(-clip, clip)
    return torch.where(t - r < dt, flow_matching(F, x, z, t, cond, u, d), d(F_x, target))


def guided_velocity(F_, x_t, t, u, guidance, cond, null):
    """Enhanced velocity u + w (v(x_t, t, c) - v(x_t, t, no c)), the velocity that guidance would sample with."""
    with torch.no_grad():
        return u + guidance * (F_(x_t, t, t, cond) - F_(x_t, t, t, null))


def fake(F, z, cond=None):
    """One-step sample without gradient, x_fake = sg(z - F(z, 1, 0))."""
    one, zero = torch.ones_like(z.flatten(1)[:, 0]), torch.zeros_like(z.flatten(1)[:, 0])
    with torch.no_grad():
        return z - F(z, one, zero, cond)


def adversarial(F, z, z_new, t_new, cond=None, d=squared):
    """L_adv (Eq. 2): d(F(x_t', -t', -t'), z' - x_fake), flow matching of the fakes at negative time."""
    x_fake = fake(F, z, cond)
    x_t = interpolate(x_fake, z_new, t_new)
    return d(F(x_t, -t_new, -t_new, cond), velocity(x_fake, z_new))


def score_gap(F_, x_t, t, cond=None):
    """s_real - s_fake by Eq. 5 at x_t: minus the gradient in x_t of log p_fake / p_real (Eqs. 3-6)."""
    v_real, v_fake = F_(x_t, t, t, cond), F_(x_t, -t, -t, cond)
    s_real, s_fake = -noise(x_t, v_real, t) / expand(t, x_t), -noise(x_t, v_fake, t) / expand(t, x_t)
    return s_real - s_fake


def rectify(F, z, z_new, t_new, cond=None, clip=None, d=squared):
    """L_rectify (Eq. 9): d(F(z, 1, 0), sg(F(z, 1, 0) + dv)), dv = v_real - v_fake at a noised fake."""
    one, zero = torch.ones_like(t_new), torch.zeros_like(t_new)
    F_z = F(z, one, zero, cond)
    with torch.no_grad():
        x_t = interpolate(denoise(z, F_z, one), z_new, t_new)
        dv = F(x_t, t_new, t_new, cond) - F(x_t, -t_new, -t_new, cond)
        if clip is not None:
            dv = dv.clamp(-clip, clip)
    return d(F_z, F_z.detach() + dv)
