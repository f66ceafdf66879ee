"""Laws of the peers: each term moves its own network, the exact field stands still, all else moves towards it."""

import dataclasses
import itertools

import pytest
import torch
from conftest import mixtures, seeds, unit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from test_losses import gradients, network
from torch import nn

from tinytwinflow import generate, peers, sample
from tinytwinflow.nets import MLP
from tinytwinflow.peers.common import along, along_differences, fake_score, fixed
from tinytwinflow.peers.consistency import pseudo_huber
from tinytwinflow.peers.shortcut import two_jumps
from tinytwinflow.training.loop import train
from tinytwinflow.training.state import new_state

close = torch.testing.assert_close

PAIRS = {"pairs": 64, "steps": 4}
ASD = "adversarial self-distillation"
SMALL = {"dmd": PAIRS, "dmd with own fakes": PAIRS, "dmd2": {"every": 1}}
every_method = pytest.mark.parametrize("name", peers.PEERS)
every_distillation = pytest.mark.parametrize("name", ["vsd", "dmd", "dmd2", ASD, "sid"])


def made(name, **changes):
    """A peer with what makes it small, of samples of one step, and changes."""
    return peers.PEERS[name](**{**SMALL.get(name, {}), **({"most": 1} if name == ASD else {}), **changes})


class Gaussian(nn.Module):
    """The exact average velocity of N(mean, std^2 I), differentiable also where r = t."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean.clone()), nn.Parameter(torch.as_tensor(std).to(mean).log())

    def forward(self, x, t, r, cond=None):
        t, r, variance = t[:, None].to(x), r[:, None].to(x), (2 * self.log_std).exp()
        at_t, at_r = (((1 - s) ** 2 * variance + s**2).sqrt() for s in (t, r))
        slope = (t + r - (2 - t - r) * variance) / ((at_t + at_r) * at_t)
        return slope * (x - (1 - t) * self.mean) - self.mean

    def sample(self, n):
        with torch.no_grad():
            return self.mean + self.log_std.exp() * torch.randn(n, len(self.mean)).to(self.mean)


class Nudged(nn.Module):
    """A field plus a + B x, a and B parameters that are zero."""

    def __init__(self, field, dim):
        super().__init__()
        self.field, self.linear = field, nn.Linear(dim, dim).double()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, t, r, cond=None):
        return self.field(x, t, r, cond) + self.linear(x)


def free(x):
    """A generator whose samples are x, a row each, so that their gradient can be read off."""
    x.requires_grad_()
    return lambda z, t, r, cond=None: z - x[: len(z)]


class Spy:
    """A field that keeps what it was asked and what it said."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, x, t, r, cond=None):
        self.calls.append((x, t, r, self.field(x, t, r, cond)))
        return self.calls[-1][-1]


@st.composite
def gaussians(draw):
    mean = torch.tensor([draw(st.floats(-2, 2)) for _ in range(draw(st.integers(1, 2)))]).double()
    return Gaussian(mean, draw(st.floats(0.3, 1.5)))


class ByShift(nn.Module):
    """A field that knows shifted conditions: there it answers as at negative times."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, x, t, r, cond=None):
        if not isinstance(cond, dict):
            return self.field(x, t, r, cond)
        sign = 1 - 2 * cond["shift"].to(t)
        return self.field(x, sign * t, sign * r, cond["cond"])


def fitting(loss, net):
    """The network, or one that knows shifted conditions where the loss needs it."""
    return ByShift(net) if "shifted" in getattr(loss, "needs", {}) else net


def networks_of(loss):
    """The helpers that are networks like the one that is trained, by name: how."""
    return {name: how for name, how in loss.helpers.items() if how != "features"}


def others_of(loss, **networks):
    return {name: networks[name] for name in networks_of(loss)}


@every_method
@settings(max_examples=8)
@given(seeds, unit, st.booleans())
def test_each_term_moves_its_own_network_alone(name, seed, progress, labelled):
    """A term named after a helper moves that helper, every other term moves net, none moves anything else;
    net and every helper that is to learn do move; the total is the sum."""
    loss, classes = made(name), 3 if labelled else 0
    net, *networks = [fitting(loss, network(seed + i, classes)) for i in range(1 + len(networks_of(loss)))]
    helpers = dict(zip(networks_of(loss), networks))
    x, cond = torch.randn(16, 2).double(), torch.randint(3, (16,)) if labelled else None
    out = loss(net, x, cond=cond, progress=progress, **helpers)
    close(out.total, sum(out[1:]))
    for term, value in zip(out._fields[1:], out[1:]):
        owner = helpers.get(term, net)
        for other in (net, *networks):
            assert (gradients(value, other) != 0).any() == (other is owner), term
    learners = {kind for kind, how in loss.helpers.items() if how in ("trained", "critic")}
    assert learners == set(out._fields) & set(helpers) and len(out) > 1 + len(learners)


@every_method
def test_all_noise_is_that_of_the_generator(name):
    """Whatever torch's own random state is, which stays as it was."""
    loss, found = made(name), []
    networks = [fitting(loss, network(seed)) for seed in range(1 + len(networks_of(loss)))]
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        draws = {key: torch.Generator().manual_seed(seed) for key, seed in (("generator", 3), ("turns", 4))}
        helpers, x = dict(zip(networks_of(loss), networks[1:])), torch.linspace(-1, 1, 12).view(6, 2).double()
        found.append(loss(networks[0], x, **helpers, **draws))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert found[0] == found[1]


@settings(max_examples=3)
@given(seeds)
def test_dmd2_moves_the_generator_in_one_of_so_many_steps(seed):
    """With every=3 it is a third of the steps, to within the spread of chance; the others still learn in each."""
    loss, net, moved = made("dmd2", every=3), network(seed), 0
    helpers = {name: network(seed + 1) for name in loss.helpers}
    x, generator = torch.randn(4, 2).double(), torch.Generator().manual_seed(seed)
    for _ in range(150):
        out = loss(net, x, **helpers, generator=generator)
        assert out._fields == ("total", "generator", "adversarial", "fake", "critic")
        assert out.generator.requires_grad or out.generator == out.adversarial == 0
        moved += out.generator.requires_grad and bool(gradients(out.generator + out.adversarial, net).any())
        assert gradients(out.fake, helpers["fake"]).any() and gradients(out.critic, helpers["critic"]).any()
        assert gradients(out.total, net).any() == out.generator.requires_grad
    assert abs(moved - 50) < 30


def test_processes_with_the_same_turns_move_the_generator_of_dmd2_in_the_same_steps():
    """Whatever their noise is; else one would wait for the other's call. Without turns it is the noise's generator that
    says so, not torch's own."""
    loss, net = made("dmd2", every=2), network(0)
    helpers, x = {name: network(1) for name in loss.helpers}, torch.randn(4, 2).double()

    def moved(noise, turns=None):
        draws = [torch.Generator().manual_seed(seed) if seed is not None else None for seed in (noise, turns)]
        out = loss(net, x, **helpers, generator=draws[0], turns=draws[1])
        return out.generator.requires_grad

    alike = [(moved(step, step), moved(100 + step, step)) for step in range(12)]
    assert all(a == b for a, b in alike) and len(set(alike)) == 2
    assert all(moved(step) == moved(step) for step in range(12)) and len({moved(step) for step in range(12)}) == 2


def test_whether_a_single_row_rehearses_is_said_by_the_turns():
    """A row alone does in a share of the steps, on all processes alike; without turns the noise says so."""
    loss, original, x = made("progressive distillation", rehearse=0.5), network(1), torch.randn(1, 2).double()

    def rehearses(noise, turns=None):
        draws = [torch.Generator().manual_seed(seed) if seed is not None else None for seed in (noise, turns)]
        spy = Spy(original)
        loss(network(0), x, original=spy, progress=0.5, generator=draws[0], turns=draws[1])
        return len(spy.calls) == 1

    found = [(rehearses(step, step), rehearses(100 + step, step)) for step in range(24)]
    assert all(a == b for a, b in found) and 3 < sum(a for a, _ in found) < 21
    assert all(rehearses(step) == rehearses(step) for step in range(24))


def test_the_settings_are_those_of_the_papers_or_as_each_page_says():
    """And so are the networks that each needs, and how its model samples."""
    frozen, fake = {"original": "frozen"}, {"original": "frozen", "fake": "trained"}
    average, critic = {"teacher": "average"}, {"critic": "critic"}
    pairs = {"regression": 0.25, "pairs": 16384, "steps": 64, "share": 0.25, "kept": None}
    expected = {
        "consistency training": ({"first": 10, "last": 160, "c": 0.03}, {}, "few"),
        "consistency distillation": ({"steps": 40, "heun": True, "c": None}, frozen | average, "few"),
        "scm": ({"derivative": "jvp", "warm_up": 0.25, "normalise": True}, {}, "few"),
        "scm by differences": ({"derivative": "differences", "warm_up": 0.25, "normalise": True}, {}, "few"),
        "meanflow": ({"flow_share": 0.75, "power": 1.0}, {}, "any"),
        "improved meanflow": ({"flow_share": 0.5, "power": 1.0}, {}, "any"),
        "pixel meanflow": ({"flow_share": 0.5, "power": 1.0}, {}, "any"),
        "euler mean flow": ({"dt": 0.01, "flow_share": 0.5, "power": 1.0}, {}, "any"),
        "alpha-flow": ({"flow_share": 0.5, "power": 1.0, "smallest": 0.005}, {}, "any"),
        "soflow": ({"first": 0.1, "last": 0.002, "flow_share": 0.75, "power": 1.0}, {}, "any"),
        "shortcut": ({"share": 0.25, "finest": 128}, average, "any"),
        "progressive distillation": ({"rehearse": 0.25, "truncated": False}, frozen | average, "any"),
        "vsd": ({}, fake, None),
        "dmd": ({**pairs, "own_fakes": False}, fake, None),
        "dmd with own fakes": ({**pairs, "own_fakes": True}, frozen, None),
        "dmd2": ({"every": 2, "gan": 0.1, "critic_weight": 1.0}, fake | critic, None),
        ASD: ({"most": 3, "gan": 0.1, "critic_weight": 1.0, "penalty": 0.1}, fake | critic, "few"),
        "sid": ({"alpha": 1.0}, fake, None),
        "sana-sprint": (
            {"gan": 0.1, "at_noise": 0.5, "derivative": "jvp", "warm_up": 0.25},
            frozen | critic,
            "few",
        ),
        "freeflow": ({"alpha": 1.0, "power": 1.0, "share": 0.75}, fake, None),
        "drifting": ({"temperatures": (0.02, 0.05, 0.2)}, {"features": "features"}, None),
        "apex": ({"mixing": 0.5, "mixed_share": 0.25, "weight": 0.3, "printed": False}, average, "any"),
    }
    found = {name: make() for name, make in peers.PEERS.items()}
    assert {name: (dataclasses.asdict(loss), loss.helpers, loss.mode) for name, loss in found.items()} == expected
    assert [name for name, loss in found.items() if hasattr(loss, "refill")] == ["progressive distillation"]
    needs = {name: loss.needs for name, loss in found.items() if hasattr(loss, "needs")}
    assert needs == {"pixel meanflow": {"predicts": "data"}, "apex": {"shifted": True}}
    assert set(peers.BASES) == {name for name, (_, helpers, _) in expected.items() if helpers in ({}, average)} - {
        *needs
    }
    assert "kept" not in repr(found["dmd"])
    with pytest.raises(TypeError, match="kept"):
        peers.DMD(kept=())
    assert found["progressive distillation"].refill == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7])


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("meanflow", {"flow_share": 1.1}), ("improved meanflow", {"power": -1.0}), ("euler mean flow", {"dt": 0.0}),
        ("alpha-flow", {"smallest": 0.5}), ("soflow", {"last": 0.0}), ("soflow", {"flow_share": 2.0}),
        ("freeflow", {"share": 3.0}), ("apex", {"mixed_share": -1.0}), (ASD, {"most": 0}), (ASD, {"penalty": -0.1}),
        ("drifting", {"temperatures": ()}), ("drifting", {"temperatures": (0.1, 0.0)}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        peers.PEERS[name](**wrong)


# Where the exact field is a zero of the loss, row by row


@settings(max_examples=8)
@given(mixtures(components=2), st.integers(1, 6), seeds, st.booleans())
def test_two_exact_jumps_are_one(mixture, stage, seed, truncated):
    """The exact field is its own target in shortcut and in progressive distillation, but for their shortest jumps."""
    torch.manual_seed(seed)
    x = mixture.sample(8)
    out = made("progressive distillation", truncated=truncated)(mixture, x, original=mixture, progress=stage / 7)
    assert out.total < 1e-14
    (t, r), no = torch.rand(2, 8).double().sort(0, descending=True)[0], torch.zeros(8, dtype=torch.bool)
    close(two_jumps(mixture, x, t, r, no, None), mixture(x, t, r), atol=1e-7, rtol=1e-7)


@settings(max_examples=8)
@given(gaussians(), seeds, st.sampled_from([(True, 5), (False, 3)]))
def test_consistency_distillation_is_exact_to_the_order_of_its_steps(exact, seed, how):
    """A step of order p misses by h^(p + 1), so the squared error over h falls as h^(2 p + 1): Heun 5, Euler 3.
    The target is the moving average's."""
    heun, rate = how
    values = []
    for steps in (40, 80):
        torch.manual_seed(seed)
        loss, net, teacher = made("consistency distillation", steps=steps, heun=heun), Spy(exact), Spy(exact)
        values.append(loss(net, exact.sample(4000), original=exact, teacher=teacher).total.item())
        assert len(net.calls) == len(teacher.calls) == 1
    assume(values[1] > 1e-20)
    assert abs(torch.tensor(values[0] / values[1]).log2() - rate) < 0.7


@every_distillation
@settings(max_examples=8)
@given(mixtures(components=2), seeds)
def test_fakes_of_the_right_distribution_stay(name, mixture, seed):
    """Where original and fake agree, no fake gets gradient from the generator term, wherever it is."""
    torch.manual_seed(seed)
    x, loss = torch.randn(6, mixture.means.shape[1]).double(), made(name)
    out = loss(free(x), mixture.sample(6), **others_of(loss, original=mixture, fake=mixture, critic=mixture))
    assert torch.autograd.grad(out.generator, x)[0].abs().max() < 1e-12


@settings(max_examples=8)
@given(gaussians(), st.sampled_from([0.0, -0.5, 1.0]), seeds)
def test_sana_sprint_and_the_regression_of_dmd_agree_with_the_exact_field(exact, shift, seed):
    """The tangent along the exact velocity is zero row by row. DMD's pairs lie on the exact jump, to within the error
    of their Euler steps: a generator that is off by d pays d^2 / 4."""
    torch.manual_seed(seed)
    x, shifted = exact.sample(64), Gaussian(exact.mean.detach() + shift, exact.log_std.exp().item())
    assert made("sana-sprint")(exact, x, original=exact, critic=exact).consistency < 1e-20
    out = made("dmd", pairs=200, steps=200)(shifted, x, original=exact, fake=exact)
    assert abs(out.regression.item() - shift**2 / 4) < 0.02


@settings(max_examples=5)
@given(seeds)
def test_pairs_of_dmd_are_the_frozen_networks_own(seed):
    """A loss that has served one frozen network makes new pairs for another: x where its Euler steps take z."""
    torch.manual_seed(seed)
    loss, x = made("dmd"), torch.randn(8, 2).double()
    for original in (network(seed), network(seed + 1)):
        loss(network(seed), x, original=original, fake=original)
        _, z, target = loss.kept
        close(target, sample(original, z, 4, "multi"))
    original = Spy(original)
    for calls in (4 + 1, 1):  # the steps that make the pairs, once, and the velocity at the noised fakes
        original.calls.clear()
        loss(network(seed), x, original=original, fake=network(seed))
        assert len(original.calls) == calls


# Where it is a zero in the mean over data and noise


def z_scores(loss, term, field, data, seed, batches=48, rows=400):
    """How many standard errors the mean gradient of a term is away from zero at a nudged field."""
    torch.manual_seed(seed)
    own = Nudged(field, len(data.mean))
    net = data if term == "fake" else own
    others = others_of(loss, original=data, fake=own, critic=data, teacher=field)
    one = lambda: gradients(getattr(loss(net, data.sample(rows), **others, progress=1.0), term), own.linear)  # noqa: E731
    samples = torch.stack([one() for _ in range(batches)])
    return samples.mean(0) / (samples.std(0) / batches**0.5)


@pytest.mark.parametrize(
    "name, term, changes",
    [
        ("consistency training", "consistency", {"first": 4096, "last": 4096, "c": None}),
        ("scm", "consistency", {"normalise": False}),
        ("scm by differences", "consistency", {"normalise": False}),
        ("meanflow", "average_velocity", {"power": 0.0, "flow_share": 0.25}),
        ("improved meanflow", "average_velocity", {"power": 0.0, "flow_share": 0.25}),
        ("pixel meanflow", "average_velocity", {"power": 0.0, "flow_share": 0.25, "floor": 1e-9}),
        ("euler mean flow", "average_velocity", {"power": 0.0, "flow_share": 0.25, "dt": 1e-3}),
        ("alpha-flow", "average_velocity", {"power": 0.0, "flow_share": 0.25}),
        ("soflow", "consistency", {"power": 0.0, "last": 1e-3}),
        ("soflow", "flow", {"power": 0.0}),
        ("shortcut", "flow", {}),
        *((name, "fake", {}) for name in ("vsd", "dmd", "dmd2", ASD, "sid", "freeflow")),
    ],
)
@settings(max_examples=2)
@given(gaussians(), seeds)
def test_the_exact_field_stands_still_and_no_other_does(name, term, changes, data, seed):
    """The mean gradient is zero to within its error at the data's field, not at that of a shifted or wider Gaussian."""
    loss = made(name, **{key: value for key, value in changes.items() if key != "floor"})
    loss.floor = changes.get("floor")
    assert z_scores(loss, term, data, data, seed).abs().max() < 5.5
    for other in (Gaussian(data.mean.detach() + 0.7, data.log_std.exp().item()),
                  Gaussian(data.mean.detach(), 1.7 * data.log_std.exp().item())):  # fmt: skip
        assert z_scores(loss, term, other, data, seed).abs().max() > 8


# Signs and sizes


@every_distillation
@settings(max_examples=15)
@given(gaussians(), st.floats(-2, 2), seeds, st.floats(0, 2))
def test_fakes_that_are_shifted_move_back(name, real, shift, seed, alpha):
    """Fakes that are the data but for a shift d: a step against the gradient moves each row back, by hand by
    k d times (1 - t)^2 in VSD, times w = 1 / mean |x - x^_real| in DMD, k w in SiD (any alpha), k = t^2 / s_t^2."""
    torch.manual_seed(seed)
    mean, std = real.mean.detach(), real.log_std.exp().item()
    x, fake, original = real.sample(5) + shift, Gaussian(mean + shift, std), Spy(real)
    loss = made(name, **({"alpha": alpha} if name == "sid" else {}))
    out = loss(free(x), real.sample(5), **others_of(loss, original=original, fake=fake, critic=fake))
    x_t, t, _, v = [call for call in original.calls if len(call[0]) == 5][-1]
    t = t[:, None]
    k = t**2 / ((1 - t) ** 2 * std**2 + t**2)
    w = 1 / ((x - (x_t - t * v)).abs().mean(1, keepdim=True) + 1e-6)
    size = {"vsd": k * (1 - t) ** 2, "sid": k**2 * w}.get(name, k * w)
    close(torch.autograd.grad(out.generator, x)[0], (size * shift / x.numel()).expand_as(x).detach())


@settings(max_examples=3)
@given(gaussians(), st.sampled_from([0.0, -1.0, 1.5]), st.sampled_from([0.5, 1.6]), seeds)
def test_vsd_follows_the_gradient_of_the_kl_divergence(real, shift, ratio, seed):
    """In the mean, d VSD / d (mean, std of the fakes) = t^2 d KL(p_fake || p_real) / d (...) at each t, per element.

    The two differ by no more than the error of the mean; the gradient itself is far from zero."""
    torch.manual_seed(seed)
    loss, original, rows = made("vsd"), Spy(real), []
    net = Gaussian(real.mean.detach() + shift, ratio * real.log_std.exp().item())
    for _ in range(48):
        out = loss(net, real.sample(1000), original=original, fake=net)
        t = original.calls[-1][1][:, None]
        var, var_real = ((1 - t) ** 2 * (2 * g.log_std).exp() + t**2 for g in (net, real))
        kl = 0.5 * ((var + (1 - t) ** 2 * (net.mean - real.mean) ** 2) / var_real - (var / var_real).log())
        rows.append(torch.stack([gradients(term, net) for term in (out.generator, (t**2 * kl).mean())]))
    rows = torch.stack(rows)
    error = rows[:, 0] - rows[:, 1]
    assert (error.mean(0).abs() < 5.5 * error.std(0) / 48**0.5).all()
    assert (rows[:, 0].mean(0).abs() > 10 * error.std(0) / 48**0.5).any()


@settings(max_examples=15)
@given(st.floats(0.3, 2), st.floats(0.3, 2), st.floats(0, 2), seeds)
def test_sid_at_fakes_of_a_wrong_scale(std, own, alpha, seed):
    """Zero means, x^ = k x_t for data and k' x_t for fakes, d = k - k': the term is w d x_t (k x_t - x - alpha d x_t),
    with gradient through x_t = t z + (1 - t) x; but for w its mean draws the scale to the data's if alpha <= 1."""
    torch.manual_seed(seed)
    zero = torch.zeros(8).double()
    original, fake = Spy(Gaussian(zero, std)), Gaussian(zero, own)
    x = fake.sample(1000)
    out = made("sid", alpha=alpha)(free(x), x.detach(), original=original, fake=fake)
    x_t, t, _, v = original.calls[-1]
    t = t[:, None]
    k, k_own = ((1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) for s in (std, own))
    w, d = 1 / ((x - x_t + t * v).abs().mean(1, keepdim=True) + 1e-6), k - k_own
    by_hand = w * d * ((1 - t) * (k * x_t - x - alpha * d * x_t) + x_t * ((1 - t) * (k - alpha * d) - 1)) / x.numel()
    (found,) = torch.autograd.grad(out.generator, x)
    close(found, by_hand.detach())
    if abs(own - std) > 0.3 and alpha <= 1:
        assert (found * x / w).sum() * (own - std) > 0


@pytest.mark.parametrize("name", ["dmd2", "sana-sprint"])
@settings(max_examples=10)
@given(seeds, st.floats(0.1, 4))
def test_critics_tell_data_from_fakes_and_fakes_please_them(name, seed, slope):
    """The critic's term pushes the logits of data up and those of fakes down, the adversarial term those of fakes up:
    by softplus in DMD2, by the hinge in SANA-Sprint, each row once, data and fakes at the same times."""
    torch.manual_seed(seed)
    net = Nudged(lambda x, t, r, cond: (x + 1000) / t[:, None], 1)  # all its samples are -1000, the data 1000
    loss, critic = made(name), Spy(Nudged(lambda x, t, r, cond: 2 * (slope * x).sin(), 1))
    out = loss(net, torch.full((6, 1), 1000.0).double(), **others_of(loss, original=net, fake=net, critic=critic))
    *own, (seen, _, _, judged) = critic.calls
    x, t, _, logits = (torch.cat(parts) for parts in zip(*own))
    real = x > 0
    assert real.sum() == 6 == (~real).sum() and (seen < 0).all() and torch.equal(t[real[:, 0]], t[~real[:, 0]])
    gradient = torch.cat(torch.autograd.grad(out.critic, [call[-1] for call in own], retain_graph=True))
    please = torch.autograd.grad(out.adversarial, judged)[0]
    if name == "dmd2":
        close(gradient, torch.where(real, -torch.sigmoid(-logits), torch.sigmoid(logits)) / 6)
        close(please, -loss.gan * torch.sigmoid(-judged) / 6)
    else:
        close(gradient, torch.where(real, -1.0 * (logits < 1), 1.0 * (logits > -1)).double() / 6)
        close(please, torch.full_like(judged, -loss.gan / 6))


@given(seeds, st.integers(1, 5))
def test_a_fake_score_is_flow_matching_and_a_fixed_network_leaves_its_input_alone(seed, B):
    """The mean over rows of the squared error; a gradient of the input where the input asks for one, and only there."""
    torch.manual_seed(seed)
    net, x, u, t = network(seed), torch.randn(B, 2).double(), torch.randn(B, 2).double(), torch.rand(B).double()
    close(fake_score(net, x, t, u), (net(x, t, t) - u).square().mean())
    answer = fixed(net)(x, t, t, None)
    assert not x.requires_grad and not answer.requires_grad and torch.equal(answer, net(x, t, t))
    x.requires_grad_()
    close(*(torch.autograd.grad((field(x, t, t, None) * u).sum(), x) for field in (fixed(net), net)))


@given(seeds, gaussians())
def test_derivative_along_a_path(seed, exact):
    """Forward mode is what differences tend to, with error step^2; the exact field has dF/dt = (v - F) / (t - r)."""
    net = network(seed)
    x, u, t, r = torch.randn(4, 2).double(), torch.randn(4, 2).double(), 0.4 + 0.2 * torch.rand(4), 0.2 * torch.rand(4)
    t, r = t.double(), r.double()
    F, dF = along(net, x, t, r, u)
    close(F, net(x, t, r).detach())
    errors = [(along_differences(net, x, t, r, u, step=step) - dF).norm() for step in (0.01, 0.005)]
    assert 3 < errors[0] / errors[1] < 5 and errors[1] < 0.05 * dF.norm()
    edges, seen = torch.tensor([0.204, 0.5, 0.997, 1.0]).double(), Spy(net)
    along_differences(seen, x, edges, torch.full_like(t, 0.2), u)
    for (asked, s, _, _), wanted in zip(seen.calls, ([0.209, 0.505, 1.0, 1.0], [0.2, 0.495, 0.992, 0.995])):
        close(s, torch.tensor(wanted).double())
        close(asked, x + (s - edges)[:, None] * u)
    F, dF = along(lambda x, t, r, cond: torch.ones_like(x), x, t, r, u)
    assert F.eq(1).all() and dF.eq(0).all() and dF.shape == x.shape
    for edge in (r + 1e-7, torch.ones_like(t)):
        close(along_differences(net, x, edge, r, u, step=1e-6), along(net, x, edge, r, u)[1], atol=1e-3, rtol=1e-3)
    x = exact.sample(4)
    F, dF = along(exact, x, t, r, exact(x, t, t))
    close(dF, ((exact(x, t, t) - F) / (t - r)[:, None]).detach())


@pytest.mark.parametrize("name", ["scm", "scm by differences", "sana-sprint"])
@settings(max_examples=10)
@given(seeds, unit, st.sampled_from([0, 1]))
def test_targets_with_a_derivative(name, seed, progress, number):
    """By a literal formula, in the gradient at F: sCM moves F by g = u - F - min(1, 4 progress) t dF/dt, normalised to
    g / (|g| + 0.1). The share of rows with t = 1 in SANA-Sprint's adversarial term is that asked for."""
    net, original, x = Spy(network(seed)), network(seed + 1), torch.randn(8, 2).double()
    free = {"sana-sprint": ["at_noise"]}.get(name, ["normalise"])
    out = made(name, **dict.fromkeys(free, number))
    out = out(net, x, **others_of(out, original=original, critic=network(seed + 2)), progress=progress)
    x_t, t, r, F = (a[:8] for a in net.calls[-1])
    u = original(x_t, t, t) if name == "sana-sprint" else (x_t - x) / t[:, None]
    dF = along_differences(net.field, x_t, t, r, u, step=0.005 if "differences" in name else 1e-5)
    error = F - u + min(1, 4 * progress) * t[:, None] * dF
    length = error.square().mean(1, keepdim=True).sqrt()
    error = error / (length + 0.1) if number or name == "sana-sprint" else error
    assert not r.any() and ((net.calls[-1][1] == 1).sum() == 8 * number or name != "sana-sprint")
    (found,) = torch.autograd.grad(out[1], net.calls[-1][-1], retain_graph=True)
    close(found[:8], 2 * error.detach() / 16, atol=1e-5, rtol=1e-3)
    close(
        gradients(out[1], net.field), gradients((found * net.calls[-1][-1]).sum(), net.field)
    )  # and through no target


@given(seeds, unit, st.sampled_from([None, 0.1]))
def test_consistency_training_compares_neighbours_of_one_line(seed, progress, c):
    """x_t and x_s lie on one line from x, s is the grid point below t, f(x, 0) = x, and only f(x_t) gets gradient.
    The grid doubles from `first` intervals to `last`, an equal share of training each."""
    net, x, loss = Spy(network(seed)), torch.randn(32, 2).double(), made("consistency training", first=5, last=40, c=c)
    total = loss(net, x, progress=progress).total
    (x_s, s, _, F_s), (x_t, t, r, F) = net.calls
    n = 5 * 2 ** min(3, int(4 * progress))
    close(t - s, torch.full_like(t, 1 / n))
    close((t * n).round(), t * n)
    close((x_s - x) * t[:, None], (x_t - x) * s[:, None])
    assert s.min() >= 0 and t.max() <= 1 and not r.any() and not F_s.requires_grad
    square = (x_t - t[:, None] * F - x_s + s[:, None] * F_s).square().sum(1)
    distance = square if c is None else (square + 2 * c**2).sqrt() - 2**0.5 * c
    close(total, n * distance.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vsd", "dmd", "dmd2", ASD, "sid", "sana-sprint"])
def test_fakes_are_noised_to_times_that_keep_off_both_ends(name):
    """t ~ U(0.02, 0.98), by Kolmogorov and Smirnov."""
    torch.manual_seed(0)
    exact = Gaussian(torch.zeros(1).double(), 1.0)
    loss, spy = made(name), Spy(exact)
    known = {
        "original": exact,
        "fake": exact,
        "critic": exact,
        ("critic" if name == "sana-sprint" else "original"): spy,
    }
    loss(exact, exact.sample(4000), **others_of(loss, **known))
    t = [call[1] for call in spy.calls if len(call[0]) >= 4000][-1][:4000]
    assert kstest(t.numpy(), lambda s: (s - 0.02) / 0.96).pvalue > 1e-6
    assert 0.02 <= t.min() < 0.03 and 0.97 < t.max() <= 0.98


IN_PAIRS = {*peers.BASES, "consistency distillation", "pixel meanflow", "sana-sprint", "progressive distillation"}


@pytest.mark.parametrize("name", sorted(IN_PAIRS - {"euler mean flow"}))
def test_data_are_noised_the_more_the_later(name):
    """Data far away: t z + (1 - t) x is (1 - t) x, to within the noise, in each row that the network is asked."""
    torch.manual_seed(0)
    net, exact = Spy(network(0)), Gaussian(torch.zeros(2).double(), 1.0)
    loss = made(name)
    loss(net, torch.full((50, 2), 1e4).double(), **others_of(loss, original=exact, critic=exact, teacher=exact))
    x_t, t = (torch.cat([call[i].detach() for call in net.calls]) for i in range(2))
    assert (x_t - 1e4 * (1 - t)[:, None]).abs().max() < 10 and len(t.unique()) > 1


@settings(max_examples=10)
@given(seeds, st.integers(1, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_dmd_draws_a_share_of_pairs_from_all_of_them(seed, B, share):
    """Rounded, but one at least; beginning with the first row, as its labels show; every pair is as likely."""
    torch.manual_seed(seed)
    net, original, n = Spy(network(seed, 3)), network(seed + 1, 3), max(1, round(share * B))
    x, label = torch.randn(B, 2).double(), torch.arange(B) % 3
    labelled = Spy(lambda x, t, r, cond: seen.append(cond) or net.field(x, t, r, cond))
    seen, loss = [], made("dmd", share=share, pairs=8)
    loss(labelled, x, original=original, fake=original, cond=label)
    assert torch.equal(seen[-1], label[:n]) and len(labelled.calls[-1][0]) == n
    plain = Spy(network(seed))
    loss(plain, x, original=network(seed + 1), fake=network(seed + 2))
    assert len(plain.calls[-1][0]) == n and loss.kept[1].dtype == x.dtype and len(loss.kept[1]) == 8
    rows = [loss.some_pairs(x[:1].expand(200, 2), None, loss.kept[0], None)[0] for _ in range(2)]
    teacher = Spy(network(seed))
    made("shortcut", share=share)(network(seed), x, teacher=teacher)
    assert len(teacher.calls[0][0]) == n, "the rows of a shortcut model that bootstrap are counted alike"
    counts = (torch.cat(rows)[:, None] == loss.kept[1]).all(2).sum(0)
    assert counts.sum() == 400 and (counts - 50).abs().max() < 6 * (50 * 7 / 8) ** 0.5


@given(seeds)
@settings(max_examples=5)
def test_what_a_peer_does_where_nothing_is_said(seed):
    """Without an average the network is its own teacher; training is at its beginning where a method has stages, at its
    end where a warm-up would be over. Equal samples are at distance zero, with a gradient that is finite."""
    net, original, x = network(seed), network(seed + 1), torch.randn(8, 2).double()
    helpers = {"original": original, "fake": original, "critic": original}

    def value(name, **given):
        torch.manual_seed(seed)
        loss = made(name)
        known = {helper: helpers[helper] for helper in loss.helpers if helper in helpers}
        return loss(net, x, **{**known, **given}).total

    for name in ("consistency distillation", "shortcut"):
        close(value(name), value(name, teacher=net))
        assert value(name) != value(name, teacher=original)
    for name in ("consistency training", "progressive distillation"):
        close(value(name), value(name, progress=0.0))
        close(value(name, progress=1.0), value(name, progress=0.99))
    for name in ("scm", "sana-sprint"):
        close(value(name), value(name, progress=1.0))
        assert value(name) != value(name, progress=0.1)
    for c in (0.0, 0.3):
        a = x.clone().requires_grad_()
        distance = pseudo_huber(a, x, c)
        distance.sum().backward()
        assert distance.abs().max() < 1e-5 and a.grad.isfinite().all()
        close(pseudo_huber(a, x + 1, c).detach(), torch.full((8,), (2 + c**2) ** 0.5 - c).double())


@settings(max_examples=20)
@given(seeds, st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_stages_of_progressive_distillation(seed, stage, rehearse, truncated):
    """Stage k teaches jumps of 1 / 2^(6 - k), from a multiple of it, by two halves, which in the first are steps of the
    velocity; rows that rehearse keep to an earlier stage's jump. Truncated: weight max(t^2, (1 - t)^2)."""
    net, original, x = Spy(network(seed)), Spy(network(seed + 1)), torch.randn(200, 2).double()
    loss = made("progressive distillation", rehearse=rehearse, truncated=truncated)
    out = loss(net, x, original=original, progress=stage / 7)
    x_t, t, r, F = net.calls[0]
    n, now, middle = 1 / (t - r), 2.0 ** (6 - stage), (t + r) / 2
    old = n != now
    sizes = {2.0 ** (6 - earlier) for earlier in range(stage)} if rehearse else set()
    assert set(n.tolist()) == (sizes | {now} if rehearse < 1 or not stage else sizes)
    assert torch.equal((t * n).round(), t * n) and 0 <= r.min() and t.max() <= 1
    assert old.sum() == (200 * rehearse if stage else 0)  # as many at each step
    assert all(len(asked) for asked, *_ in original.calls)
    target = original(x_t, t, r)
    if not old.all():
        (_, t_1, r_1, F_1), (x_2, t_2, r_2, F_2) = original.calls[-3:-1]
        for asked, wanted in zip((t_1, r_1, t_2, r_2), (t, middle, middle, r) if stage else (t, t, middle, middle)):
            assert torch.equal(asked, wanted[~old])
        close(x_2, (x_t - (t - middle)[:, None] * original(x_t, t, middle if stage else t))[~old])
        target[~old] = (F_1 + F_2) / 2
    weight = torch.maximum(t**2, (1 - t) ** 2) if truncated else torch.ones_like(t)
    close(out.total, (weight[:, None] * (F - target).square()).mean())


@settings(max_examples=20)
@given(seeds)
def test_jumps_of_shortcut(seed):
    """Powers of two of the time, within [0, 1]; the shortest is taught by two steps of the velocity, others by the
    moving average's jumps of half the length; the rows that do not jump are flow matching."""
    net, teacher, x = Spy(network(seed)), Spy(network(seed + 1)), torch.randn(400, 2).double()
    out = made("shortcut", share=0.5, finest=16)(net, x, teacher=teacher)
    (x_t, t, r, F), (x_1, t_1, r_1, F_1), (x_2, t_2, r_2, F_2) = net.calls[0], *teacher.calls
    close(x_2, x_1 - (t_1 - t_2)[:, None] * F_1)
    n, u = 1 / (t - r)[:200], (x_t - x) / t[:, None]
    assert set(n.tolist()) == {1, 2, 4, 8} and torch.equal((t[:200] * n).round(), t[:200] * n) and t.max() == 1
    assert torch.equal(t[200:], r[200:]) and torch.equal(x_1, x_t[:200])
    middle, short = (t_1 + r[:200]) / 2, n == 8
    assert torch.equal(r_1, torch.where(short, t_1, middle)) and torch.equal(t_2, middle)
    assert torch.equal(r_2, torch.where(short, middle, r[:200]))
    close(out.bootstrap, (F[:200] - (F_1 + F_2) / 2).square().mean() / 2)
    close(out.flow, (F - u)[200:].square().mean() / 2)


# In training


def begun(name, seed, **changes):
    """A state, a loss and data for a few steps of a method."""
    torch.manual_seed(seed)
    loss = made(name, **changes)
    state = new_state(fitting(loss, MLP(1, 16, 2)), lr=1e-2, seed=seed, helpers=loss.helpers)
    return state, loss, lambda i: (torch.randn(8, 1, generator=torch.Generator().manual_seed(seed + i)) + 1, None)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@every_method
@settings(max_examples=1)
@given(seeds)
def test_helpers_begin_as_the_flow_model_and_the_frozen_one_stays(name, seed):
    """When flow matching ends all but the critic are the average, the critic a new network. Then the trained ones move;
    the frozen one does not, but for progressive distillation, where it becomes the teacher at each stage."""
    state, loss, batch = begun(name, seed)
    born, seen = flat(state.net), []

    class Watched:
        helpers, refill = loss.helpers, getattr(loss, "refill", ())

        def __call__(self, net, x, **others):
            assert others["teacher"] is state.teacher and others["progress"] == len(seen) / 14
            networks = {**others, "average": state.average}
            seen.append({name: flat(networks[name]) for name in (*networks_of(loss), "average", "teacher")})
            return loss(net, x, **others)

    list(train(state, Watched(), batch, 4 + 14, ema=0.5, warmup_steps=4))
    assert len(seen) == 14 and not torch.equal(seen[0]["average"], born)
    for helper in set(networks_of(loss)) - {"teacher"}:
        kind, own = loss.helpers[helper], [now[helper] for now in seen]
        assert all(p.requires_grad == (kind != "frozen") for p in state.helpers[helper].parameters())
        assert torch.equal(own[0], born if kind == "critic" else seen[0]["average"])
        changed = [i for i in range(1, 14) if not torch.equal(own[i], own[i - 1])]
        stages = range(2, 14, 2) if name == "progressive distillation" else []
        assert changed == list(stages if kind == "frozen" else range(1, 14))
        assert kind != "frozen" or all(torch.equal(own[i], seen[i]["teacher"]) for i in changed)


@pytest.mark.parametrize("name", ["dmd", "dmd2", "progressive distillation"])
@settings(max_examples=3)
@given(seeds, st.integers(1, 17))
def test_interrupted_training_with_helpers_equals_uninterrupted(name, seed, stop):
    """Stopped after any step, saved, loaded into fresh objects and continued: every record and weight the same."""
    changes = {"every": 2} if name == "dmd2" else {}
    (whole, *rest), (first, *rest_1), (second, *rest_2) = (begun(name, seed, **changes) for _ in range(3))
    nn.init.normal_(second.net.out.weight)
    records = list(train(whole, *rest, 18, warmup_steps=4))
    before = list(itertools.islice(train(first, *rest_1, 18, warmup_steps=4), stop))
    second.load_state_dict(first.state_dict())
    assert before + list(train(second, *rest_2, 18, warmup_steps=4)) == records
    for net in ("net", "average", "teacher", "helpers"):
        assert torch.equal(flat(getattr(whole, net)), flat(getattr(second, net)))


class ThreeGaussians(nn.Module):
    """The field of one Gaussian where r = t, of another elsewhere and of a third at negative times: what a jump does
    must be learnt as such, and what fakes are as well."""

    def __init__(self, dim):
        super().__init__()
        self.velocity, self.jump, self.fake = (Gaussian(torch.zeros(dim), 1.0) for _ in range(3))

    def forward(self, x, t, r, cond=None):
        real = torch.where((t == r)[:, None], self.velocity(x, t.abs(), r.abs()), self.jump(x, t.abs(), r.abs()))
        return torch.where(torch.signbit(t)[:, None], self.fake(x, t.abs(), r.abs()), real)


@every_method
@settings(max_examples=1)
@given(seeds, st.floats(1.5, 2.5), st.floats(0.4, 0.6))
def test_one_step_samples_become_the_data(name, seed, mean, std):
    """From a network whose one-step samples are N(0, 1), a short training makes them the data's Gaussian."""
    changes = {"consistency distillation": {"steps": 10}, "shortcut": {"finest": 16}, "dmd": {"pairs": 512}}
    changes["dmd with own fakes"] = changes["dmd"]
    torch.manual_seed(seed)
    loss = made(name, **changes.get(name, {}))
    state = new_state(fitting(loss, ThreeGaussians(8)), lr=0.2, betas=(0.0, 0.99), seed=seed, helpers=loss.helpers)
    for group in state.optimizer.param_groups[1:]:
        group["initial_lr"] = 0.4
    data = lambda i: (mean + std * torch.randn(64, 8), None)  # noqa: E731
    list(train(state, loss, data, 300, ema=0.9, teacher_ema=0.5, warmup_steps=100))
    x = generate(state.average, torch.randn(2000, 8)).detach()
    assert abs(x.mean() - mean) < 0.15 and abs(x.std() - std) < 0.15
