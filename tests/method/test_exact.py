"""Laws of the exact fields: density, score, velocity and flow map must agree with each other."""

import numpy as np
import pytest
import torch
from conftest import arrays, inside, mixtures, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from tinytwinflow import GaussianMixture, Twins
from tinytwinflow.method import path

close = torch.testing.assert_close


@st.composite
def mixture_and_points(draw, n=3, **kwargs):
    mixture = draw(mixtures(**kwargs))
    return mixture, draw(arrays((n, mixture.means.shape[1])))


@given(mixture_and_points(), st.floats(0, 1))
def test_log_density_is_that_of_the_scaled_and_noised_mixture(case, t):
    """p_t = sum_k w_k N((1 - t) m_k, (1 - t)^2 S_k + t^2 I), by scipy's Gaussian density."""
    mixture, x = case
    eye = np.eye(x.shape[1])
    density = sum(
        w * multivariate_normal((1 - t) * m, (1 - t) ** 2 * S + t**2 * eye).pdf(x.numpy())
        for w, m, S in zip(mixture.weights.numpy(), mixture.means.numpy(), mixture.covs.numpy())
    )
    close(mixture.log_density(x, t).exp(), torch.as_tensor(density).reshape(-1))


@given(mixture_and_points())
def test_density_and_score_are_by_default_those_of_the_data(case):
    mixture, x = case
    close(mixture.log_density(x), mixture.log_density(x, 0.0))
    close(mixture.score(x), mixture.score(x, 0.0))


@given(mixture_and_points(), arrays(3, unit))
def test_score_is_the_gradient_of_the_log_density(case, t):
    mixture, x = case
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, t).sum(), x)
    close(mixture.score(x.detach(), t), gradient)


@given(mixture_and_points(), arrays(3, inside))
def test_velocity_and_score_say_the_same(case, t):
    """Eq. 5 holds for the marginal: s = -(x_t + (1 - t) v) / t."""
    mixture, x = case
    close(path.score(x, mixture.velocity(x, t), t), mixture.score(x, t))


@given(mixture_and_points(), arrays(3, inside))
def test_density_is_carried_by_the_velocity(case, t):
    """Continuity: d log p / dt = -div v - v . score, with all derivatives by autograd."""
    mixture, x = case
    x, t = x.requires_grad_(), t.requires_grad_()
    x_grad, t_grad = torch.autograd.grad(mixture.log_density(x, t).sum(), (x, t))
    v = mixture.velocity(x, t)
    divergence = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
    close(t_grad, -divergence - (v * x_grad).sum(1))


@given(arrays((1, 2)), arrays((4, 2)), inside)
def test_one_isotropic_gaussian_has_a_straightforward_flow(mean, x, t):
    """N(m, s^2 I) is carried by x_t -> (1 - r) m + (x_t - (1 - t) m) scale(r) / scale(t)."""
    s = 0.4
    mixture = GaussianMixture(mean, s**2 * torch.eye(2)[None])
    scale = lambda t: ((1 - t) ** 2 * s**2 + t**2) ** 0.5  # noqa: E731
    for r in (0.0, 0.3, 1.0):
        close(mixture.flow(x, t, r), (1 - r) * mean + (x - (1 - t) * mean) * scale(r) / scale(t))


@settings(max_examples=15)
@given(mixture_and_points(), arrays(3, unit), arrays(3, unit), arrays(3, unit))
def test_flow_map_is_a_semigroup_with_inverse_and_identity(case, t, s, r):
    mixture, x = case
    there = mixture.flow(x, t, r)
    close(mixture.flow(mixture.flow(x, t, s), s, r), there, atol=1e-7, rtol=1e-7)
    close(mixture.flow(there, r, t), x, atol=1e-7, rtol=1e-7)
    close(mixture.flow(x, t, t), x)


@given(mixture_and_points(), arrays(3, unit), arrays(3, unit))
@settings(max_examples=8)
def test_rows_do_not_see_each_other_and_keep_their_precision(case, t, r):
    """A row is what it is alone, jumps and velocities mixed, in float32 as in float64; a jump has no gradient."""
    mixture, x = case
    r[1] = t[1]
    together = mixture(x, t, r)
    for i in range(3):
        close(together[i : i + 1], mixture(x[i : i + 1], t[i : i + 1], r[i : i + 1]), atol=1e-6, rtol=1e-6)
    narrow = mixture.flow(x.float(), t, r)
    assert narrow.dtype == torch.float32 and mixture(x.float(), t.float(), r.float()).dtype == torch.float32
    close(narrow.double(), mixture.flow(x, t, r), atol=1e-4, rtol=1e-4)
    assert not mixture.flow(x.requires_grad_(), t.requires_grad_(), r).requires_grad


@settings(max_examples=15)
@given(mixture_and_points(n=1), inside, inside)
def test_average_velocity_is_the_integral_of_the_velocity(case, t, r):
    """(t - r) F(x_t, t, r) = integral from r to t of v along the trajectory, by Gauss-Legendre quadrature."""
    mixture, x = case
    nodes, weights = np.polynomial.legendre.leggauss(24)
    times = torch.from_numpy(r + (t - r) * (nodes + 1) / 2)
    points = mixture.flow(x.expand(24, -1), t, times)
    integral = (torch.from_numpy(weights)[:, None] / 2 * mixture.velocity(points, times)).sum(0) * (t - r)
    t_, r_ = torch.tensor([t]).double(), torch.tensor([r]).double()
    close((t - r) * mixture(x, t_, r_)[0], integral, atol=1e-6, rtol=1e-6)


@settings(max_examples=15)
@given(mixture_and_points(n=1), st.floats(0.1, 0.9), unit)
def test_average_velocity_obeys_the_meanflow_identity(case, t, r):
    """Along the flow d/dt [(t - r) F(x_t, t, r)] = v(x_t, t), with the derivative by central differences."""
    mixture, x = case
    h = 1e-3

    def term(s):
        s = torch.tensor([s]).double()
        return (s - r) * mixture(mixture.flow(x, t, s), s, torch.tensor([r]).double())

    close((term(t + h) - term(t - h)) / (2 * h), mixture.velocity(x, t), atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(mixture_and_points(), arrays(3, inside), arrays(3, unit))
def test_twins_answer_by_the_sign_of_time(case, t, r):
    """Positive times are the real mixture's field, negative ones the fake mixture's at |t|, |r|."""
    real, x = case
    fake = GaussianMixture(real.means + 1, real.covs)
    twins = Twins(real, fake)
    close(twins(x, t, r), real(x, t, r))
    close(twins(x, -t, -r), fake(x, t, r))
    sign = torch.tensor([1.0, -1.0, 1.0])
    close(twins(x, sign * t, sign * r), torch.where(sign[:, None] > 0, real(x, t, r), fake(x, t, r)))


@given(arrays((4, 2)), arrays(4), st.permutations([1.0, 1.0, -1.0, -1.0]))
def test_twins_hand_each_field_its_own_rows_of_a_condition(x, label, sign):
    """None, a tensor or a dict of tensors, for the rows of a field, and times that are not negative."""

    def field(scale):
        def velocity(x, t, r, cond):
            assert (t >= 0).all() and (r >= 0).all()
            label = 0.0 if cond is None else cond["label"][:, None] if isinstance(cond, dict) else cond[:, None]
            return scale * x + label

        return velocity

    sign = torch.tensor(sign).double()
    expected = torch.where(sign[:, None] > 0, x, 3 * x)
    twins, t = Twins(field(1), field(3)), 0.5 * sign
    close(twins(x, t, t), expected)
    close(twins(x, t, t, label), expected + label[:, None])
    close(twins(x, t, t, {"label": label}), expected + label[:, None])
    close(twins(x, t.abs(), t.abs(), {"label": label}), x + label[:, None])


def test_a_mixture_of_any_numbers_is_one_of_float64():
    for means, covs, weights in (
        ([[0], [1]], [[[1]], [[2]]], [1, 3]),
        (*map(np.float32, ([[0], [1]], [[[1]], [[2]]])), None),
    ):
        mixture = GaussianMixture(means, covs, weights)
        assert {mixture.means.dtype, mixture.covs.dtype, mixture.weights.dtype} == {torch.float64}


def test_samples_have_the_moments_of_the_mixture(generator):
    mixture = GaussianMixture([[0.0, 0.0], [4.0, 1.0]], [[[1.0, 0.5], [0.5, 1.0]], [[0.2, 0.0], [0.0, 0.1]]], [3, 1])
    x, k = mixture.sample(40000, generator, labels=True)
    assert x.dtype == torch.float64 and mixture.sample(3, dtype=torch.float32).dtype == torch.float32
    assert torch.equal(mixture.sample(40000, torch.Generator().manual_seed(0)), x), "its own generator, and no labels"
    assert abs((k == 0).double().mean() - 0.75) < 0.01
    close(x.mean(0), torch.tensor([1.0, 0.25]).double(), atol=0.03, rtol=0)
    close(x[k == 0].T.cov(), mixture.covs[0], atol=0.03, rtol=0)


def test_wrong_use_says_what_is_allowed():
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture([[0.0]], [[[-1.0]]])
    with pytest.raises(ValueError, match=r"means must be \(K, D\)"):
        GaussianMixture([0.0], [[[1.0]]])
    with pytest.raises(ValueError, match="weights must be 1 positive"):
        GaussianMixture([[0.0]], [[[1.0]]], [0.0])
    eye, two = np.eye(2), [[0.0, 0.0], [1.0, 0.0]]
    for means, covs in ((two, [eye]), (two[0], eye), ([two], [[eye, eye]]), (two, np.ones((2, 1, 1))), (two, eye)):
        with pytest.raises(ValueError, match=r"means must be \(K, D\) and covs \(K, D, D\), got \("):
            GaussianMixture(means, covs)
    for cov in (
        [[1.0, 0.5], [0.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, -1.0]],
    ):
        with pytest.raises(ValueError, match="every covariance must be symmetric and positive definite"):
            GaussianMixture(two, [eye, cov])
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0], [[1.0, 1.0]]):
        with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
            GaussianMixture(two, [eye, eye], weights)
    close(GaussianMixture(two, [eye, eye], [3, 1]).weights, torch.tensor([0.75, 0.25]).double())
    close(GaussianMixture(two, [eye, eye]).weights, torch.tensor([0.5, 0.5]).double())
    one = GaussianMixture([[0.0]], [[[1.0]]])
    for x in (torch.zeros(2), torch.zeros(2, 1, 1), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"this mixture takes \(B, 1\)"):
            one.log_density(x, 0.5)
    for t, r, name in ((1.1, 0.5, "t"), (0.5, -0.1, "r"), (0.5, 1.1, "r")):
        with pytest.raises(ValueError, match=rf"^{name} must lie in \[0, 1\]"):
            one.flow(torch.zeros(2, 1), t, r)
    with pytest.raises(ValueError, match=r"takes \(B, 1\)"):
        one.velocity(torch.zeros(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        one(torch.zeros(2, 1), torch.full((2,), -0.5), torch.full((2,), -0.5))
