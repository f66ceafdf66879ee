"""Laws of the straight path, for every shape and time."""

import pytest
import torch
from conftest import batches, inside, unit
from hypothesis import given

from tinytwinflow.method import path

close = torch.testing.assert_close


@given(batches(2))
def test_the_path_runs_from_data_to_noise(case):
    (x, z), _ = case
    close(path.interpolate(x, z, 0.0), x)
    close(path.interpolate(x, z, 1.0), z)


@given(batches(2))
def test_velocity_is_the_derivative_of_the_path(case):
    (x, z), t = case
    x_t, dx_t = torch.func.jvp(lambda t: path.interpolate(x, z, t), (t,), (torch.ones_like(t),))
    close(path.velocity(x, z), dx_t)


@given(batches(2))
def test_point_and_velocity_give_back_data_and_noise(case):
    """x^ = x_t - t v and z^ = x_t + (1 - t) v undo the interpolation."""
    (x, z), t = case
    x_t, u = path.interpolate(x, z, t), path.velocity(x, z)
    close(path.denoise(x_t, u, t), x)
    close(path.noise(x_t, u, t), z)


@given(batches(2))
def test_any_velocity_splits_the_point_into_clean_and_noise(case):
    """x_t = t z^ + (1 - t) x^ and v = z^ - x^, whatever v is."""
    (x_t, v), t = case
    clean, noise = path.denoise(x_t, v, t), path.noise(x_t, v, t)
    close(path.interpolate(clean, noise, t), x_t)
    close(path.velocity(clean, noise), v)


@given(batches(2))
def test_score_is_minus_the_expected_noise_over_t(case):
    """Eq. 5: s = -z^ / t; for one pair it is the score of N((1 - t) x, t^2), the gradient of its log-density."""
    (x, z), t = case
    t = 0.02 + 0.98 * t
    x_t = path.interpolate(x, z, t).requires_grad_()
    log_density = -0.5 * ((x_t - path.expand(1 - t, x) * x) / path.expand(t, x)).square().sum()
    (gradient,) = torch.autograd.grad(log_density, x_t)
    close(path.score(x_t.detach(), path.velocity(x, z), t), gradient)


@given(batches(2), unit)
def test_jump_with_the_conditional_velocity_stays_on_the_path(case, r):
    (x, z), t = case
    x_t, u = path.interpolate(x, z, t), path.velocity(x, z)
    close(path.jump(x_t, u, t, torch.full_like(t, r)), path.interpolate(x, z, r))


@given(batches(2), unit, unit)
def test_jumps_with_one_velocity_compose_and_invert(case, s, r):
    (x, F), t = case
    there = path.jump(path.jump(x, F, t, s), F, s, r)
    close(there, path.jump(x, F, t, r))
    close(path.jump(there, F, r, t), x)


@given(inside)
def test_a_single_time_means_that_time_for_every_row(t):
    x, z = torch.randn(3, 2), torch.randn(3, 2)
    close(path.interpolate(x, z, t), path.interpolate(x, z, torch.full((3,), t)))


def test_every_function_refuses_times_and_shapes_that_are_none():
    """The ends of [0, 1] are times, numbers just outside are not, nor are those of another number of rows."""
    x, other = torch.ones(3, 2), torch.ones(3, 1)
    functions = {
        path.interpolate: (x, x), path.denoise: (x, x), path.noise: (x, x), path.score: (x, x),
        lambda a, b, t: path.jump(a, b, t, 0.5): (x, x),
    }  # fmt: skip
    for function, points in functions.items():
        for t in (1e-30, 1.0, torch.tensor([1.0, 0.5, 1e-30])):
            function(*points, t)
        for t in (-1e-6, 1 + 1e-6, torch.tensor([0.5, 0.5, 1.1]), torch.tensor([-0.1, 0.5, 0.5])):
            with pytest.raises(ValueError, match="^t must lie in"):
                function(*points, t)
        with pytest.raises(ValueError, match="must have the same shape"):
            function(x, other, 0.5)
        for times in (torch.full((2,), 0.5), torch.full((3, 1), 0.5), torch.full((1,), 0.5)):
            with pytest.raises(ValueError, match="times have shape"):
                function(*points, times)
    for r in (-1e-6, 1 + 1e-6):
        with pytest.raises(ValueError, match=r"^r must lie in \[0, 1\]"):
            path.jump(x, x, 0.5, r)
    assert path.jump(x, x, 0.0, 1.0).eq(2).all() and path.interpolate(x[:0], x[:0], torch.zeros(0)).shape == (0, 2)


def test_times_on_another_device_are_not_looked_at():
    """Their values would have to be waited for; a device without values shows it."""
    x, late = torch.zeros(3, 2, device="meta"), torch.full((3,), 2.0, device="meta")
    for found in (path.interpolate(x, x, late), path.denoise(x, x, late), path.jump(x, x, late, late)):
        assert found.shape == x.shape and found.device.type == "meta"


@given(batches(2))
def test_times_are_numbers_of_the_precision_of_the_data(case):
    """Float32 times, whole numbers and 0-dim tensors serve data of any precision and keep it."""
    (x, z), t = case
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, b = x.to(dtype), z.to(dtype)
        for time in (t, t.float(), torch.tensor(0.25), 0.25, 1):
            found = path.interpolate(a, b, time)
            assert found.dtype == dtype == path.jump(a, b, torch.as_tensor(time), 0.0).dtype
            wanted = path.interpolate(x, z, torch.as_tensor(time).double())
            close(found.double(), wanted, atol=0.05, rtol=0.02)


def test_wrong_use_says_what_is_allowed():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got values from -0.1 to 0.5"):
        path.interpolate(x, x, torch.tensor([-0.1, 0.5, 0.2]))
    with pytest.raises(ValueError, match="t must lie in"):
        path.denoise(x, x, 1.5)
    with pytest.raises(ValueError, match="r must lie in"):
        path.jump(x, x, 0.5, float("nan"))
    with pytest.raises(ValueError, match=r"times have shape \(2,\), but x of shape \(3, 2\) needs \(3,\)"):
        path.noise(x, x, torch.zeros(2))
    with pytest.raises(ValueError, match="same shape"):
        path.velocity(x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="t must lie in"):
        path.score(x, x, 0.0)
