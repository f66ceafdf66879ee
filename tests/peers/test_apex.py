"""APEX: what its printed objective comes to rest at, and that the form with jumps and the gap is the twin by another
name."""

import torch
from conftest import mixtures, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from test_losses import gradients, network
from test_peers import ByShift, Gaussian, Nudged, gaussians

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.method.exact import Twins
from tinytwinflow.method.path import denoise
from tinytwinflow.peers.apex import branches

close = torch.testing.assert_close


class OfTwins:
    """Two fields as one network with a shifted condition: `real`, and at the shifted one `fake`."""

    def __init__(self, real, fake):
        self.twins = Twins(real, fake)

    def __call__(self, x, t, r, cond=None):
        sign = torch.where(cond["shift"] > 0, -1.0, 1.0).to(t)
        return self.twins(x, sign * t, sign * r, cond["cond"])


@given(seeds)
def test_negative_times_ask_the_shifted_branch(seed):
    net = ByShift(network(seed, 3))
    x, t, r = torch.randn(6, 2).double(), torch.rand(6).double(), torch.rand(6).double()
    sign, label = torch.tensor([1.0, -1.0] * 3).double(), torch.arange(6) % 3
    asked = {}
    seen = lambda x, t, r, cond: asked.update(t=t, r=r, **cond) or net(x, t, r, cond)  # noqa: E731
    close(branches(seen)(x, sign * t, sign * r, label), net.field(x, sign * t, sign * r, label))
    assert torch.equal(asked["t"], t) and torch.equal(asked["r"], r) and torch.equal(asked["cond"], label)
    assert torch.equal(asked["shift"], torch.tensor([0, 1] * 3))


# The printed objective, at t = 1, where x_t is noise alone


@settings(max_examples=10)
@given(mixtures(components=2), seeds, st.floats(0.0, 0.9))
def test_the_printed_objective_moves_the_exact_one_step_generator(mixture, seed, mixing):
    """At the exact flow map, F(z, 1) = z - x(z) in both branches, the fakes' term rests, and the mixed one moves F, in
    the mean over data, along (1 - mixing) (x(z) - E[x]): it draws every sample to the mean of the data."""
    torch.manual_seed(seed)
    z, x = torch.randn(4, len(mixture.means[0])).double(), mixture.sample(4000)
    rows, t = z.repeat_interleave(len(x), 0), torch.full((4 * len(x),), 1 - 1e-9, dtype=torch.float64)
    exact = mixture(z, torch.ones(4).double(), torch.zeros(4).double())
    free = exact.clone().requires_grad_()
    field = lambda x, t, r, cond: free.repeat_interleave(len(x) // 4, 0)  # noqa: E731
    parts = peers.APEX(mixing=mixing).as_printed(field, x.repeat(4, 1), rows, t, torch.zeros_like(t), None)
    assert parts["fake"] < 1e-12
    (found,) = torch.autograd.grad(parts["mixed"], free)
    sample, mean = z - exact, x.mean(0)
    close(found / 1e-9, 2 * (1 - mixing) * (mean - sample) / z.numel(), atol=1e-6, rtol=1e-5)


@settings(max_examples=10)
@given(mixtures(components=2), seeds, st.floats(0.0, 0.9))
def test_the_printed_objective_rests_at_the_mean(mixture, seed, mixing):
    """At F(z, 1) = z - E[x] in both branches nothing moves; so that is its fixed point, where all samples are one."""
    torch.manual_seed(seed)
    x = mixture.sample(4000)
    z = torch.randn(4, x.shape[1]).double()
    rows, t = z.repeat_interleave(len(x), 0), torch.full((4 * len(x),), 1 - 1e-9, dtype=torch.float64)
    free = (z - x.mean(0)).requires_grad_()
    field = lambda x, t, r, cond: free.repeat_interleave(len(x) // 4, 0)  # noqa: E731
    parts = peers.APEX(mixing=mixing).as_printed(field, x.repeat(4, 1), rows, t, torch.zeros_like(t), None)
    for value in parts.values():
        assert torch.autograd.grad(value, free, retain_graph=True)[0].abs().max() < 1e-8 * 1e-3


def test_training_by_the_printed_objective_makes_one_sample_of_all():
    """Both branches lines in x, near t = 1, two modes: the samples' spread goes from that of the noise to none."""
    torch.manual_seed(0)

    class Lines(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(2, 2))

        def forward(self, x, t, r, cond=None):
            a = self.a[cond["shift"]]
            return a[:, :1] * x + a[:, 1:]

    net, t = Lines(), torch.full((256,), 0.99)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(600):
        x = torch.where(torch.rand(256, 1) < 0.3, 2.0, -1.0)
        parts = peers.APEX().as_printed(branches(net), x, torch.randn(256, 1), t, 0 * t, None)
        optimizer.zero_grad()
        (parts["fake"] + parts["mixed"] / (0.99 * 0.01)).backward()
        optimizer.step()
    z = torch.randn(1000, 1)
    x = denoise(z, branches(net)(z, torch.ones(1000), torch.zeros(1000)), 1.0)
    assert x.std() < 0.1 and abs(x.mean() + 0.1) < 0.15  # the data have spread 1.37 and mean -0.1


# The form that works


@settings(max_examples=6)
@given(seeds, st.integers(2, 9))
def test_it_is_the_twin_on_a_shifted_condition(seed, B):
    """Without mixed rows it is TwinFlow's loss with no flow rows, the shifted branch at negative times."""
    net, x, teacher = ByShift(network(seed)), torch.randn(B, 2).double(), ByShift(network(seed + 1))
    torch.manual_seed(seed)
    found = peers.APEX(mixed_share=0.0, weight=0.7)(net, x, teacher=teacher).total
    loss = TwinFlowLoss(flow_share=0.0, adversarial_weight=0.7, rectify_weight=0.7)
    torch.manual_seed(seed)
    x = x[torch.randperm(B)]
    close(found, loss(branches(net), x, teacher=branches(teacher)).total)


@settings(max_examples=4)
@given(gaussians(), seeds)
def test_the_mixed_rows_rest_where_fakes_are_data_and_nowhere_else(data, seed):
    """Their mean gradient is zero at the exact velocity in both branches, not at that of a shifted Gaussian."""
    torch.manual_seed(seed)
    loss = peers.APEX(mixed_share=1.0)

    def scores(real):
        own = Nudged(real, len(data.mean))
        net = OfTwins(own, data)
        draws = torch.stack([gradients(loss(net, data.sample(400)).mixed, own.linear) for _ in range(32)])
        return draws.mean(0) / (draws.std(0) / 32**0.5)

    assert scores(data).abs().max() < 5.5
    assert scores(Gaussian(data.mean.detach() + 0.7, data.log_std.exp().item())).abs().max() > 8


@given(seeds, st.integers(1, 8), st.sampled_from([0.0, 0.25, 1.0]))
def test_the_share_of_mixed_rows(seed, B, share):
    """Rounded, one at least where there is a share and rows enough; the rest are the twin's."""
    net, asked = ByShift(network(seed)), []
    loss = peers.APEX(mixed_share=share)
    loss.mixed = lambda field, x, *rest: asked.append(len(x)) or peers.APEX.mixed(loss, field, x, *rest)
    out = loss(net, torch.randn(B, 2).double())
    n = sum(asked)
    if B > 1:
        assert n == {0.0: 0, 1.0: B}.get(share, max(1, round(0.25 * B)))
        assert ("mixed" in out._fields) == (n > 0) and ("twin" in out._fields) == (n < B)
    else:
        assert n in (0, 1) and len(out) == 2


@settings(max_examples=5)
@given(seeds)
def test_each_row_keeps_its_condition(seed):
    """Its label is the half of the line that its data lie on, in the mixed rows and in the twin's."""
    torch.manual_seed(seed)
    x, seen = torch.where(torch.rand(24, 2) < 0.5, -100.0, 100.0).double(), []

    def net(x_t, t, r, cond):
        of_data = x_t[:, 0].abs() > 8  # no fake and no noise is there
        seen.append(((x_t[:, 0] > 0).long() == cond["cond"])[of_data])
        return 0 * x_t

    peers.APEX(mixed_share=0.5)(net, x, cond=(x[:, 0] > 0).long())
    assert torch.cat(seen).all() and len(seen[0]) == len(seen[1]) > 6 and len(torch.cat(seen)) > 40


@settings(max_examples=2)
@given(seeds)
def test_a_row_alone_is_weighted_by_how_seldom_it_is_of_a_part(seed):
    """Over the turns the terms of one row are, in the mean, those of a batch of such rows."""
    net, x = ByShift(network(seed)), torch.randn(1, 2).double()

    def terms_of(B, step):
        turns, generator = torch.Generator().manual_seed(step), torch.Generator().manual_seed(7919 * step + seed)
        return peers.APEX(mixed_share=0.4)(net, x.expand(B, 2), turns=turns, generator=generator)

    with torch.no_grad():
        one = [terms_of(1, step) for step in range(1500)]
        many = [terms_of(30, step) for step in range(60)]
    for name in ("mixed", "twin"):
        few = torch.stack([getattr(out, name, torch.zeros(()).double()) for out in one])
        all_of = torch.stack([getattr(out, name) for out in many])
        error = (few.var() / len(few) + all_of.var() / len(all_of)) ** 0.5
        assert abs(few.mean() - all_of.mean()) < 5 * error


@settings(max_examples=5)
@given(seeds)
def test_printed_asks_at_r_zero_for_all_rows(seed):
    """Called as a loss it has the two printed terms, of every row, at uniform times, all asked at r = 0."""
    net, asked = ByShift(network(seed)), []
    out = peers.APEX(printed=True)(lambda *args: asked.append(args) or net(*args), torch.randn(500, 2).double())
    assert out._fields == ("total", "fake", "mixed") and len(asked) == 3
    for _, t, r, _ in asked:
        assert not r.any() and len(t) == 500 and kstest(t.numpy(), "uniform").pvalue > 1e-6
    assert sorted(int(cond["shift"].sum()) for *_, cond in asked) == [0, 500, 500]
