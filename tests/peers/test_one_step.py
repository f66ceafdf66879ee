"""Laws of drifting, FreeFlow, adversarial self-distillation and of DMD with the network's own fakes."""

from collections import Counter

import pytest
import torch
from conftest import arrays, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from test_losses import gradients, network
from test_peers import Gaussian, Spy, gaussians

from tinytwinflow import peers, sample
from tinytwinflow.peers.common import twin_of
from tinytwinflow.peers.drifting import drift, force
from tinytwinflow.peers.freeflow import both_parts
from tinytwinflow.peers.self_distillation import few_steps, slope

close = torch.testing.assert_close


def itself(G, P):
    return torch.eye(G, G + P, dtype=torch.bool)


# Drifting


@settings(max_examples=3)
@given(seeds, st.sampled_from([0.2, 1.0]))
def test_forces_vanish_where_fakes_are_data_and_point_at_data_where_not(seed, temperature):
    """In the mean over draws the force on a fake is zero if fakes and data are of one distribution; if the data lie to
    the right it goes to the right, and less so near them."""
    generator = torch.Generator().manual_seed(seed)

    def mean(shift):
        forces = []
        for _ in range(200):
            x, y = (torch.randn(16, 2, generator=generator).double() for _ in range(2))
            forces.append(force(x, y + torch.tensor([shift, 0.0]), temperature, itself(16, 16)).mean(0))
        forces = torch.stack(forces)
        return forces.mean(0) / (forces.std(0) / 200**0.5), forces.mean(0)

    assert mean(0.0)[0].abs().max() < 5.5
    scores, right = mean(0.5)
    assert scores[0] > 10 and scores[1].abs() < 5.5
    scores, left = mean(-0.5)
    assert scores[0] < -10


@given(arrays((5, 2)), arrays((4, 2)), st.floats(0.3, 3), st.floats(-2, 2), seeds)
def test_forces_move_with_the_points(x, y, scale, shift, seed):
    """Shifted points have the same forces, points in another order theirs, larger ones the same drift in larger units;
    each temperature's force has unit size, and forces of several add up."""
    torch.manual_seed(seed)
    x = x + 0.1 * torch.randn(5, 2)  # no two alike
    V = force(x, y, 0.7, itself(5, 4))
    close(force(x + shift, y + shift, 0.7, itself(5, 4)), V)
    fakes, data = torch.randperm(5), torch.randperm(4)
    close(force(x[fakes], y[data], 0.7, itself(5, 4)), V[fakes])
    drifts, unit = drift(x, y, (0.3, 1.0))
    larger, larger_unit = drift(scale * x, scale * y, (0.3, 1.0))
    close(larger, drifts, atol=1e-4, rtol=1e-4)
    close(larger_unit, scale * unit)
    pairs = torch.cdist(x, torch.cat([x, y]))
    close(unit, pairs.mean() / 2**0.5)
    parts = [drift(x, y, (R,))[0] for R in (0.3, 1.0)]
    close(sum(parts), drifts)
    for R, part in zip((0.3, 1.0), parts):
        own = force(x, y, R * pairs.mean(), itself(5, 4))
        close(part, own / (own.square().mean() + 1e-8 * unit**2).sqrt(), atol=1e-5, rtol=1e-4)


@given(arrays((6, 2)), arrays((6, 2)), seeds)
def test_samples_meet_those_of_their_own_label(x, y, seed):
    """The forces are those of each label alone."""
    torch.manual_seed(seed)
    x, label = x + 0.1 * torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 2])
    same = label[:, None] == torch.cat([label, label])
    V = force(x, y, 0.5, ~same | itself(6, 6))
    for number in range(3):
        rows = label == number
        n = int(rows.sum())
        close(V[rows], force(x[rows], y[rows], 0.5, itself(n, n)), atol=1e-9, rtol=1e-7)


class Squares(torch.nn.Module):
    """Features of points: their squares and product, times a weight that is to stay."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def features(self, x):
        return self.weight * torch.stack([x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)


@settings(max_examples=10)
@given(seeds, st.booleans())
def test_drifting_moves_the_features_of_fakes(seed, compared):
    """The gradient in the features is -2 V / unit, a mean over elements, and passes through them into the fakes."""
    torch.manual_seed(seed)
    x, y = torch.randn(6, 2).double().requires_grad_(), torch.randn(6, 2).double()
    features = Squares() if compared else None
    out = peers.Drifting()(lambda z, t, r, cond: z - x, y, features=features)
    see = features.features if compared else lambda x: x
    V, unit = drift(see(x).detach(), see(y), (0.02, 0.05, 0.2))
    expected = torch.autograd.grad((see(x) * (-2 * V / unit / V.numel())).sum(), x)[0]
    close(torch.autograd.grad(out.total, x)[0], expected)
    close(out.total, V.square().mean())


@settings(max_examples=8)
@given(seeds)
def test_drifting_with_labels_is_each_label_by_itself(seed):
    """But for the common unit and size: the direction of each label's samples is that of a batch of them alone."""
    torch.manual_seed(seed)
    x, label = torch.randn(12, 2).double(), torch.arange(12) % 3
    z = torch.randn(12, 2).double().requires_grad_()
    loss = peers.Drifting(temperatures=(0.3,))
    torch.manual_seed(seed)
    out = loss(lambda noise, t, r, cond: noise - z, x + 3 * label[:, None], cond=label)
    (found,) = torch.autograd.grad(out.total, z)
    same = label[:, None] == torch.cat([label, label])
    pairs = torch.cdist(z, torch.cat([z, x + 3 * label[:, None]])).detach()
    mean_distance = pairs[same].mean()
    for number in range(3):
        rows = label == number
        V = force(z.detach()[rows], (x + 3 * label[:, None])[rows], 0.3 * mean_distance, itself(4, 4))
        close(
            torch.nn.functional.normalize(-found[rows].flatten(), dim=0),
            torch.nn.functional.normalize(V.flatten(), dim=0),
        )


def test_what_drifting_takes():
    """One sample has no other to flee, and a label's only one has no force; labels are a tensor, one a row."""
    net, x = network(0), torch.randn(4, 2).double()
    with pytest.raises(ValueError, match="2 rows"):
        peers.Drifting()(net, x[:1])
    assert peers.Drifting()(net, x[:2]).total > 0
    labelled = network(0, 3)
    assert peers.Drifting()(labelled, x, cond=torch.tensor([0, 1, 2, 2])).total.isfinite()
    for cond in ({"label": torch.zeros(4)}, torch.zeros(4, 5)):
        with pytest.raises(ValueError, match="labels"):
            peers.Drifting()(lambda z, t, r, cond: z, x, cond=cond)


# FreeFlow


@settings(max_examples=8)
@given(gaussians(), seeds, st.integers(1, 9))
def test_freeflow_rests_at_the_exact_map_and_reads_no_data(exact, seed, B):
    """Row by row: jumps that follow the frozen velocity and fakes of its own distribution have no gradient."""
    torch.manual_seed(seed)
    x = torch.full((B, len(exact.mean)), torch.nan).double()
    out = peers.FreeFlow()(exact, x, original=exact, fake=exact)
    for term in (out.prediction, out.correction):
        assert gradients(term, exact).abs().max() < 1e-7
    away = Gaussian(exact.mean.detach() + 0.5, exact.log_std.exp().item())
    out = peers.FreeFlow()(away, x, original=exact, fake=exact)
    assert gradients(out.prediction, away).abs().max() > 1e-3


@example(2, 1.0)
@given(st.integers(1, 40), st.floats(0, 1))
def test_the_rows_of_freeflow(n, share):
    """So many are predicted, the rest corrected, none neither; one at least in each, a row alone in both."""
    first, second = ([*range(n)[rows]] for rows in both_parts(n, share))
    assert len(first) >= 1 and len(second) >= 1 and sorted({*first, *second}) == [*range(n)]
    assert len(first) + len(second) == max(n, 2)
    if n > 1:
        assert len(first) == min(max(1, round(share * n)), n - 1)


@settings(max_examples=3)
@given(seeds, st.floats(0.1, 3))
def test_times_and_weights_of_freeflow(seed, alpha):
    """r of a prediction is uniform, t of a correction logit-normal about 0.8; alpha is a factor of the correction."""
    torch.manual_seed(seed)
    exact, x = Gaussian(torch.zeros(1).double(), 1.0), torch.zeros(4000, 1).double()
    net, fake = Spy(Gaussian(torch.ones(1).double(), 0.7)), Spy(exact)
    peers.FreeFlow(share=0.5)(net, x, original=exact, fake=fake)
    asked = [call for call in net.calls if call[2].any()]
    assert all((call[1] == 1).all() for call in net.calls)
    assert kstest(asked[0][2].numpy(), "uniform").pvalue > 1e-6
    t = fake.calls[0][1]
    assert t.dtype == torch.float64
    assert kstest((t / (1 - t)).log().numpy(), "norm", (0.8, 1)).pvalue > 1e-6

    def terms_of(**changes):
        torch.manual_seed(seed)
        return peers.FreeFlow(**changes)(net.field, x[:50], original=exact, fake=exact)

    one, other = terms_of(), terms_of(alpha=alpha)
    close(gradients(other.prediction, net.field), gradients(one.prediction, net.field))
    close(gradients(other.correction, net.field), alpha * gradients(one.correction, net.field))


# Adversarial self-distillation


@settings(max_examples=8)
@given(seeds, st.integers(1, 4))
def test_few_steps_are_the_samplers_with_a_gradient_in_the_last(seed, n):
    net, z = Spy(network(seed)), torch.randn(5, 2).double()
    made = few_steps(net, z, n, generator=torch.Generator().manual_seed(seed))
    close(made, sample(net.field, z, n, "few", generator=torch.Generator().manual_seed(seed)))
    assert [call[-1].requires_grad for call in net.calls] == [False] * (n - 1) + [True]
    assert [call[1][0].item() for call in net.calls] == pytest.approx([1 - i / n for i in range(n)])
    assert not any(call[2].any() for call in net.calls)


@settings(max_examples=4)
@given(seeds)
def test_how_many_steps_self_distillation_takes_is_said_by_the_turns(seed):
    """Each number up to `most` as often; the critic is told it, and sees samples of one step more beside these."""
    loss, counts = peers.SelfDistillation(most=3), Counter()
    x, field = torch.randn(3, 2).double(), network(seed)
    for step in range(60):
        asked = []
        for noise in (step, 1000 + step):
            critic, net = Spy(network(seed + 1)), Spy(network(seed))
            turns, generator = (torch.Generator().manual_seed(s) for s in (step, noise))
            loss(net, x, original=field, fake=field, critic=critic, turns=turns, generator=generator)
            n = (len(net.calls) - 1) // 2  # n of them, then n + 1
            assert len(net.calls) == 2 * n + 1
            asked.append(n)
            for _, t, r, _ in critic.calls:
                close(r, t * n / 4)
            assert len(critic.calls) == 5  # each sample, once more beside it, and the generator's to move it
        assert asked[0] == asked[1]
        counts[asked[0]] += 1
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 6


@settings(max_examples=10)
@given(seeds)
def test_the_slope_of_a_critic(seed):
    """In the mean over directions the square of its gradient; of a linear one, known by hand."""
    torch.manual_seed(seed)
    w, x, t = torch.randn(3).double(), torch.randn(4000, 3).double(), torch.rand(4000).double()
    found = slope(lambda x, t, r, cond: x @ w[:, None], x, x @ w[:, None], t, t)
    assert abs(found / w.square().sum() - 1) < 0.12


# DMD with the network's own fakes


@settings(max_examples=6)
@given(seeds)
def test_dmd_with_own_fakes_is_dmd_with_the_twin(seed):
    """The same terms as with the negative times of the network as the other one; these alone learn from the fakes."""
    torch.manual_seed(seed)
    net, original, x = network(seed), network(seed + 1), torch.randn(8, 2).double()
    found = []
    for own in (True, False):
        torch.manual_seed(seed)
        loss = peers.DMD(pairs=8, steps=2, own_fakes=own)
        spy = Spy(net)
        found.append(loss(spy, x, original=original, **({} if own else {"fake": twin_of(spy)})))
        asked = torch.cat([torch.signbit(call[1]) for call in spy.calls])
        assert asked.sum() == 16 and loss.helpers == {"original": "frozen"} | ({} if own else {"fake": "trained"})
    for term in ("generator", "regression", "fake"):
        ours, theirs = (gradients(getattr(out, term), net) for out in found)
        close(ours, theirs)
        assert ours.any()
    t, y = torch.rand(8).double(), torch.randn(8, 2).double()
    close(twin_of(net)(y, t, t), net(y, -t, -t))
