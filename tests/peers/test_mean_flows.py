"""Laws of the mean flows: each draws F onto what its page says, and they tend to one another."""

import pytest
import torch
from conftest import seeds, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from test_losses import gradients, network
from test_peers import Spy, gaussians

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.method.draws import turns_of
from tinytwinflow.peers.alpha_flow import partly
from tinytwinflow.peers.common import along, along_differences, derivative, lines, weighed

close = torch.testing.assert_close
NAMES = ("meanflow", "improved meanflow", "pixel meanflow", "euler mean flow", "alpha-flow", "soflow")


def residual(name, net, x, x_t, t, r, F, progress):
    """F - target, by the pages' formulas, derivatives by differences; in rows with r = t it is F - u."""
    u, length = (x_t - x) / t[:, None], (t - r)[:, None]
    v = net(x_t, t, t)
    if name in ("improved meanflow", "pixel meanflow"):
        u = (x_t - x) / t.clamp(min=0.05)[:, None] if name == "pixel meanflow" else u
        return F + length * along_differences(net, x_t, t, r, v, step=1e-5) - u
    if name == "meanflow":
        return F + length * along_differences(net, x_t, t, r, u, step=1e-5) - u
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
    torch.manual_seed(seed)
    out = peers.PEERS[name](power=power)(net, x, progress=progress)
    torch.manual_seed(seed)
    x = x[torch.randperm(64)]
    x_t, t, r, F = next(call for call in net.calls if call[-1].requires_grad)
    assert sum(call[-1].requires_grad for call in net.calls) == 1 and (r <= t).all()
    flow = int((r == t).sum())
    assert flow == (48 if name in ("soflow", "meanflow") else 32)  # as many at each step
    for asked, _, _, F_s in net.calls:  # no row is asked for what it does not use
        assert F_s.requires_grad or len(asked) == 64 - flow
    found = torch.autograd.grad(out.total, F, retain_graph=True)[0]
    error = residual(name, net.field, x, x_t, t, r, F.detach(), progress)
    d = error.square().mean(1, keepdim=True)
    weight = torch.where((r < t)[:, None], 0.5, 1.0) if name == "soflow" else 1.0
    close(found, weight * error / (d + 1e-3) ** power / 64, atol=1e-6, rtol=2e-4)
    close(gradients(out.total, net.field), gradients((found * F).sum(), net.field))


@settings(max_examples=15)
@given(seeds, st.floats(0.0, 1.0), st.integers(2, 9))
def test_rows_on_their_lines(seed, share, B):
    """Each row of the batch once, in random order, with its condition; the first ones have r = t, as many as their
    share, one at least where there is one; the rest t > r, of two uniform times the larger and the smaller."""
    x, share = torch.arange(2000 * 1.0).view(-1, 1), round(share, 2)
    rows = lines(x, x[:, 0].long(), share, torch.Generator().manual_seed(seed))
    assert torch.equal(rows.x.sort(0)[0], x) and not torch.equal(rows.x, x)
    assert torch.equal(rows.cond, rows.x[:, 0].long())
    assert (rows.r == rows.t)[: rows.n].all() and (rows.r < rows.t)[rows.n :].all()
    assert abs(rows.n - 2000 * share) <= 1 and rows.shares == (share, 1 - share)
    assert kstest(rows.t.numpy() ** 2, "uniform").pvalue > 1e-6
    if rows.n < 1900:
        assert kstest(1 - (1 - rows.r[rows.n :].numpy()) ** 2, "uniform").pvalue > 1e-6
    close(rows.x_t, rows.x + rows.t[:, None] * rows.u, atol=1e-3, rtol=1e-5)
    z = rows.x + rows.u
    assert abs(z.mean()) < 0.15 and abs(z.std() - 1) < 0.1
    few = lines(x[:B], None, share, torch.Generator().manual_seed(seed))
    jumps = few.jumps()
    assert (jumps is None) == (few.n == B) and (not 0 < share < 1 or 0 < few.n < B)
    if jumps:
        for value, whole in zip(jumps, (few.x_t, few.u, few.t, few.r)):
            assert torch.equal(value, whole[few.n :])
    d = torch.rand(B)
    flow, other = few.means(d)
    close(flow, share * d[: few.n].mean() if few.n else torch.zeros(()))
    close(other, (1 - share) * d[few.n :].mean() if few.n < B else torch.zeros(()))


@settings(max_examples=3)
@given(seeds, st.sampled_from([0.25, 0.5, 0.75]))
def test_a_row_alone_is_each_part_in_turn(seed, share):
    """So its expected loss is that of many rows: the mean over the turns is share x one part + (1 - share) x other."""
    found = []
    for step in range(400):
        rows = lines(torch.zeros(1, 1), None, share, torch.Generator().manual_seed(step), turns_of(seed, step))
        found.append(torch.stack(rows.means(torch.ones(1))))
    assert (torch.stack(found).mean(0) - torch.tensor([share, 1 - share])).abs().max() < 0.12
    assert {tuple(value.tolist()) for value in found} == {(1.0, 0.0), (0.0, 1.0)}


@given(seeds, st.integers(1, 6))
def test_weights_of_rows(seed, B):
    """A row's weight has no gradient."""
    d = torch.rand(B, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    for power in (0.0, 0.5, 1.0):
        values = weighed(d, power, 0.1)
        close(values.detach(), d.detach() / (d.detach() + 0.1) ** power)
        close(torch.autograd.grad(values.sum(), d)[0], 1 / (d.detach() + 0.1) ** power)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(seeds, unit)
def test_each_row_keeps_its_condition(name, seed, progress):
    """Whatever is asked for a row is asked with its own label: here the half of the line that its data lie on."""
    net, x = network(seed, 2), torch.where(torch.rand(24, 2) < 0.5, -100.0, 100.0).double()
    seen = []

    def field(x_t, t, r, cond):
        seen.append(((x_t[:, 0] > 0).long() == cond) | (t > 0.95))  # near the noise x_t tells nothing of x
        return net(x_t, t, r, cond)

    peers.PEERS[name]()(field, x, cond=(x[:, 0] > 0).long(), progress=progress)
    assert torch.cat(seen).all()


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
    net = Spy(network(seed))
    torch.manual_seed(seed)
    out = peers.AlphaFlow(power=0.0)(net, x, progress=0.0)
    ((x_t, t, _, F),) = net.calls
    torch.manual_seed(seed)
    x = x[torch.randperm(256)]
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
    assert not partly(network(seed), torch.randn(6, 2).double(), t, r, torch.randn(6, 2).double(), a).requires_grad


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
        x = exact.sample(200)
        torch.manual_seed(seed)
        found = peers.PEERS[name](flow_share=0.0, power=0.0)(net, x).total
        x_t, t, r, F = net.calls[-1]
        torch.manual_seed(seed)
        x = x[torch.randperm(200)]
        error = exact(x_t, t, t) - (x_t - x) / t[:, None]
        if name == "meanflow":
            here = x_t - (1 - t[:, None]) * exact.mean
            error = error * (1 - (t - r)[:, None] * (F + exact.mean) / here)
        close(found, error.square().mean())
