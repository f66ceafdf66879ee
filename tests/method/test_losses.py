"""Laws of the losses. `reference.py` is the paper, line by line; the fast loss must be the same function."""

import copy
import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import arrays, batches, inside, mixtures, seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import kstest

from tinytwinflow import GaussianMixture, Losses, TwinFlowLoss, Twins, generate, peers
from tinytwinflow.method import path, reference
from tinytwinflow.method.distances import DISTANCES
from tinytwinflow.method.draws import Draws, draw_for, split
from tinytwinflow.nets import MLP

close = torch.testing.assert_close
printed = partial(TwinFlowLoss.paper, flow_share=0.5)

orders = st.sampled_from([0, 1, 2, 3, 8])
shares = st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 1.0])
sizes = st.integers(1, 12)


class Signed(MLP):
    """An MLP that answers differently for r and -r, too; the library's own reads the sign of t alone."""

    def forward(self, x, t, r, cond=None):
        return super().forward(x, t, r, cond) + 0.3 * r[:, None]


def network(seed, classes=0):
    """A small float64 MLP with random weights everywhere, its last layer included."""
    torch.manual_seed(seed)
    net = Signed(2, width=16, depth=2, classes=classes).double()
    for layer in (net.out, net.twin_in, net.twin_out):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return net


def gradients(loss, net):
    found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, net.parameters())]
    )


def by_the_book(loss, draws, net, x, cond=None, teacher=None, null=None, original=None):
    """The total of `reference.py` for the draws of a fast loss: base, adversarial and rectify means."""
    teacher = net if teacher is None else teacher
    original = teacher if original is None else original
    d = {"squared": reference.squared, "normalised": reference.normalised}[loss.metric]
    x, cond = x[draws.rows], None if cond is None else cond[draws.rows]
    any_step, flow, adversarial, rectify = draws.slices()
    z, z_new, t, r = draws.z, draws.z_new, draws.t, draws.r
    pick = lambda rows: None if cond is None else cond[rows]  # noqa: E731
    shares = loss.shares()

    def mean(values, part):
        """Over the rows of a part; with fewer rows than parts, over as many as there are in it in the mean."""
        own, alone = draws.counts[part], len(x) >= sum(share > 0 for share in shares)
        return values.sum() / (own if alone else len(x) * shares[part])

    def velocity(rows):
        x_rows, u = x[rows], path.velocity(x[rows], z[rows])
        if loss.data_free:
            x_rows = reference.fake(net, z_new[rows], pick(rows))
            x_t = path.interpolate(x_rows, z[rows], t[rows])
            u = original(x_t, t[rows], t[rows], pick(rows)).detach()
        if loss.guidance:
            x_t = path.interpolate(x_rows, z[rows], t[rows])
            none = null.expand(len(x_t))
            guided = reference.guided_velocity(original, x_t, t[rows], u, loss.guidance, pick(rows), none)
            low, high = loss.guidance_range
            u = torch.where(((t[rows] >= low) & (t[rows] <= high))[:, None], guided, u)
        return x_rows, u

    terms = []
    if draws.counts[0]:
        x_rows, u = velocity(any_step)
        times = t[any_step], r[any_step], draws.inner
        d_jump = d if loss.jump_c is None else partial(reference.normalised, c=loss.jump_c)
        kwargs = {"dt": loss.dt, "clip": loss.clip, "gain": loss.gain, "cond": pick(any_step), "u": u, "d": d_jump}
        values = reference.base(net, teacher, x_rows, z[any_step], *times, **kwargs)
        terms.append(shares[0] / (shares[0] + shares[1]) * mean(values, 0))
    if draws.counts[1]:
        x_rows, u = velocity(flow)
        values = reference.flow_matching(net, x_rows, z[flow], t[flow], pick(flow), u, d)
        terms.append(shares[1] / (shares[0] + shares[1]) * mean(values, 1))
    if draws.counts[2]:
        rows = adversarial
        values = reference.adversarial(net, z[rows], z_new[rows], t[rows], pick(rows), d)
        terms.append(loss.adversarial_weight * mean(values, 2))
    if draws.counts[3]:
        rows = rectify
        values = reference.rectify(net, z[rows], z_new[rows], t[rows], pick(rows), loss.rectify_clip, d)
        terms.append(loss.rectify_weight * mean(values, 3))
    return sum(terms)


settings_of_a_loss = st.fixed_dictionaries(
    {
        "order": orders,
        "share": shares,
        "one_step_share": st.sampled_from([0.0, 0.5]),
        "flow_share": st.sampled_from([0.0, 0.5, 1.0]),
        "metric": st.sampled_from(list(DISTANCES)),
        "jump_c": st.sampled_from([None, 0.1]),
        "adversarial_weight": st.sampled_from([0.5, 1.0]),
        "rectify_weight": st.sampled_from([0.5, 1.0]),
        "rectify_clip": st.sampled_from([None, 0.1]),
        "guidance": st.sampled_from([0.0, 0.7]),
        "guidance_range": st.sampled_from([(0.0, 1.0), (0.3, 0.8)]),
        "even_inner": st.booleans(),
        "data_free": st.booleans(),
        "gain": st.sampled_from([math.inf, 2.0]),
        "clip": st.sampled_from([0.3, 100.0]),
        "times": st.sampled_from([(1.0, 1.0), (0.5, 2.0)]),
    }
)


@settings(max_examples=120)
@given(settings_of_a_loss, sizes, seeds, st.booleans(), st.booleans())
def test_fast_loss_equals_the_reference_in_value_and_gradient(kwargs, B, seed, own_teacher, own_original):
    """For every split, order, metric and guidance: the same total and the same gradient."""
    net, teacher, original = network(seed, 3), network(seed + 1, 3), network(seed + 2, 3)
    x, cond = torch.randn(B, 2).double(), torch.randint(3, (B,))
    loss, null = printed(**kwargs), torch.tensor([3])
    draws = draw_for(loss, x)
    others = {"teacher": None if own_teacher else teacher, "null": null, "original": None if own_original else original}
    fast = loss.evaluate(draws, net, x, cond, **others)
    slow = by_the_book(loss, draws, net, x, cond, **others)
    close(fast.total, slow)
    close(fast.total.detach(), fast.base + fast.adversarial + fast.rectify)
    close(gradients(fast.total, net), gradients(slow, net))


@given(settings_of_a_loss, sizes, seeds)
def test_only_the_network_gets_gradient(kwargs, B, seed):
    """Teacher and original are evaluated without gradient, and nothing flows back into the data."""
    net, teacher, original = network(seed, 3), network(seed + 1, 3), network(seed + 2, 3)
    x = torch.randn(B, 2).double().requires_grad_()
    out = printed(**kwargs)(net, x, torch.randint(3, (B,)), teacher, torch.tensor([3]), original)
    out.total.backward()
    assert all(p.grad is None for other in (teacher, original) for p in other.parameters())
    assert x.grad is None
    assert not any(term.requires_grad for term in out[1:])


@given(settings_of_a_loss, sizes, seeds)
def test_no_network_is_called_for_no_rows(kwargs, B, seed):
    net, teacher, original = network(seed, 3), network(seed + 1, 3), network(seed + 2, 3)
    x, cond, loss = torch.randn(B, 2).double(), torch.randint(3, (B,)), printed(**kwargs)

    def asked(field):
        def answer(x, t, r, cond):
            assert len(x) == len(t) == len(r) == len(cond) > 0
            return field(x, t, r, cond)

        return answer

    loss(asked(net), x, cond, asked(teacher), torch.tensor([3]), asked(original))


@settings(max_examples=20)
@given(seeds, st.floats(0.6, 0.9), st.floats(0.02, 0.2))
def test_a_jump_whose_targets_disagree_goes_to_most_of_them_and_not_between(seed, share, c):
    """Targets 1 for a share of the noise and -1 for the rest: a squared error is at rest at their mean; the normalised
    metric where (1 - F) / |(1 - F, c)| = (1 - share) / share, near 1."""
    border, x = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share)), torch.zeros(4000, 1).double()

    def teacher(x_t, t, r, cond=None):
        return torch.where(x_t > border, 1.0, -1.0).double()

    def slope(at, jump_c):
        F, generator = torch.tensor(at, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(seed)
        kind = {"order": 1, "share": 0.0, "flow_share": 0.0, "one_step_share": 1.0, "dt": 1e-4, "gain": 1.0}
        loss = TwinFlowLoss(**kind, jump_c=jump_c)
        loss(lambda x_t, t, r, cond: F.expand_as(x_t), x, teacher=teacher, generator=generator).total.backward()
        return F.grad.item()

    k = (1 - share) / share
    assert brentq(slope, -1, 1, args=(None,)) == pytest.approx(2 * share - 1, abs=0.08)  # of 4000 signs, 5.5 errors
    assert brentq(slope, -1, 1, args=(c,)) == pytest.approx(1 - c * k / math.sqrt(1 - k**2), abs=0.1)


@given(st.integers(1, 40), seeds, shares, st.sampled_from([0.0, 0.3, 1.0]), orders)
def test_parts_add_up_to_the_batch(B, seed, share, flow_share, order):
    """For every batch size and share parts sum to B, each sample is in one of them, and parts have rows if they can."""
    loss = printed(order=order, share=share, flow_share=flow_share)
    generator = torch.Generator().manual_seed(seed)
    draws = draw_for(loss, torch.zeros(B, 2), generator)
    assert sum(draws.counts) == B and min(draws.counts) >= 0
    assert sorted(draws.rows.tolist()) == list(range(B))
    live = [s > 0 for s in loss.shares()]
    assert B < sum(live) or [n > 0 for n in draws.counts] == live


@given(settings_of_a_loss, st.integers(4, 61), seeds)
def test_a_batch_of_any_size_has_the_gradient_of_a_large_batch_in_expectation(kwargs, B, seed):
    """A batch of 1 is in one part, with the part's share as probability (test_draws). The mean over the parts of its
    gradient is that of a batch of 4 to 61, if the random numbers of a part are those of each of its rows.

    Exact, so that no number of samples is too small and nothing but the weights of the parts can make it fail.
    """
    net, loss, x = network(seed, 3), printed(**kwargs), torch.randn(1, 2).double()
    given = {"cond": torch.randint(3, (1,)), "null": torch.tensor([3])}
    counts, divisors = split(B, loss.shares())
    alone = [printed(**{**kwargs, "share": float(part > 1), "flow_share": float(part == 1)}) for part in range(4)]
    draws = [draw_for(one, x.expand(2, 2)) for one in alone]
    only, mean = [], 0
    for part, (share, drawn) in enumerate(zip(loss.shares(), draws)):
        row = slice(part == 3, (part == 3) + 1)  # the second of two rows rectifies
        numbers = [torch.zeros(1).long(), *(each[row] for each in (drawn.z, drawn.z_new, drawn.t, drawn.r))]
        of_one = tuple(int(part == i) for i in range(4)), loss.shares()
        only.append(Draws(*of_one, *numbers, [times[:1] for times in drawn.inner]))
        if share:
            mean = mean + share * gradients(loss.evaluate(only[part], net, x, **given).total, net)
    repeated = {
        name: torch.cat([getattr(own, name).repeat_interleave(n, 0) for n, own in zip(counts, only)])
        for name in ("rows", "z", "z_new", "t", "r")
    }
    inner = [times.repeat(counts[0]) for times in only[0].inner]
    large = {name: value.expand(B) for name, value in given.items()}
    draws = Draws(counts, divisors, inner=inner, **repeated)
    close(mean, gradients(loss.evaluate(draws, net, x.expand(B, 2), **large).total, net))


@given(settings_of_a_loss, st.integers(2, 12), seeds)
def test_order_of_the_batch_does_not_matter(kwargs, B, seed):
    """Permuting samples and labels together with the rows that take them leaves the loss as it is."""
    net, loss = network(seed, 3), printed(**kwargs)
    x, cond, order = torch.randn(B, 2).double(), torch.randint(3, (B,)), torch.randperm(B)
    draws = draw_for(loss, x)
    before = loss.evaluate(draws, net, x, cond, null=torch.tensor([3])).total
    moved = copy.copy(draws)
    moved.rows = order.argsort()[draws.rows]
    close(loss.evaluate(moved, net, x[order], cond[order], null=torch.tensor([3])).total, before)


@given(seeds, sizes)
def test_order_zero_is_flow_matching(seed, B):
    net = network(seed)
    x, loss = torch.randn(B, 2).double(), printed(order=0, share=0.0)
    draws = draw_for(loss, x)
    x = x[draws.rows]
    x_t = draws.t[:, None] * draws.z + (1 - draws.t[:, None]) * x
    close(loss.evaluate(draws, net, x[draws.rows.argsort()]).total,
          (net(x_t, draws.t, draws.t) - (draws.z - x)).square().mean())  # fmt: skip
    assert torch.equal(draws.t, draws.r)


@given(orders, seeds)
def test_times_of_the_any_step_rows_fall_from_t_to_r(order, seed):
    assume(order > 0)
    loss = printed(order=order, share=0.0, flow_share=0.0)
    draws = draw_for(loss, torch.zeros(50, 1).double(), torch.Generator().manual_seed(seed))
    path_of_times = [draws.t, draws.t - loss.dt, *draws.inner, draws.r]
    assert len(draws.inner) == order - 1
    assert all((a >= b - 1e-12).all() for a, b in zip(path_of_times[:-1], path_of_times[1:]))
    assert (draws.r >= -1e-12).all() and (draws.t <= 1).all()


@settings(max_examples=10)
@given(st.floats(0.5, 3), st.floats(0.5, 3), seeds)
def test_times_follow_the_kumaraswamy_law(a, b, seed):
    """P(t <= s) = 1 - (1 - s^a)^b in the base rows; the twin parts draw t' uniformly (Kolmogorov-Smirnov)."""
    draws = draw_for(
        printed(times=(a, b), share=0.5, flow_share=1.0),
        torch.zeros(4000, 1).double(),
        torch.Generator().manual_seed(seed),
    )
    t = draws.t.numpy()
    assert kstest(t[:2000], lambda s: 1 - (1 - s**a) ** b).statistic < 0.06
    assert kstest(t[2000:], lambda s: s).statistic < 0.06


@given(st.integers(1, 6), seeds)
def test_even_inner_times_cut_the_jump_in_equal_parts(order, seed):
    loss = printed(order=order, share=0.0, flow_share=0.0, even_inner=True)
    draws = draw_for(loss, torch.zeros(5, 1).double(), torch.Generator().manual_seed(seed))
    steps = torch.stack([draws.t - loss.dt, *draws.inner, draws.r]).diff(dim=0)
    close(steps, steps.mean(0).expand_as(steps))


@given(st.sampled_from([0.0, 1.0]), seeds)
def test_one_step_rows_are_the_jump_from_noise_to_data(share, seed):
    """All any-step rows sit at t = 1, r = 0 when the share is 1, none (almost surely) when it is 0."""
    loss = printed(share=0.0, flow_share=0.5, one_step_share=share)
    draws = draw_for(loss, torch.zeros(40, 1).double(), torch.Generator().manual_seed(seed))
    rows = draws.slices()[0]
    assert ((draws.t[rows] == 1) & (draws.r[rows] == 0)).double().mean() == share
    assert not (draws.r[draws.slices()[1]] == 0).any()


@given(seeds, st.floats(1, 50))
def test_gain_bounds_the_weight_of_a_jump_and_keeps_its_fixed_point(seed, gain):
    """Without noise and clip the correction is the error of F times min((t - r) / dt, gain)."""
    net = network(seed)
    x = torch.randn(6, 2).double()
    kwargs = {"share": 0.0, "flow_share": 0.0, "clip": 1e9}
    loss, paper = printed(gain=gain, **kwargs), printed(**kwargs)
    draws = draw_for(loss, x)
    u, x_t = (draws.z - x[draws.rows]), path.interpolate(x[draws.rows], draws.z, draws.t)
    F = net(x_t, draws.t, draws.r).detach()
    rows = draws.slices()[0]
    with torch.no_grad():
        bounded = loss._any_step_correction(draws, rows, F, x_t, u, None, net)
        unbounded = paper._any_step_correction(draws, rows, F, x_t, u, None, net)
    weight = (draws.t - draws.r) / loss.dt
    close(bounded / weight.clamp(max=gain).clamp(min=1)[:, None], unbounded / weight.clamp(min=1)[:, None])


@given(arrays((4, 2)), arrays((4, 2)), st.sampled_from([1.0, 0.4, 8.0]))
def test_the_printed_base_loss_by_hand(x, z, size):
    """Order 1 with F = a x_t + b t + c r: dt u and one jump; rows with t - r < dt are flow matching, that with
    t - r = dt is none. What the paper fixes is the default: dt = 0.01, clip 1, squared error."""
    t, r = torch.tensor([0.75, 0.75, 0.5, 0.5]).double(), torch.tensor([0.25, 0.5, 0.375, 0.5]).double()

    def F(x, t, r, cond=None):
        return size * x + (2 * t - 3 * r)[:, None]

    u, dt, column = z - x, 0.25, lambda a: a[:, None]  # noqa: E731
    x_t = column(t) * z + column(1 - t) * x
    x_s = x_t - dt * u
    jump = column(t - dt - r) * F(x_s, t - dt, r)
    correction = (column(t - r) * F(x_t, t, r) - jump) / dt - u
    wanted = correction.clamp(-2, 2).square().mean(1)
    wanted[2:] = (F(x_t, t, t) - u)[2:].square().mean(1)
    close(reference.base(F, F, x, z, t, r, [], dt, 2.0), wanted)
    close(reference.flow_matching(F, x, z, t), (F(x_t, t, t) - u).square().mean(1))
    every = reference.base(F, F, x, z, t, r, [], 0.01, 1.0, math.inf, None, u, reference.squared)
    close(reference.base(F, F, x, z, t, r, []), every)


# The base loss and the exact field


def expected_jump(mixture, x_t, t, r, inner, dt):
    """Mean over the data behind x_t of Eq. 1's right side with exact jumps, by Gauss-Hermite quadrature.

    Given x_t and the component, x is Gaussian, so u = (x_t - x) / t is too.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    m, S = mixture.means[:, 0], mixture.covs[:, 0, 0]
    C = (1 - t) ** 2 * S + t**2
    mean = m + (1 - t) * S / C * (x_t - (1 - t) * m)
    std = (S - ((1 - t) * S) ** 2 / C).sqrt()
    p = (mixture.weights.log() - 0.5 * (x_t - (1 - t) * m) ** 2 / C - 0.5 * C.log()).softmax(0)
    x = (mean[:, None] + std[:, None] * nodes).flatten()[:, None]
    probability = (p[:, None] * weights).flatten()[:, None]
    times = [torch.full((len(x),), s).double() for s in (t, r, *inner)]
    u = (x_t - x) / t
    jumps = reference.any_step_jump(mixture, torch.full_like(x, x_t), u, times[0], times[1], times[2:], dt)
    return (probability * jumps).sum()


@settings(max_examples=12)
@given(
    mixtures(dim=1, components=2), st.floats(-1.5, 1.5), st.floats(0.5, 0.95), st.floats(0.0, 0.3), st.integers(1, 3)
)
def test_exact_field_is_the_fixed_point_of_the_base_loss(mixture, x_t, t, r, order):
    """With F^- exact, Eq. 1's right side is (t - r) F up to O(dt^2), so the target of F is off by O(dt):
    halving dt divides the error of the jump by 4. True for any order, because exact jumps compose.
    The components are near each other: between far ones the flow tears, and only a tiny dt would be small."""
    mixture = GaussianMixture(mixture.means / 2, mixture.covs, mixture.weights)
    inner = [t - 0.1 - (t - 0.1 - r) * i / order for i in range(1, order)]
    full = lambda s: torch.tensor([s]).double()  # noqa: E731
    exact = (t - r) * mixture(full(x_t)[:, None], full(t), full(r)).item()
    errors = [abs(expected_jump(mixture, x_t, t, r, inner, dt).item() - exact) for dt in (0.02, 0.01)]
    assert errors[0] < 0.02
    assume(errors[0] > 1e-4)
    assert 3 < errors[0] / errors[1] < 5.2


@settings(max_examples=10)
@given(mixtures(dim=1, components=2), st.floats(-1.5, 1.5), st.floats(0.3, 0.95), st.floats(0.0, 0.2))
def test_base_target_averages_to_the_exact_field(mixture, x_t, t, r):
    """The regression form: target = F^- - clip(...), with F^- exact and no clip, averages to F + O(dt): what is
    left of the correction halves with dt, whatever the mixture's own constant."""
    assume(t - r > 0.1)
    exact = (t - r) * mixture(*(torch.tensor(a).double() for a in ([[x_t]], [t], [r]))).item()
    left = [abs(exact - expected_jump(mixture, x_t, t, r, [], dt).item()) / dt for dt in (0.005, 0.0025)]
    assert left[1] < 0.6 * left[0] + 1e-3


# The twin losses


@settings(max_examples=15)
@given(mixtures(), arrays(4, inside), seeds)
def test_real_and_fake_velocities_agree_exactly_when_the_distributions_do(mixture, t, seed):
    """dv = 0 everywhere if fake = real; if not, dv = -(t / (1 - t)) (s_real - s_fake) and is not zero."""
    x_t = torch.randn(4, mixture.means.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    from tinytwinflow import gap

    assert gap(Twins(mixture, mixture), x_t, t).abs().max() < 1e-12
    fake = GaussianMixture(mixture.means + 0.5, mixture.covs, mixture.weights)
    dv = gap(Twins(mixture, fake), x_t, t)
    scores = mixture.score(x_t, t) - fake.score(x_t, t)
    close(dv, -(t / (1 - t))[:, None] * scores)
    close(reference.score_gap(Twins(mixture, fake), x_t, t), scores)
    assert dv.abs().max() > 1e-6


@given(seeds, sizes, st.sampled_from([None, 0.05]))
def test_rectification_gradient_is_minus_the_gap_times_the_jacobian(seed, B, clip):
    """d L_rectify / d theta = -(2 / D) mean of dv . dF(z, 1, 0) / d theta: descent moves F along dv."""
    net, loss = network(seed), printed(share=1.0, adversarial_weight=0.0, rectify_clip=clip)
    x = torch.randn(2 * B, 2).double()
    draws = draw_for(loss, x)
    rows = draws.slices()[3]
    z, t, one = draws.z[rows], draws.t[rows], torch.ones(B).double()
    x_t = path.interpolate(generate(net, z), draws.z_new[rows], t).detach()
    dv = (net(x_t, t, t) - net(x_t, -t, -t)).detach()
    dv = dv if clip is None else dv.clamp(-clip, clip)
    inner_product = (dv * net(z, one, 0 * one)).sum() / B
    close(gradients(loss.evaluate(draws, net, x).total, net), -gradients(inner_product, net))


@given(seeds, sizes, st.sampled_from([None, 0.05]), st.floats(0.1, 2))
def test_gap_is_the_mean_square_of_dv(seed, B, clip, weight):
    """By hand, at the noised fakes of the rectify rows, whatever its weight; 0 without such rows."""
    net, loss = network(seed), printed(share=1.0, rectify_weight=weight, rectify_clip=clip)
    x = torch.randn(2 * B, 2).double()
    draws = draw_for(loss, x)
    z, z_new, t = (each[draws.slices()[3]] for each in (draws.z, draws.z_new, draws.t))
    x_t = t[:, None] * z_new + (1 - t[:, None]) * (z - net(z, torch.ones(B).double(), torch.zeros(B).double()))
    dv = net(x_t, t, t) - net(x_t, -t, -t)
    close(reference.score_gap(net, x_t, t), -dv * ((1 - t) / t)[:, None])
    dv = dv if clip is None else dv.clamp(-clip, clip)
    out = loss.evaluate(draws, net, x)
    close(out.gap, dv.square().mean().detach())
    close(out.rectify, weight * out.gap)
    assert printed(share=0.0)(net, x).gap == 0


@given(seeds, st.integers(1, 8), st.booleans())
def test_what_original_keeps_stays_its_own(seed, B, acts):
    """An original that answers data-free training from a tensor that it keeps finds it unchanged, guided or not."""
    net, kept = network(seed, 3), torch.randn(2 * B, 2).double()
    before = kept.clone()
    loss = printed(data_free=True, guidance=0.5, share=0.0, guidance_range=(0.0, 1.0 if acts else 0.0))
    out = loss(net, torch.zeros(B, 2).double(), torch.zeros(B).long(), original=lambda x, t, r, cond: kept[: len(x)],
               null=torch.tensor([3]))  # fmt: skip
    assert torch.equal(kept, before) and out.total.isfinite()


@settings(max_examples=25)
@given(st.floats(0.3, 2), st.floats(0.3, 2), st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 0.9))
def test_rectification_is_the_gradient_of_kl_between_gaussians(a, real_scale, b, real_mean, t):
    """Eqs. 3-8, and the sign of dv. The generator x = b + a z makes N(b, a^2); at time t,

        d KL(p_fake,t || p_real,t) / d(a, b) = E[ -dv (1 - t)^2 / t . d(z - x)... ]

    that is, with F(z, 1, 0) = z - x, the gradient of -(1 - t)^2 / t E[dv F] equals that of the closed-form
    KL between N((1 - t) b, (1 - t)^2 a^2 + t^2) and the real marginal.
    """
    theta = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    real = GaussianMixture([[real_mean]], [[[real_scale**2]]])
    fake = GaussianMixture([[b]], [[[a**2]]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    grid = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    weight = torch.from_numpy(np.outer(weights, weights).flatten() / weights.sum() ** 2)
    z, z_new = grid[:, :1], grid[:, 1:]
    times = torch.full((len(z),), t).double()

    def net(x, t, r, cond=None):
        """Exact twin velocities, and the generator at (1, 0)."""
        return z - (theta[1] + theta[0] * z) if (t == 1).all() else Twins(real, fake)(x, t, r)

    # reference.rectify is d(F, sg(F + dv)), whose gradient is -2 dv dF for one element per sample
    loss = (weight * reference.rectify(net, z, z_new, times)).sum() * (1 - t) ** 2 / t / 2
    (gradient,) = torch.autograd.grad(loss, theta)

    fake_var, real_var = (1 - t) ** 2 * theta[0] ** 2 + t**2, (1 - t) ** 2 * real_scale**2 + t**2
    shift = (1 - t) * (theta[1] - real_mean)
    kl = 0.5 * (fake_var / real_var + shift**2 / real_var - 1 - torch.log(fake_var / real_var))
    (kl_gradient,) = torch.autograd.grad(kl, theta)
    close(gradient, kl_gradient)


@given(seeds, sizes)
def test_adversarial_loss_gives_the_generator_no_gradient(seed, B):
    """A network whose two halves of time have weights of their own: only the negative half may move."""
    generator_net, twin_net = network(seed), network(seed + 1)

    def net(x, t, r, cond=None):
        return torch.where((t < 0)[:, None], twin_net(x, t, r), generator_net(x, t, r))

    loss = printed(share=1.0, rectify_weight=0.0)
    loss(net, torch.randn(2 * B, 2).double()).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in generator_net.parameters())
    assert any(p.grad.any() for p in twin_net.parameters())


@given(seeds, sizes)
def test_rectification_gives_the_twin_no_gradient(seed, B):
    """The gap is a constant: neither velocity it is made of may move to make it small."""
    generator_net, velocity_net = network(seed), network(seed + 1)

    def net(x, t, r, cond=None):
        one_step = ((t == 1) & (r == 0))[:, None]
        return torch.where(one_step, generator_net(x, t, r), velocity_net(x, t, r))

    loss = printed(share=1.0, adversarial_weight=0.0)
    loss(net, torch.randn(2 * B, 2).double()).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in velocity_net.parameters())
    assert any(p.grad.any() for p in generator_net.parameters())


@settings(max_examples=5)
@given(mixtures(dim=2))
def test_exact_twin_velocity_minimises_the_adversarial_loss(mixture):
    """With fakes from a mixture, its velocity at -t is the minimum of Eq. 2: a shift in any direction costs."""
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_fake = mixture.sample(4000, torch.Generator().manual_seed(1))
    t = torch.rand(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(shift, sign=1.0):
        def net(x, time, r, cond=None):
            if (time == 1).all():
                return z - x_fake
            assert (time <= 0).all()
            return sign * mixture.velocity(x, -time) + shift

        return reference.adversarial(net, z, z.flip(0), t).mean()

    assert value(0.0) < min(value(0.3), value(-0.3), value(0.0, sign=-1.0))


@given(arrays((3, 2)), arrays((3, 2)))
def test_metrics_equal_the_reference(a, b):
    close(DISTANCES["squared"](a, b), reference.squared(a, b))
    close(DISTANCES["normalised"](a, b), reference.normalised(a, b))


def test_normalised_metric_has_a_step_that_does_not_vanish():
    """Its gradient has the length of a root-mean-square error's, whatever the error: 2 / sqrt(D) per sample."""
    for size in (1e-2, 1.0, 10.0):
        a = torch.full((1, 4), size, dtype=torch.float64, requires_grad=True)
        DISTANCES["normalised"](a, torch.zeros(1, 4).double()).sum().backward()
        assert math.isclose(a.grad.norm(), 2 / 4**0.5, rel_tol=1e-2)


@given(batches(1, dims=(3, 2, 2)), seeds)
def test_images_and_dicts_of_conditions_fit(case, seed):
    """Any (B, *D) and a dict of conditions: the same rules, the same numbers of rows."""
    (x,), _ = case
    cond = {"a": torch.randn(len(x), 2), "b": torch.arange(len(x))}
    null = {"a": torch.zeros(1, 2), "b": torch.zeros(1, dtype=torch.long)}

    def net(x, t, r, cond):
        assert len(cond["a"]) == len(cond["b"]) == len(t) == len(r) == len(x)
        return 0.1 * x + cond["a"].sum(1).view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)

    out = printed(guidance=0.5)(net, x, cond, null=null, generator=torch.Generator().manual_seed(seed))
    assert out.total.isfinite()


@given(seeds, st.integers(1, 8))
def test_a_null_condition_of_its_own_for_each_sample_follows_its_sample(seed, B):
    """null of leading dimension 1 repeated by hand is the same null; one that differs goes with its row."""
    net, loss = network(seed, 3), printed(guidance=0.7)
    x, cond = torch.randn(B, 2).double(), torch.randint(3, (B,))
    draws = draw_for(loss, x)
    one, each = (
        loss.evaluate(draws, net, x, cond, null=null).total for null in (torch.tensor([3]), torch.full((B,), 3))
    )
    close(one, each)
    close(loss.evaluate(draws, net, x, cond, null=cond).total, printed().evaluate(draws, net, x, cond).total)


@given(seeds, sizes)
def test_data_free_training_never_reads_the_data(seed, B):
    net, original = network(seed), network(seed + 1)
    loss = printed(data_free=True)
    draws = draw_for(loss, torch.zeros(B, 2).double())
    values = [
        loss.evaluate(draws, net, x.double(), original=original).total
        for x in (torch.zeros(B, 2), torch.full((B, 2), float("nan")))
    ]
    close(*values)


def test_the_settings_are_those_of_the_table_here_and_in_the_paper():
    """Defaults are what is recommended; `paper` is what is printed, with what is changed; both check what they get."""
    same = {"share": 1 / 3, "dt": 0.01, "times": (1.0, 1.0), "metric": "squared", "rectify_clip": None, "guidance": 0.0}
    same |= {"jump_c": None, "guidance_range": (0.0, 1.0), "data_free": False, "base": None}
    here = {"order": 8, "flow_share": 0.5, "one_step_share": 0.3, "even_inner": True, "gain": 4.0, "clip": 10.0}
    here |= {"adversarial_weight": 0.3, "rectify_weight": 0.3}
    paper = {"order": 2, "flow_share": 0.05, "one_step_share": 0.0, "even_inner": False, "gain": math.inf, "clip": 1.0}
    paper |= {"adversarial_weight": 1.0, "rectify_weight": 1.0}
    assert dataclasses.asdict(TwinFlowLoss()) == same | here
    assert dataclasses.asdict(TwinFlowLoss.paper()) == same | paper
    assert dataclasses.asdict(TwinFlowLoss.paper(order=3, clip=2.0)) == same | paper | {"order": 3, "clip": 2.0}
    number = TwinFlowLoss(order=np.int64(3), share=torch.tensor(0.5), rectify_clip=np.float32(2), clip=math.inf)
    assert (number.order, number.share, number.rectify_clip) == (3, 0.5, 2.0) and type(number.share) is float
    assert TwinFlowLoss(share=0.25, flow_share=0.2).shares() == pytest.approx((0.6, 0.15, 0.125, 0.125))
    assert TwinFlowLoss(share=0.25, order=0).shares() == pytest.approx((0.0, 0.75, 0.125, 0.125))
    for edge in ({"dt": 1.0}, {"dt": 0.0}, {"share": 1.01}, {"guidance_range": (0.5, 1.5)}, {"order": True}):
        with pytest.raises(ValueError, match="must"):
            TwinFlowLoss(**edge)
    TwinFlowLoss(share=1.0, flow_share=1.0, one_step_share=1.0, guidance_range=(0.5, 0.5), order=0)


def test_network_calls_of_one_loss():
    """One forward with gradient for the batch; without: 2 jumps of the any-step rows, one pass for the
    fakes, one for both velocities of the gap, one for both guidance velocities."""
    calls = []

    def net(x, t, r, cond=None):
        calls.append((len(x), torch.is_grad_enabled()))
        return 0.1 * x

    loss = printed(order=2, share=1 / 3, guidance=0.5)
    loss(net, torch.randn(96, 2), torch.zeros(96, 1), null=torch.zeros(1, 1))
    assert [n for n, grad in calls if grad] == [96]
    assert sorted(n for n, grad in calls if not grad) == sorted([32, 32, 16, 32, 128])


def test_wrong_use_says_what_is_allowed():
    for kwargs, message in [
        ({"order": -1}, "order must be"),
        ({"order": 1.5}, "order must be"),
        ({"share": 1.2}, r"share must lie in \[0, 1\]"),
        ({"flow_share": -0.1}, "flow_share must lie"),
        ({"one_step_share": 2}, "one_step_share must lie"),
        ({"dt": 0.0}, r"dt must lie in \(0, 1\)"),
        ({"metric": "lpips"}, "metric must be one of squared, normalised, got 'lpips'"),
        ({"rectify_weight": -1.0}, "rectify_weight must be"),
        ({"guidance": float("inf")}, "guidance must be"),
        ({"guidance_range": (0.9, 0.1)}, "guidance_range must be"),
        ({"guidance_range": 0.5}, r"guidance_range must be 2 numbers in \[0, 1\], got 0.5"),
        ({"times": (0.0, 1.0)}, r"times must be 2 numbers in \(0, inf\), got \(0.0, 1.0\)"),
        ({"times": 1.0}, "times must be 2 numbers in .* got 1.0"),
        ({"times": (1.0, 1.0, 1.0)}, "times must be 2 numbers"),
        ({"gain": 0.0}, "gain must be"),
        ({"clip": 0.0}, "clip must be"),
        ({"rectify_clip": 0.0}, "rectify_clip must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            printed(**kwargs)
    net = network(0)
    for x in (torch.zeros(3, dtype=torch.long), torch.zeros(3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="x must be a floating-point batch"):
            printed()(net, x)
    for one in ({}, {"cond": torch.zeros(3)}, {"null": torch.zeros(1)}):
        with pytest.raises(ValueError, match="guidance > 0 needs cond and null"):
            printed(guidance=1.0)(net, torch.zeros(3, 2).double(), **one)
    with pytest.raises(ValueError, match="data_free needs original"):
        printed(data_free=True)(net, torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match="cond has 2 rows, x has 3"):
        printed()(net, torch.zeros(3, 2).double(), torch.zeros(2))
    x, label = torch.zeros(3, 2).double(), torch.zeros(3)
    for cond, null in ((label, torch.zeros(2)), ({"a": label}, {"a": torch.zeros(2)})):
        with pytest.raises(ValueError, match=r"null has shape \(2,\), but x has 3 rows"):
            printed(guidance=1.0)(net, x, cond, null=null)

    def narrow(x, t, r, cond):
        return x[:, :1]

    for name, loss, fields in [
        ("net", printed(order=0, share=0.0), {}),
        ("teacher", printed(flow_share=0.0), {"teacher": narrow}),
        ("original", printed(data_free=True), {"original": narrow}),
        ("original", printed(guidance=1.0), {"original": narrow, "cond": label, "null": label[:1]}),
    ]:
        with pytest.raises(ValueError, match=rf"{name}'s answer and x must have the same shape, got \(\d+, 1\)"):
            loss(narrow if name == "net" else lambda x, t, r, cond=None: net(x, t, r), x, **fields)


class Base:
    """A base that keeps what it is given; its loss is the mean over its rows of the answers' sums."""

    helpers, mode = {"teacher": "average"}, "any"

    def __init__(self):
        self.given = []

    def __call__(self, net, x, cond=None, **more):
        self.given.append((x, cond, more))
        return peers.common.terms(flow=net(x, torch.ones(len(x)).double(), x[:, 0] * 0, cond).sum(1).mean())


class Kept(TwinFlowLoss):
    """TwinFlow that keeps what its twin parts are given; `answer`, if there is one, is its value."""

    kept, answer = [], None

    def evaluate(self, *given):
        self.kept.append(given)
        return super().evaluate(*given) if self.answer is None else self.answer(given[0])


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(Kept, "kept", [])
    return Kept.kept


@settings(max_examples=25)
@given(st.integers(2, 12), seeds, st.sampled_from([0.2, 1 / 3, 0.5, 0.8]), st.sampled_from([0.5, 1.0]))
def test_a_base_has_its_rows_and_the_twin_the_others(B, seed, share, weight):
    """Each row goes to one of them with its condition; the parts are the base's own loss and TwinFlow's of share 1."""
    Kept.kept.clear()
    net, base, x = network(seed, 3), Base(), torch.randn(B, 2).double()
    cond = (x[:, 0] > 0).long() + (x[:, 1] > 0)
    loss = Kept(base=base, share=share, adversarial_weight=weight, rectify_weight=0.7)
    out = loss(net, x, cond, generator=torch.Generator().manual_seed(seed))
    ((x_base, cond_base, _),), ((draws, _, x_twin, cond_twin, teacher, *_),) = base.given, Kept.kept
    assert len(x_base) == max(1, min(B - 1, len(x_base))) and abs(len(x_base) - (1 - share) * B) < 1
    rows = lambda x, cond: sorted(map(tuple, torch.cat([x, cond[:, None]], 1).tolist()))  # noqa: E731
    assert rows(torch.cat([x_base, x_twin]), torch.cat([cond_base, cond_twin])) == rows(x, cond)
    alone = TwinFlowLoss(share=1.0, adversarial_weight=weight, rectify_weight=0.7)
    twin, own = alone.evaluate(draws, net, x_twin, cond_twin), Base()(net, x_base, cond_base)
    close(torch.stack(out), torch.stack([own.total + twin.total, own.total, *twin[2:]]))
    close(gradients(out.total, net), gradients(own.total + twin.total, net))
    assert not any(term.requires_grad for term in out[1:]) and teacher is net


@pytest.mark.parametrize("seed", range(3))
def test_which_rows_a_base_has_is_chance(seed):
    """Of the generator alone: else the twin would never see the rows that a batch ends with."""
    found = []
    for _ in range(2):
        base, generator = Base(), torch.Generator().manual_seed(seed)
        for _ in range(40):
            TwinFlowLoss(base=base, share=0.5)(network(0), torch.arange(8.0).double().view(4, 2), generator=generator)
        found.append([x[:, 0].tolist() for x, *_ in base.given])
    assert found[0] == found[1] and {x for rows in found[0] for x in rows} == {0.0, 2.0, 4.0, 6.0}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_a_share_no_twin_and_without_a_rest_no_base(share, kept):
    net, x, base = network(0), torch.randn(5, 2).double(), Base()
    out = Kept(base=base, share=share)(net, x, generator=torch.Generator().manual_seed(0))
    if share:
        assert not base.given and out.base == 0 and len(kept) == 1
        close(out.total, out.adversarial + out.rectify)
    else:
        assert not kept and out.adversarial == out.rectify == out.gap == 0
        close(out.total, Base()(net, x).total)
        close(gradients(out.total, net), gradients(Base()(net, x).total, net))


@pytest.mark.parametrize("share", [0.2, 1 / 3])
@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_on_a_base_a_batch_of_any_size_has_each_part_once_in_expectation(B, share, kept, monkeypatch):
    """Over all coins, taken evenly: the base's mean weighs 1, and so does each of the twin's parts over its divisor."""
    coins = []
    monkeypatch.setattr("tinytwinflow.method.draws.coin", lambda turns=None: coins.pop(0))
    total = torch.zeros(4).double()

    def answer(draws):
        parts = [torch.tensor(draws.counts[i] / draws.divisors[i]).double() for i in (2, 3)]
        return Losses(sum(parts), torch.zeros(()), *parts, parts[1])

    monkeypatch.setattr(Kept, "answer", staticmethod(answer))
    loss = Kept(base=lambda net, x, cond, **_: peers.common.terms(flow=torch.ones(()).double()), share=share)
    for first in range(60):
        for second in range(10):
            coins[:] = [(first + 0.5) / 60, (second + 0.5) / 10]
            out = loss(lambda x, t, r, cond: x, torch.zeros(B, 2).double())
            total += torch.stack(out[1:]) / 600
            close(out.total, out.base + out.adversarial + out.rectify)
    close(total, torch.ones(4).double(), atol=1e-6, rtol=0)


def test_a_base_is_given_what_it_may_ask_for(kept):
    net, teacher, x, cond = network(0, 3), network(1, 3), torch.randn(6, 2).double(), torch.arange(6) % 3
    generator, turns, base = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), Base()
    Kept(base=base)(net, x, cond, teacher, null=3, generator=generator, turns=turns, progress=0.3)
    (_, _, more), (_, twin_net, _, _, twin_teacher, *_) = base.given[0], kept[0]
    assert torch.equal(more.pop("null"), torch.tensor([3])) and twin_net is net and twin_teacher is teacher
    assert more == {"teacher": teacher, "generator": generator, "turns": turns, "progress": 0.3}
    Kept(base=base)(net, x, cond)
    assert base.given[1][2]["progress"] == 1.0 and base.given[1][2]["teacher"] is net


def test_which_part_a_batch_of_one_row_has_its_turns_say():
    def has_base(turns, seed):
        base, (turns, generator) = Base(), (torch.Generator().manual_seed(one) for one in (turns, seed))
        TwinFlowLoss(base=base)(network(0), torch.zeros(1, 2).double(), generator=generator, turns=turns)
        return len(base.given)

    found = [{has_base(turns, seed) for seed in range(5)} for turns in range(8)]
    assert all(len(each) == 1 for each in found) and set.union(*found) == {0, 1}


def test_a_base_is_a_loss_that_needs_no_more_than_the_average():
    for base, message in [
        (peers.DMD2(), "a base needs no network beside the average, DMD2.* needs {'original': 'frozen'"),
        (peers.Drifting(), "a base needs no network beside the average, Drifting"),
        ("meanflow", "base must be a loss, see `peers`, or None, got 'meanflow'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            TwinFlowLoss(base=base)
        assert len(str(error.value).splitlines()) == 1
    for changes in ({"guidance": 0.5}, {"data_free": True}):
        with pytest.raises(ValueError, match="guidance and data_free are of the any-step base: guidance=0, data_free"):
            TwinFlowLoss(base=peers.MeanFlow(), **changes)
    for name in peers.BASES:
        out = TwinFlowLoss(base=peers.PEERS[name]())(network(0), torch.randn(6, 2).double())
        assert torch.isfinite(torch.stack(out)).all() and out.total.requires_grad, name
    assert {"meanflow", "shortcut", "consistency training", "soflow"} <= set(peers.BASES)
    assert not {"dmd2", "drifting", "apex", "pixel meanflow", "consistency distillation"} & set(peers.BASES)


class OfGaussian(torch.nn.Module):
    """The exact field of data N(0.4, 0.6^2), x_t -> x_r along the flow, plus a line that is learnt, at negative times
    another one; and the twin of fakes N(0.4 + off, 0.6^2)."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off, self.line = off, torch.nn.Parameter(torch.zeros(2, 2).double())

    def forward(self, x, t, r, cond=None):
        twin, (t, r) = torch.signbit(t)[:, None], (abs(time)[:, None] for time in (t, r))
        mean = 0.4 + self.off * twin
        spread = lambda t: ((0.6 * (1 - t)) ** 2 + t**2).sqrt()  # noqa: E731
        a = x - (1 - t) * mean
        v = a * (t - 0.36 * (1 - t)) / spread(t) ** 2 - mean
        jump = (x - (1 - r) * mean - a * spread(r) / spread(t)) / (t - r).clamp(min=1e-3)
        line = torch.where(twin, self.line[1], self.line[0])
        return torch.where(t - r < 1e-3, v, jump) + line[:, :1] * x + line[:, 1:]


def test_the_exact_field_is_at_rest_on_another_base_where_the_fakes_are_right():
    """MeanFlow's identity holds for it and the gap is zero, so no part has a gradient in the mean; where the twin is
    that of other fakes, the rectification and the twin's own part have one."""
    loss = TwinFlowLoss(base=peers.MeanFlow(power=0.0), adversarial_weight=1.0, rectify_weight=1.0)
    for off, still in ((0.0, True), (0.3, False)):
        net, generator, found = OfGaussian(off), torch.Generator().manual_seed(0), []
        for _ in range(40):
            x = 0.4 + 0.6 * torch.randn(300, 1, generator=generator).double()
            found.append(gradients(loss(net, x, generator=generator).total, net))
        mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 40**0.5
        assert (error > 0).all() and bool((mean.abs() < 4 * error).all()) == still, (off, mean / error)


@given(st.integers(1, 6), st.integers(0, 9))
def test_guidance_away_from_the_words_alone_keeps_the_picture_of_each_row(n, seed):
    """A null of words alone is that of the words with each row's own picture; and a row may bring its own."""
    draw = torch.Generator().manual_seed(seed)
    x, words, source, no_words = (torch.randn(rows, 2, generator=draw) for rows in (n, n, n, 1))

    def net(x, t, r, cond):
        return torch.tanh(x * t[:, None] + cond["words"] * cond["source"])

    def total(cond, null):
        how = {"null": null, "generator": torch.Generator().manual_seed(7)}
        return TwinFlowLoss(order=1, guidance=0.7)(net, x, {"words": words, "source": source, **cond}, **how).total

    expected = total({}, {"words": no_words.expand(n, 2), "source": source})
    assert torch.equal(total({}, {"words": no_words}), expected)
    assert torch.equal(total({"null_words": no_words.expand(n, 2)}, {}), expected)
