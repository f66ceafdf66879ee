"""The straight path between data and noise, and what a velocity at one of its points tells.

Data x sits at t = 0, noise z at t = 1, and the path between them is the straight line
x_t = t z + (1 - t) x. Its velocity u = z - x does not depend on t. Everything below is that one
line solved for a different unknown, so each function is one line too.

Shapes throughout: x, z, x_t, v are (B, *D) and t, r are (B,) in [0, 1]; a Python number or a
0-dim tensor stands for the same time in the whole batch.
"""

import torch


def expand(t, x):
    """Reshape a time (B,) to (B, 1, ..., 1) so that it multiplies x (B, *D).

    Raises ValueError if t is neither a single time nor one time for each row of x.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"times have shape {tuple(t.shape)}, but x of shape {tuple(x.shape)} needs ({x.shape[0]},)")
    return t.view(-1, *[1] * (x.ndim - 1))


def check_time(t, low=0.0, high=1.0, name="t"):
    """Raise ValueError unless every time lies in [low, high].

    Looked at on the CPU only: on an accelerator, or inside torch.compile, reading the values
    would make the host wait for the device at every call.
    """
    if torch.is_tensor(t) and (t.device.type != "cpu" or torch.compiler.is_compiling()):
        return
    t = torch.as_tensor(t)
    if t.numel() and not (low <= t.min() and t.max() <= high):
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got values from {t.min():g} to {t.max():g}")


def same_shape(a, b, names):
    """a, if it has the shape of b. Raises ValueError, with the names of both, if not: they would broadcast."""
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        raise ValueError(f"{names} must be tensors, got {type(a).__name__} and {type(b).__name__}")
    if a.shape != b.shape:
        raise ValueError(f"{names} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a


def check_batch(x, name):
    """Raise ValueError unless x is a tensor of floating-point numbers (B, *D) with a row or more."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point batch (B, *D), a tensor, got {got}")


def interpolate(x, z, t):
    """Point of the path, x_t = t z + (1 - t) x.  (B, *D), (B, *D), t in [0, 1] -> (B, *D)."""
    same_shape(x, z, "x and z")
    check_time(t)
    t = expand(t, x)
    return t * z + (1 - t) * x


def velocity(x, z):
    """Conditional velocity of the path, u = dx_t/dt = z - x.  (B, *D), (B, *D) -> (B, *D)."""
    same_shape(x, z, "x and z")
    return z - x


def denoise(x_t, v, t):
    """Clean sample that the velocity v at x_t points back to, x^ = x_t - t v (App. C.1)."""
    same_shape(x_t, v, "x_t and v")
    check_time(t)
    return x_t - expand(t, x_t) * v


def noise(x_t, v, t):
    """Noise that the velocity v at x_t points ahead to, z^ = x_t + (1 - t) v (App. C.1)."""
    same_shape(x_t, v, "x_t and v")
    check_time(t)
    return x_t + (1 - expand(t, x_t)) * v


def score(x_t, v, t):
    """Score of the marginal whose velocity at x_t is v, s = -(x_t + (1 - t) v) / t (Eq. 5).

    Needs t in (0, 1]: at t = 0 the velocity does not determine the score. Raises ValueError there.
    """
    check_time(t, low=torch.finfo(x_t.dtype).tiny)
    return -noise(x_t, v, t) / expand(t, x_t)


def jump(x_t, F, t, r):
    """Follow the average velocity F from time t to time r, x_r = x_t - (t - r) F."""
    same_shape(x_t, F, "x_t and F")
    check_time(t)
    check_time(r, name="r")
    return x_t - expand(t - r, x_t) * F
