"""From noise to data in any number of network calls (UCGM-S, arXiv 2505.07447, on the straight path).

Every step does the same: ask the network for an average velocity F from the current time t to a
target r, read off the clean sample and the noise it implies, and mix the two again at the next time.
The three modes differ in one thing only, the r that is asked for.
"""

import math
import operator

import torch

from .conditions import check_rows
from .path import check_batch, denoise, interpolate, jump, noise
from .twin import check_field, same_time

MODES = ("any", "few", "multi")


def time_grid(intervals, shape=(1.0, 1.0, 1.0), gaps=(0.0, 0.0)):
    """Falling times from 1 to 0 for a number of intervals.  -> list of intervals + 1 numbers.

    shape: (a, b, c) of the Kumaraswamy transform s -> (1 - (1 - s^a)^b)^c of the progress s = 1 - t,
    each > 0; (1, 1, 1) is an even grid. gaps: (start, end), so that the network is first called at
    1 - start and, if end > 0, last called at a time near end.
    Raises ValueError for values outside these ranges.
    """
    if intervals < 1:
        raise ValueError(f"a time grid needs at least 1 interval, got {intervals}")
    if len(shape) != 3 or min(shape) <= 0:
        raise ValueError(f"shape must be three positive numbers, got {shape}")
    if len(gaps) != 2 or min(gaps) < 0 or sum(gaps) >= 1:
        raise ValueError(f"gaps must be two numbers in [0, 1) that sum to less than 1, got {gaps}")
    (a, b, c), (start, end) = shape, gaps
    points = intervals if end > 0 else intervals + 1
    spread = [start + (1 - end - start) * i / max(points - 1, 1) for i in range(points)]
    grid = [1 - (1 - (1 - s**a) ** b) ** c for s in spread]
    return [*grid[:intervals], 0.0]


def _renewal(stochastic, t, r):
    """Share of the noise to replace by fresh noise in a step from t to r.

    "sde" follows dx = (v - t s) dt + sqrt(2 t) dW backwards in time: the rate vanishes with the
    step, so the marginals are those of the ODE in the limit of many steps.
    """
    return min(1.0, 2 * t * (t - r) / max(r, 1e-12) ** 2) if stochastic == "sde" else stochastic


def _whole(number):
    """A whole number of any kind as Python's; 0 for what is none."""
    try:
        return operator.index(number)
    except TypeError:
        return 0


@torch.no_grad()
def sample(net, z, steps=1, mode="any", order=1, cond=None, stochastic=None, extrapolation=0.0,
           shape=(1.0, 1.0, 1.0), gaps=(0.0, 0.0), generator=None, trajectory=False):  # fmt: skip
    """Carry noise z (B, *D) to samples (B, *D) in exactly `steps` network calls.

    mode: "any" asks for the jump to the next time (r = next t), "multi" for the velocity (r = t) and
    takes an Euler step, "few" for the jump to data (r = 0) and adds noise again.
    order: 2 is Heun's method: steps / 2 intervals of two calls (an odd call is a last Euler step);
    for mode "multi" only, because a jump is no slope to average.
    stochastic: share in [0, 1] of the noise drawn afresh at each step, or "sde" for a share that
    shrinks with the step; default 1 for mode "few", 0 else.
    extrapolation: >= 0, moves each estimate further from the previous one by this ratio.
    shape, gaps: see `time_grid`. trajectory: return all states, (intervals + 1, B, *D), z first.
    Raises ValueError for any argument outside these ranges.
    """
    check_field(net)
    check_batch(z, "z")
    check_rows(cond, len(z))
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(MODES)}")
    given, steps = steps, _whole(steps)
    if steps < 1:
        raise ValueError(f"steps must be a whole number of network calls >= 1, got {given!r}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if order == 2 and mode != "multi":
        raise ValueError(f"order=2 averages two velocities and needs mode='multi', got mode={mode!r}")
    stochastic = float(mode == "few") if stochastic is None else stochastic
    if stochastic != "sde" and (isinstance(stochastic, str) or not 0 <= stochastic <= 1):
        raise ValueError(f"stochastic must lie in [0, 1] or be 'sde', got {stochastic!r}")
    if not (extrapolation >= 0 and math.isfinite(extrapolation)):
        raise ValueError(f"extrapolation must be >= 0, got {extrapolation!r}")

    calls = [order] * (steps // order) + [1] * (steps % order)
    grid = time_grid(len(calls), shape, gaps)
    x_t, previous, states = z, None, [z]
    for n_calls, t, t_next in zip(calls, grid[:-1], grid[1:]):
        time, time_next = same_time(t, z), same_time(t_next, z)
        r = {"any": time_next, "few": same_time(0, z), "multi": time}[mode]
        F = net(x_t, time, r, cond)
        if n_calls == 2:
            ahead = jump(x_t, F, time, time_next)
            F = (F + net(ahead, time_next, time_next, cond)) / 2
        clean, noisy = denoise(x_t, F, time), noise(x_t, F, time)
        last, previous = previous, (clean, noisy)
        if extrapolation and last is not None:
            clean = clean + extrapolation * (clean - last[0])
            noisy = noisy + extrapolation * (noisy - last[1])
        renew = _renewal(stochastic, t, t_next)
        if renew > 0 and t_next > 0:
            fresh = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            noisy = math.sqrt(1 - renew) * noisy + math.sqrt(renew) * fresh
        x_t = interpolate(clean, noisy, time_next)
        if trajectory:
            states.append(x_t)
    return torch.stack(states) if trajectory else x_t
