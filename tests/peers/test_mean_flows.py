"""Laws of the mean flows: each draws F onto what its page says, and they tend to one another."""

import pytest
import torch
from conftest import seeds, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import gradients, network
from test_peers import Spy, gaussians

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.peers.alpha_flow import partly
from tinytwinflow.peers.common import along, along_differences, derivative, two_times, weighed

close = torch.testing.assert_close
NAMES = ("improved meanflow", "pixel meanflow", "euler mean flow", "alpha-flow", "soflow")


def residual(name, net, x, x_t, t, r, F, progress):
    """F - target, by the pages' formulas, derivatives by differences; in rows with r = t it is F - u."""
    u, length = (x_t - x) / t[:, None], (t - r)[:, None]
    v = net(x_t, t, t)
    if name in ("improved meanflow", "pixel meanflow"):
        u = (x_t - x) / t.clamp(min=0.05)[:, None] if name == "pixel meanflow" else u
        return F + length * along_differences(net, x_t, t, r, v, step=1e-5) - u
    if name == "euler mean flow":
        s = torch.maximum(t - 0.01, r)
        ahead = net(x_t - (t - s)[:, None] * v, s, r)
        return F - u - (length - 0.01).clamp(min=0) * (ahead - net(x_t, t, r)) / 0.01
    if name == "alpha-flow":
        a = 1 - torch.sigmoid(torch.tensor(25 * (progress - 0.5))).item()
        if a < 0.005:
            return F - u + length * along_differences(net, x_t, t, r, u, step=1e-5)
        a = 1.0 if a > 0.995 else a
    else:
        a = 0.1 ** (1 - progress) * 0.002**progress
    s = (1 - a) * t + a * r
    of_step = (F - a * u - (1 - a) * net(x_t - a * length * u, s, r)) / a
    return torch.where(length > 0, of_step, F - u)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(seeds, unit, st.sampled_from([0.0, 0.5, 1.0]))
def test_what_f_is_drawn_onto(name, seed, progress, power):
    """The gradient at F is 2 (F - target) / (d + 0.001)^power, and reaches the network through that F alone."""
    net, x = Spy(network(seed)), torch.randn(64, 2).double()
    out = peers.PEERS[name](power=power)(net, x, progress=progress)
    x_t, t, r, F = next(call for call in net.calls if call[-1].requires_grad)
    assert sum(call[-1].requires_grad for call in net.calls) == 1 and (r <= t).all()
    assert (r == t).sum() == 48 if name == "soflow" else 8 < (r == t).sum() < 56
    found = torch.autograd.grad(out.total, F, retain_graph=True)[0]
    error = residual(name, net.field, x, x_t, t, r, F.detach(), progress)
    d = error.square().mean(1, keepdim=True)
    weight = torch.where((r < t)[:, None], 0.5, 1.0) if name == "soflow" else 1.0
    close(found, weight * error / (d + 1e-3) ** power / 64, atol=1e-6, rtol=2e-4)
    close(gradients(out.total, net.field), gradients((found * F).sum(), net.field))


@given(seeds, st.floats(0.0, 1.0), st.integers(1, 6))
def test_two_times_and_weights(seed, share, B):
    """t >= r, equal in the share of rows, uniform ones else; a row's weight has no gradient."""
    x, generator = torch.zeros(4000, 1), torch.Generator().manual_seed(seed)
    t, r = two_times(x, share, generator)
    assert (r <= t).all() and abs((r == t).double().mean() - share) < 0.06
    assert abs(t.mean() - 2 / 3) < 0.03
    t, r = two_times(x, generator=generator)
    assert (r < t).double().mean() > 0.99 and abs(r.mean() - 1 / 3) < 0.03
    d = torch.rand(B).double().requires_grad_()
    for power in (0.0, 0.5, 1.0):
        values = weighed(d, power, 0.1)
        close(values.detach(), d.detach() / (d.detach() + 0.1) ** power)
        close(torch.autograd.grad(values.sum(), d)[0], 1 / (d.detach() + 0.1) ** power)


@given(seeds)
def test_a_derivative_in_any_direction(seed):
    """In x, t and r, each alone and all together, as differences say; where nothing moves it is zero."""
    net = network(seed)
    x, t, r = torch.randn(4, 2).double(), 0.5 + 0.3 * torch.rand(4).double(), 0.3 * torch.rand(4).double()
    dx, dt, dr = torch.randn(4, 2).double(), torch.randn(4).double(), torch.randn(4).double()
    for keys in (("dx",), ("dt",), ("dr",), ("dx", "dt", "dr")):
        given = {key: value for key, value in {"dx": dx, "dt": dt, "dr": dr}.items() if key in keys}
        F, dF = derivative(net, x, t, r, **given)
        ends = [
            net(x + e * given.get("dx", 0), t + e * given.get("dt", 0), r + e * given.get("dr", 0))
            for e in (1e-5, -1e-5)
        ]
        close(F, net(x, t, r).detach())
        close(dF, (ends[0] - ends[1]).detach() / 2e-5, atol=1e-6, rtol=1e-5)
        assert not dF.requires_grad
    assert derivative(net, x, t, r)[1].eq(0).all()
    close(along(net, x, t, r, dx)[1], derivative(net, x, t, r, dx=dx, dt=torch.ones_like(t))[1])


@settings(max_examples=10)
@given(seeds)
def test_alpha_flow_goes_from_flow_matching_to_meanflow(seed):
    """At the beginning every pair of times has target u; just before the end its gradient is almost MeanFlow's, with
    which it ends, and half-way it is neither."""
    found = {}
    for progress in (0.0, 0.5, 0.711, 0.72):
        net, x = network(seed), torch.randn(256, 2).double()
        torch.manual_seed(seed)
        found[progress] = gradients(peers.AlphaFlow(power=0.0)(net, x, progress=progress).total, net)
    torch.manual_seed(seed)
    meanflow = gradients(peers.MeanFlow(flow_share=0.5, power=0.0)(net, x).total, net)
    close(found[0.72], meanflow)
    assert (found[0.711] - meanflow).norm() < 0.1 * (found[0.5] - meanflow).norm()
    torch.manual_seed(seed)
    net = Spy(network(seed))
    out = peers.AlphaFlow(power=0.0)(net, x, progress=0.0)
    ((x_t, t, _, F),) = net.calls
    close(out.total, (F - (x_t - x) / t[:, None]).square().mean())


@settings(max_examples=10)
@given(seeds, gaussians(), st.floats(0.01, 0.9))
def test_a_part_of_the_line_and_an_exact_jump(seed, exact, a):
    """Where the line is the trajectory, the target is the exact average velocity; it carries no gradient."""
    torch.manual_seed(seed)
    x_t, t = exact.sample(6), 0.3 + 0.7 * torch.rand(6).double()
    r = t * torch.rand(6).double()
    s = t - a * (t - r)
    u = exact(x_t, t, s)  # the chord of the trajectory from t to s
    target = partly(exact, x_t, t, r, u, a)
    close(target, exact(x_t, t, r).detach())
    assert not target.requires_grad or target.grad_fn is not None


@settings(max_examples=6)
@given(seeds)
def test_euler_mean_flow_is_the_any_step_base_along_the_own_velocity(seed):
    """On the same points, with u put in the place of v, its residual is the any-step correction of order 1."""
    net, x = network(seed), torch.randn(8, 2).double()
    t, r = 0.5 + 0.5 * torch.rand(8).double(), 0.4 * torch.rand(8).double()
    z = torch.randn(8, 2).double()
    x_t, u = t[:, None] * z + (1 - t[:, None]) * x, z - x
    loss = TwinFlowLoss(order=1, dt=0.01, gain=float("inf"), clip=float("inf"))
    s = t - 0.01
    step = net(x_t - 0.01 * u, s, r)
    F, length = net(x_t, t, r), (t - r)[:, None]
    correction = (length * F - (length - 0.01) * step - 0.01 * u) / loss.dt
    euler = F - u - (length - 0.01) * (step - F) / 0.01
    close(correction, euler)


@settings(max_examples=5)
@given(seeds, gaussians())
def test_residuals_at_the_exact_field(seed, exact):
    """Of improved mean flows v - u, row by row: its derivative knows nothing of u's noise. MeanFlow's is v - u times
    1 - (t - r) dF/dx, F = slope (x - mean at t) - mean."""
    for name in ("improved meanflow", "meanflow"):
        torch.manual_seed(seed)
        net = Spy(exact)
        found = peers.PEERS[name](flow_share=0.0, power=0.0)(net, x := exact.sample(200)).total
        x_t, t, r, F = net.calls[-1]
        error = exact(x_t, t, t) - (x_t - x) / t[:, None]
        if name == "meanflow":
            here = x_t - (1 - t[:, None]) * exact.mean
            error = error * (1 - (t - r)[:, None] * (F + exact.mean) / here)
        close(found, error.square().mean())
