"""Twin trajectories: one network, two flows, told apart by the sign of time.

For t > 0 the network holds the flow from noise to data; for t < 0 its twin, the flow from noise to
the model's own one-step samples, the fakes. Where the two velocities differ, fakes and data differ.

Everywhere in the library a velocity field is any callable net(x, t, r, cond) that returns the
average velocity from t to r in the shape of x; x (B, *D), t and r (B,) in [-1, 1], cond None, a
tensor or a dict of tensors with leading dimension B.
"""

import inspect

import torch

from .conditions import join
from .path import jump, same_shape


def check_field(net):
    """Raise ValueError unless a velocity field can be called as net(x, t, r, cond)."""
    try:
        inspect.signature(getattr(net, "forward", net)).bind("x", "t", "r", "cond")
    except ValueError:  # of what C code takes nothing is known
        return
    except TypeError as error:
        raise ValueError(f"a velocity field is called as net(x, t, r, cond), this one cannot be: {error}") from error


def same_time(t, x):
    """The same time t, a Python number, for each row of x, in float32 or better.  -> (B,)."""
    return torch.full(x.shape[:1], float(t), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def generate(net, z, cond=None):
    """One-step sample x = z - F(z, 1, 0), the jump from noise to data.  (B, *D) -> (B, *D)."""
    one, zero = same_time(1, z), same_time(0, z)
    return jump(z, net(z, one, zero, cond), one, zero)


def twin_velocities(net, x_t, t, cond=None):
    """Both velocities at x_t in one forward: v = F(x_t, t, t) and v_fake = F(x_t, -t, -t).

    x_t (B, *D), t (B,) in [0, 1]; returns two tensors (B, *D).
    """
    both, x = torch.cat([t, -t]), torch.cat([x_t, x_t])
    return same_shape(net(x, both, both, join(cond, cond)), x, "net's answer and x").chunk(2)


def gap(net, x_t, t, cond=None):
    """Velocity gap dv = v - v_fake at x_t (Sec. 3.2): zero where fakes and data agree.

    At a noised fake, dv is the direction in which KL(p_fake || p_real) grows, up to the weight (1 - t)^2 / t
    (Eqs. 3-8): the fake must move along -dv. It is z - F(z, 1, 0), so F must move along +dv (Eq. 9).
    x_t (B, *D), t (B,) in [0, 1] -> (B, *D).
    """
    v, v_fake = twin_velocities(net, x_t, t, cond)
    return v - v_fake
