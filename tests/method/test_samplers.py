"""Laws of the samplers, with exact fields: what is exact must be exact, what converges must do so at its order."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import mixtures, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytwinflow import GaussianMixture, sample, time_grid

close = torch.testing.assert_close
MODES = st.sampled_from(["any", "few", "multi"])


class Counted:
    """A field that keeps the times it is asked for."""

    def __init__(self, field):
        self.field, self.asked = field, []

    def __call__(self, x, t, r, cond=None):
        self.asked.append((t[0].item(), r[0].item()))
        return self.field(x, t, r, cond)


def gaussian(scale, mean=0.0):
    return GaussianMixture([[mean]], [[[scale**2]]])


def exact_jump(scale):
    """Average velocity of N(0, scale^2), in closed form: x_r = x_t s(r) / s(t)."""

    def field(x, t, r, cond=None):
        s = lambda t: ((1 - t) ** 2 * scale**2 + t**2).sqrt()  # noqa: E731
        v = ((t - (1 - t) * scale**2) / s(t) ** 2)[:, None] * x
        average = (1 - s(r) / s(t))[:, None] * x / torch.where(t == r, 1.0, t - r)[:, None]
        return torch.where((t == r)[:, None], v, average)

    return field


shapes = st.tuples(*[st.floats(0.5, 2.0)] * 3)
gaps = st.tuples(*[st.floats(0, 0.2).map(lambda a: round(a, 3))] * 2)


@given(st.integers(1, 30), shapes, gaps)
def test_grid_falls_from_one_to_zero(intervals, shape, gap):
    grid = time_grid(intervals, shape, gap)
    assert len(grid) == intervals + 1 and grid[-1] == 0
    assert all(a > b for a, b in zip(grid[:-1], grid[1:]))
    if gap == (0.0, 0.0):
        assert grid[0] == 1


@given(st.integers(2, 30), gaps)
def test_even_grid_keeps_its_gaps(intervals, gap):
    grid = time_grid(intervals, gaps=gap)
    assert math.isclose(grid[0], 1 - gap[0])
    if gap[1] > 0:
        assert math.isclose(grid[-2], gap[1], abs_tol=1e-12)


@given(st.integers(1, 8), gaps)
def test_a_grid_is_even_between_its_gaps(intervals, gap):
    """From 1 - start in equal steps: to 0, or to `end`, the last time a network is called at, and then 0."""
    start, end = gap
    last = intervals - 1 if end > 0 else intervals
    wanted = [1 - start - (1 - start - end) * i / max(last, 1) for i in range(intervals)] + [0.0]
    assert time_grid(intervals, gaps=gap) == pytest.approx(wanted)
    assert time_grid(intervals) == pytest.approx([1 - i / intervals for i in range(intervals + 1)])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"intervals": 0}, "a time grid needs at least 1 interval, got 0"),
        *(({"shape": shape}, "shape must be three positive numbers") for shape in (
            (0.0, 1, 1), (1, 0.0, 1), (1, 1, 0.0), (1, 1, -1), (1, 1), (1, 1, 1, 1))),
        *(({"gaps": gap}, r"gaps must be two numbers in \[0, 1\)") for gap in (
            (-0.1, 0.2), (0.2, -0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.1,), (0.1, 0.1, 0.1))),
    ],
)  # fmt: skip
def test_a_grid_that_is_none_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        time_grid(**{"intervals": 3, **wrong})
    assert len(time_grid(1, (0.1, 9, 0.01), (0.98, 0.01))) == 2


@given(st.integers(1, 8), shapes)
def test_grid_is_the_kumaraswamy_transform_of_progress(intervals, shape):
    a, b, c = shape
    for i, t in enumerate(time_grid(intervals, shape)):
        assert math.isclose(1 - t, (1 - (1 - (i / intervals) ** a) ** b) ** c, abs_tol=1e-12)


@settings(max_examples=10)
@given(mixtures(), st.integers(1, 5), shapes, seeds)
def test_any_step_sampling_with_the_exact_field_is_exact_on_every_grid(mixture, steps, shape, seed):
    z = torch.randn(4, mixture.means.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(sample(mixture, z, steps, "any", shape=shape), mixture.flow(z, 1.0, 0.0), atol=1e-6, rtol=1e-6)


@settings(max_examples=10)
@given(mixtures(), seeds)
def test_any_step_trajectory_lies_on_the_exact_flow(mixture, seed):
    z = torch.randn(3, mixture.means.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    states = sample(mixture, z, 4, "any", trajectory=True)
    assert states.shape == (5, *z.shape)
    for state, t in zip(states, time_grid(4)):
        close(state, mixture.flow(z, 1.0, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_euler_is_first_order_and_heun_second(order):
    """Global error C h^order: doubling the calls divides it by 2^order, measured between 64 and 256 calls."""
    mixture = GaussianMixture([[-1.0], [0.8]], [[[0.2]], [[0.3]]])
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    truth = mixture.flow(z, 1.0, 0.0)
    errors = [(sample(mixture, z, n, "multi", order=order) - truth).abs().mean() for n in (64, 128, 256)]
    rates = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:])]
    assert all(abs(rate - order) < 0.25 for rate in rates), rates


@given(st.integers(1, 12), MODES, st.sampled_from([1, 2]))
def test_the_number_of_network_calls_is_the_argument(steps, mode, order):
    net = Counted(exact_jump(0.5))
    sample(net, torch.randn(2, 1), steps, mode, order=order if mode == "multi" else 1)
    assert len(net.asked) == steps


@given(st.integers(1, 6))
def test_each_mode_asks_for_its_own_target_time(steps):
    grid = time_grid(steps)
    for mode, targets in (("any", grid[1:]), ("few", [0.0] * steps), ("multi", grid[:-1])):
        net = Counted(exact_jump(0.5))
        sample(net, torch.randn(2, 1, dtype=torch.float64), steps, mode)
        assert net.asked == list(zip(grid[:-1], targets))


def test_heun_asks_for_velocities_at_both_ends_of_an_interval():
    net = Counted(exact_jump(0.5))
    sample(net, torch.randn(2, 1, dtype=torch.float64), 5, "multi", order=2)
    times = [1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3]
    assert all(math.isclose(t, r) for t, r in net.asked)
    assert all(math.isclose(t, want) for (t, _), want in zip(net.asked, times))


@given(st.floats(0.2, 2), st.integers(2, 4), seeds)
@settings(max_examples=10)
def test_few_step_sampling_keeps_a_gaussians_marginal(scale, steps, seed):
    """With the exact jump to data and fresh noise at each step, x_t has variance (1-t)^2 s^2 + t^2 at every t."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(40000, 1, generator=generator, dtype=torch.float64)
    states = sample(exact_jump(scale), z, steps, "few", trajectory=True, generator=generator)
    for state, t in zip(states, time_grid(steps)):
        assert abs(state.var() / ((1 - t) ** 2 * scale**2 + t**2) - 1) < 0.05


def test_sde_sampling_keeps_a_gaussians_marginal_as_the_steps_grow(generator):
    """The variance of the result tends to the data's, its error falling about as 1 / steps; a fixed
    share of fresh noise does not do that: it pulls the samples together."""
    z = torch.randn(40000, 1, generator=generator, dtype=torch.float64)

    def error(steps, stochastic):
        x = sample(exact_jump(0.7), z, steps, "multi", stochastic=stochastic, generator=generator)
        return abs(x.var().item() / 0.7**2 - 1)

    assert error(400, "sde") < 0.02
    assert error(400, "sde") < 0.5 * error(40, "sde")
    assert error(400, 1.0) > 0.3


@given(seeds, MODES, st.floats(0, 1))
@settings(max_examples=10)
def test_same_seed_same_bytes(seed, mode, stochastic):
    net, z = exact_jump(0.7), torch.randn(5, 1)
    runs = [
        sample(net, z, 4, mode, stochastic=stochastic, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_sampling_leaves_the_global_random_state_alone_when_given_a_generator(generator):
    before = torch.get_rng_state()
    sample(exact_jump(0.7), torch.zeros(2, 1), 4, "few", generator=generator)
    assert torch.equal(before, torch.get_rng_state())


def test_extrapolation_moves_along_the_last_change():
    """Two steps by hand: the second estimate x^ becomes x^ + k (x^ - last x^)."""
    net, z, k = exact_jump(0.5), torch.tensor([[1.0]]).double(), 0.3
    first, second = sample(net, z, 2, "multi", trajectory=True)[:2]
    v1 = net(first, torch.ones(1).double(), torch.ones(1).double())
    half = torch.full((1,), 0.5).double()
    clean1, clean2 = first - v1, second - 0.5 * net(second, half, half)
    close(sample(net, z, 2, "multi", extrapolation=k), clean2 + k * (clean2 - clean1))


@given(st.integers(3, 6), MODES, st.floats(0.1, 2), st.sampled_from([0.0, 0.4, 1.0]), seeds)
def test_many_extrapolated_steps_by_hand(steps, mode, k, share, seed):
    """x^ and z^ of each step move further from those of the step before (not extrapolated) by k; then a share s of
    the noise is drawn afresh, sqrt(1 - s) z^ + sqrt(s) z', in all steps but the last."""
    net, generator = Counted(exact_jump(0.5)), torch.Generator().manual_seed(seed)
    z = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    grid, x, last = time_grid(steps), z, None
    twin = torch.Generator().manual_seed(seed + 1)
    found = sample(net, z, steps, mode, stochastic=share, extrapolation=k, generator=twin, trajectory=True)
    fresh = torch.Generator().manual_seed(seed + 1)
    for (t, r), asked, state in zip(itertools.pairwise(grid), net.asked, found[1:]):
        F = net.field(x, *(torch.full((3,), a, dtype=torch.float64) for a in asked))
        clean, noise = x - t * F, x + (1 - t) * F
        more = (clean, noise) if last is None else (clean + k * (clean - last[0]), noise + k * (noise - last[1]))
        last, (x_0, x_1) = (clean, noise), more
        if share and r:
            x_1 = (1 - share) ** 0.5 * x_1 + share**0.5 * torch.randn(3, 1, generator=fresh, dtype=torch.float64)
        x = (1 - r) * x_0 + r * x_1
        close(state, x)


@given(st.integers(2, 40), seeds)
def test_sde_adds_the_variance_of_its_equation(steps, seed):
    """dx = (v - t s) dt + sqrt(2 t) dW adds 2 t h of variance in a step of h, and never more than all noise, r^2."""
    z = torch.randn(2, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    own, fresh = (torch.Generator().manual_seed(seed + 1) for _ in range(2))
    states = sample(exact_jump(0.5), z, steps, "multi", stochastic="sde", generator=own, trajectory=True)
    for (t, r), x_t, x_r in zip(itertools.pairwise(time_grid(steps)[:-1]), states, states[1:]):
        time = torch.full((2,), t, dtype=torch.float64)
        F = exact_jump(0.5)(x_t, time, time)
        added = min(2 * t * (t - r), r**2)
        kept = (r**2 - added) ** 0.5
        noise = torch.randn(2, 1, generator=fresh, dtype=torch.float64)
        close(x_r, (1 - r) * (x_t - t * F) + kept * (x_t + (1 - t) * F) + added**0.5 * noise)


@given(st.integers(1, 5), MODES, st.sampled_from([None, 0.0, 0.3, "sde"]), seeds)
def test_noise_is_drawn_in_the_steps_that_add_it_and_in_no_other(steps, mode, stochastic, seed):
    """One fresh noise between two steps, where it has a share, none after the last."""
    z, net = torch.ones(3, 1, dtype=torch.float64), exact_jump(0.5)
    used, expected = (torch.Generator().manual_seed(seed) for _ in range(2))
    x = sample(net, z.requires_grad_(), steps, mode, stochastic=stochastic, generator=used)
    drawn = steps - 1 if stochastic or stochastic is None and mode == "few" else 0
    for _ in range(drawn):
        torch.randn(3, 1, generator=expected, dtype=torch.float64)
    assert torch.equal(used.get_state(), expected.get_state()) and not x.requires_grad


def test_one_step_is_the_jump_to_data():
    """The usual number of steps; z - F(z, 1, 0), for a field whose two jumps are not one."""
    z, one, net = torch.randn(3, 1), torch.ones(3), lambda x, t, r, cond: x**2 + (t - r)[:, None]
    close(sample(net, z), z - net(z, one, 0 * one, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_and_fresh_noise_have_the_precision_of_the_first_noise(dtype):
    states = sample(lambda x, t, r, cond: x, torch.ones(3, 1, dtype=dtype), 3, "few", trajectory=True)
    assert states.dtype == dtype


@pytest.mark.parametrize("mode, share", [("any", 0.0), ("few", 1.0), ("multi", 0.0)])
def test_noise_is_drawn_afresh_where_the_mode_asks_for_it(mode, share):
    """All of it in "few", none in the others; "few" without fresh noise follows the flow of its jumps."""
    z = torch.ones(3, 1, dtype=torch.float64)
    one, other = (
        sample(exact_jump(0.5), z, 3, mode, stochastic=given, generator=torch.Generator().manual_seed(0))
        for given in (None, share)
    )
    close(one, other)


def test_wrong_use_says_what_is_allowed():
    net, z = exact_jump(0.5), torch.zeros(2, 1)
    for kwargs, message in [
        ({"mode": "fast"}, "unknown mode 'fast': choose from any, few, multi"),
        ({"steps": 0}, "steps must be a whole number of network calls >= 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": torch.tensor(2.0)}, "steps must be a whole number"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"order": 2}, "needs mode='multi'"),
        ({"stochastic": 1.2}, r"stochastic must lie in \[0, 1\]"),
        ({"stochastic": -0.1}, r"stochastic must lie in \[0, 1\]"),
        ({"stochastic": "ode"}, "stochastic must lie in"),
        ({"extrapolation": -0.1}, "extrapolation must be >= 0"),
        ({"extrapolation": math.inf}, "extrapolation must be >= 0"),
        ({"extrapolation": math.nan}, "extrapolation must be >= 0"),
        ({"steps": None}, "steps must be a whole number"),
        ({"steps": 2, "mode": "few", "order": 2}, "needs mode='multi', got mode='few'"),
        ({"shape": (0, 1, 1)}, "three positive numbers"),
        ({"shape": (1, 1)}, "three positive numbers"),
        ({"gaps": (0.1,)}, "gaps must be two numbers"),
        ({"gaps": (0.5, 0.6)}, "gaps must be two numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(net, z, **kwargs)
    close(sample(net, z + 1, np.int64(2)), sample(net, z + 1, 2))
    for kwargs in ({"stochastic": 0}, {"stochastic": 1}, {"stochastic": "sde"}, {"extrapolation": 0}, {"steps": 1}):
        assert sample(net, z, **kwargs).shape == z.shape
