"""Twin trajectories: one network, two flows, told apart by the sign of time.

For t > 0 the network holds the flow from noise to data; for t < 0 its twin, the flow from noise to
the model's own one-step samples, the fakes. Where the two velocities differ, fakes and data differ.

Everywhere in the library a velocity field is any callable net(x, t, r, cond) that returns the
average velocity from t to r in the shape of x; x (B, *D), t and r (B,) in [-1, 1], cond None, a
tensor or a dict of tensors with leading dimension B.
"""

import torch

from .path import jump


def times(t, x):
    """The same time t, a Python number, for each row of x, in float32 or better.  -> (B,)."""
    return torch.full(x.shape[:1], float(t), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def take(cond, rows):
    """Rows of a condition: None, a tensor, or a dict of tensors."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: value[rows] for name, value in cond.items()}
    return cond[rows]


def join(*conds):
    """Concatenate conditions of one kind along the batch."""
    if conds[0] is None:
        return None
    if isinstance(conds[0], dict):
        return {name: torch.cat([c[name] for c in conds]) for name in conds[0]}
    return torch.cat(conds)


def repeat(cond, n):
    """A condition that stands for none, of leading dimension 1, for n rows; one of leading dimension n as it is."""
    if isinstance(cond, dict):
        return {name: repeat(value, n) for name, value in cond.items()}
    if cond.ndim == 0 or len(cond) not in (1, n):
        raise ValueError(f"null has shape {tuple(cond.shape)}, but x has {n} rows: it needs 1 or as many")
    return cond.expand(n, *cond.shape[1:])


def move(cond, device):
    """A condition on a device."""
    if isinstance(cond, dict):
        return {name: value.to(device) for name, value in cond.items()}
    return None if cond is None else cond.to(device)


def replace(cond, null, rows):
    """A condition with some rows, (B,) bool, made null, a condition of leading dimension 1 or B."""
    if isinstance(cond, dict):
        return {name: replace(value, null[name], rows) for name, value in cond.items()}
    return torch.where(rows.view(-1, *[1] * (cond.ndim - 1)), null, cond)


def generate(net, z, cond=None):
    """One-step sample x = z - F(z, 1, 0), the jump from noise to data.  (B, *D) -> (B, *D)."""
    one, zero = times(1, z), times(0, z)
    return jump(z, net(z, one, zero, cond), one, zero)


def twin_velocities(net, x_t, t, cond=None):
    """Both velocities at x_t in one forward: v = F(x_t, t, t) and v_fake = F(x_t, -t, -t).

    x_t (B, *D), t (B,) in [0, 1]; returns two tensors (B, *D).
    """
    both = torch.cat([t, -t])
    return net(torch.cat([x_t, x_t]), both, both, join(cond, cond)).chunk(2)


def gap(net, x_t, t, cond=None):
    """Velocity gap dv = v - v_fake at x_t (Sec. 3.2): zero where fakes and data agree.

    At a noised fake, -dv is the direction in which KL(p_fake || p_real) grows, up to the weight
    (1 - t)^2 / t (Eqs. 3-8), so moving F(z, 1, 0) by dv moves the fakes onto the data.
    x_t (B, *D), t (B,) in [0, 1] -> (B, *D).
    """
    v, v_fake = twin_velocities(net, x_t, t, cond)
    return v - v_fake
