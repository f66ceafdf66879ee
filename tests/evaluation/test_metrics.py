"""Each metric against its definition, and against cases whose value is known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import arrays, seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinytwinflow import GaussianMixture
from tinytwinflow.evaluation import metrics

close = torch.testing.assert_close


@given(arrays((6, 2)), arrays((6, 2)), arrays(2), seeds)
def test_distances_are_symmetric_and_do_not_see_order_or_place(x, y, shift, seed):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for distance in (metrics.sliced_wasserstein, metrics.wasserstein, metrics.energy_distance):
        value = distance(x, y)
        assert math.isclose(distance(y, x), value, abs_tol=1e-6)
        assert math.isclose(distance(x[order] + shift, y + shift), value, abs_tol=1e-6)


@given(arrays((5, 3)), arrays((5, 3)))
def test_identical_sets_are_at_distance_zero_and_slices_never_exceed_the_whole(x, y):
    assert metrics.sliced_wasserstein(x, x) == 0 and metrics.wasserstein(x, x) == 0
    assert metrics.sliced_wasserstein(x, y) <= metrics.wasserstein(x, y) + 1e-9


@given(arrays((40, 2)), st.floats(0.1, 3))
def test_a_shift_costs_its_length(x, length):
    """W2 of a translation is |a|; a random direction sees |a| cos, so sliced W2 is |a| / sqrt(2) in 2D."""
    y = x + torch.tensor([length, 0.0])
    assert math.isclose(metrics.wasserstein(x, y), length, rel_tol=1e-6)
    assert math.isclose(metrics.sliced_wasserstein(x, y, 4096), length / math.sqrt(2), rel_tol=0.03)


@given(arrays((4, 1)), arrays((4, 1)))
def test_in_one_dimension_sliced_and_exact_agree(x, y):
    assert math.isclose(metrics.sliced_wasserstein(x, y), metrics.wasserstein(x, y), abs_tol=1e-9)


@given(arrays((4, 2)), arrays((5, 2)))
def test_energy_distance_is_its_definition(x, y):
    def average(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return np.mean([float((a[i] - b[j]).norm()) for i, j in pairs])

    expected = 2 * average(x, y, False) - average(x, x, True) - average(y, y, True)
    assert math.isclose(metrics.energy_distance(x, y), expected, abs_tol=1e-6)


def test_energy_distance_is_unbiased(generator):
    values = [metrics.energy_distance(*torch.randn(2, 20, 2, generator=generator).double()) for _ in range(600)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


@settings(max_examples=20)
@given(st.integers(0, 7), seeds)
def test_coverage_counts_the_components_that_get_their_due(missing, seed):
    means = [[3.0 * k, 0.0] for k in range(8)]
    mixture = GaussianMixture(means, [0.01 * np.eye(2)] * 8)
    x, k = mixture.sample(4000, torch.Generator().manual_seed(seed), labels=True)
    assert metrics.coverage(x, mixture) == 1
    assert metrics.coverage(x[k >= missing], mixture) == 1 - missing / 8
    assert metrics.coverage(x + 1.0, mixture) == 0


def moved(x, turn, scale, shift):
    """Points turned by an angle, scaled and shifted."""
    R = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    return scale * x @ R.T + shift, R


def two_modes(distance=2.0, spread=0.1):
    return GaussianMixture([[-distance / 2, 0.0], [distance / 2, 0.0]], [spread**2 * np.eye(2)] * 2)


@pytest.mark.parametrize("dim, limit", [(1, 3.2905), (2, math.sqrt(-2 * math.log(1e-3))), (3, 4.0331)])
def test_the_limit_of_one_gaussian_is_that_of_chi_squared(dim, limit):
    """In the plane |x| > r has probability exp(-r^2 / 2); in one and three dimensions as tables have it. Whatever the
    covariance: it is counted in standard deviations of the direction that a sample lies in."""
    A = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64) + 2 * torch.eye(dim)
    mixture = GaussianMixture([[5.0] * dim], [(A @ A.T).numpy()])
    assert metrics.limit_of(mixture) == pytest.approx(limit, abs=1e-3)
    along = A[:, 0]  # A e_1 is one standard deviation from the mean, as is A e for every unit vector e
    x = mixture.means + torch.tensor([[limit - 2e-3], [limit + 2e-3]]) * along
    assert metrics.strays(x, mixture).tolist() == [False, True] and metrics.off_data(x, mixture) == 0.5


@pytest.mark.parametrize("spread", [0.6, 3.0])
def test_the_limit_of_components_that_overlap_is_what_many_draws_of_them_say(spread):
    """Broad ones with a narrow one between them, far into each other: a million draws, counted by hand."""
    means, spreads = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.3]]).double(), torch.tensor([1, 1, 0.3]) * spread
    mixture = GaussianMixture(means, [float(s) ** 2 * np.eye(2) for s in spreads], [0.5, 0.3, 0.2])
    x = mixture.sample(1_000_000, torch.Generator().manual_seed(9))
    least = torch.stack([(x - mean).norm(dim=1) / s for mean, s in zip(means, spreads)]).amin(0)
    assert metrics.limit_of(mixture) == pytest.approx(
        np.quantile(least, 0.999), rel=0.01
    )  # of which the count is known to 0.003
    assert metrics.limit_of(mixture) < 3.7


def test_the_limit_where_nearly_all_samples_lie_within_a_rare_broad_component():
    """Only the hundredth that is drawn from the broad one is ever far: a tenth of these, at exp(-r^2 / 2) = 0.1."""
    mixture = GaussianMixture([[0.0, 0.0]] * 2, [np.eye(2), 100 * np.eye(2)], [0.99, 0.01])
    assert metrics.limit_of(mixture) == pytest.approx(math.sqrt(-2 * math.log(0.1)), rel=0.04)


@settings(max_examples=8, deadline=None)
@given(st.floats(0, 6.3), st.floats(0.1, 10), arrays(2), seeds)
def test_off_data_does_not_see_where_data_lie_how_they_are_turned_or_in_which_units(turn, scale, shift, seed):
    """Of a mixture, components stretched, and of rows; samples spread three times as far as the data."""
    generator = torch.Generator().manual_seed(seed)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.1]]).double()
    mixture = GaussianMixture([[0.0, 0.0], [9.0, 3.0]], [cov.numpy()] * 2)
    x, real = 3 * mixture.sample(400, generator), mixture.sample(500, generator)
    x_moved, R = moved(x, turn, scale, shift)
    means = moved(mixture.means, turn, scale, shift)[0]
    again = GaussianMixture(means, [(scale**2 * R @ cov @ R.T).numpy()] * 2)
    assert abs(metrics.off_data(x_moved, again) - metrics.off_data(x, mixture)) < 2 / 400  # one may lie on the edge
    assert abs(metrics.off_data(x_moved, moved(real, turn, scale, shift)[0]) - metrics.off_data(x, real)) < 2 / 400
    assert 0.2 < metrics.off_data(x, mixture) < 1 and 0.2 < metrics.off_data(x, real) < 1


def test_fresh_real_samples_have_one_in_a_thousand():
    """Of mixtures, and of rows that other rows are measured by: not by construction, these are other draws."""
    means = 3.0 * torch.cartesian_prod(*[torch.arange(3.0)] * 2)
    mixture = GaussianMixture(means, [0.09 * np.eye(2)] * 9)
    fresh = mixture.sample(100_000, torch.Generator().manual_seed(0))
    assert metrics.off_data(fresh, mixture) == pytest.approx(1e-3, abs=4e-4)
    of_rows = metrics.off_data(fresh, mixture.sample(40_000, torch.Generator().manual_seed(1)))
    assert of_rows == pytest.approx(1e-3, abs=7e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.floats(0.55, 1.45), seeds)
def test_a_bridge_between_modes_counts_and_how_the_mass_is_shared_does_not(bridge, place, seed):
    """Of 100 samples in two modes so many are drawn onto the way between them; the rest all go to one mode. By the
    mixture and by 5,000 rows of it alike."""
    mixture, generator = two_modes(), torch.Generator().manual_seed(seed)
    x = mixture.means[:1] + 0.03 * torch.randn(100, 2, generator=generator).double()
    x[:bridge] = torch.tensor([place - 1.0, 0.0]).double()
    rows = mixture.sample(5000, torch.Generator().manual_seed(1))
    for data in (mixture, rows, rows.float()):
        assert metrics.off_data(x, data) == pytest.approx(bridge / 100)
        assert metrics.strays(x, data).tolist() == [i < bridge for i in range(100)]


@settings(max_examples=30, deadline=None)
@given(arrays((7, 2)), st.floats(1, 3))
def test_off_data_grows_as_samples_leave_the_data(x, factor):
    """Rays from the mean of one Gaussian, and from a cloud of rows around it: what is off stays off farther out."""
    mixture = GaussianMixture([[0.0, 0.0]], [np.eye(2)])
    rows = mixture.sample(300, torch.Generator().manual_seed(0))
    assert not (metrics.strays(x, mixture) & ~metrics.strays(factor * x, mixture)).any()
    x = 4 * x / x.norm(dim=1, keepdim=True).clamp(min=1e-3)
    if metrics.off_data(x, rows) == 1:
        assert metrics.off_data(factor * x, rows) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3), st.floats(0.5, 6), seeds)
def test_what_is_off_data_lies_in_no_ball_of_the_real_but_the_largest_in_a_thousand(dim, far, seed):
    """Precision of k = 1 has a ball for each real sample, off_data one radius, that all of these but one in a thousand
    have at most: of 2,001 the two largest may be larger."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(2001, dim, generator=generator).double()
    x = far * torch.randn(200, dim, generator=generator).double()
    reach = torch.cdist(real, real).fill_diagonal_(math.inf).amin(1)
    usual = reach <= reach.sort()[0][-3]
    inside = (torch.cdist(x, real[usual]) <= reach[usual]).any(1)
    assert not (inside & metrics.strays(x, real)).any()
    precise = metrics.precision_recall_coverage(x, real, k=1)["precision"]
    assert metrics.off_data(x, real) <= 1 - precise + (torch.cdist(x, real[~usual]) <= reach[~usual]).double().sum()


def test_precision_sees_density_around_a_sample_and_off_data_does_not():
    """A dense and a sparse cloud: what lies just outside the dense one is imprecise, but no farther from the data than
    samples of the sparse one are from each other. What is in neither is both."""
    generator = torch.Generator().manual_seed(0)
    dense, sparse = 0.01 * torch.randn(900, 2, generator=generator), torch.rand(100, 2, generator=generator) + 1
    real, beside = torch.cat([dense, sparse]), torch.tensor([[0.0, 0.08], [0.08, 0.0]])
    neither = torch.tensor([[2.6, 2.6], [-1.0, -1.0]])
    for x, off in ((beside, 0.0), (neither, 1.0)):
        assert metrics.precision_recall_coverage(x.expand(4, 2, 2).flatten(0, 1), real)["precision"] == 0
        assert metrics.off_data(x, real) == off


@settings(deadline=None)
@given(arrays((6, 3)), arrays((9, 3)), st.integers(1, 9), st.booleans())
def test_nearest_is_its_definition(x, y, k, high):
    """By sorted lists, in 3 dimensions and, by other means, in 9; what is not finite is infinitely far."""
    if high:
        x, y = (torch.cat([part] * 3, dim=1) for part in (x, y))
    expected = [sorted((a - b).norm().item() for b in y)[k - 1] for a in x]
    assert metrics.nearest(x, y, k).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_limit_itself_is_not_off():
    """Rows at whole numbers, each at 1 from the nearest other: so is the limit. Of two distances 1 and 3 it is the
    0.999 quantile, counted from the largest down."""
    line = lambda *places: torch.tensor(places).double()[:, None]  # noqa: E731
    assert metrics.strays(line(-1.0, 10.0, 10.001, 4.5, -1.001), line(*map(float, range(10)))).tolist() == [
        False, False, True, False, True]  # fmt: skip
    assert metrics.limit_of(line(0.0, 1.0, 4.0)) == pytest.approx(3 - 2 * 2 * 0.001)


@pytest.mark.parametrize("dim", [2, 9])
def test_what_is_not_finite_is_off(dim):
    mixture = GaussianMixture([[0.0] * dim], [np.eye(dim)])
    x = torch.zeros(4, dim)
    x[0, 0], x[1, 1], x[2] = math.nan, math.inf, -math.inf
    for data in (mixture, mixture.sample(50, torch.Generator().manual_seed(0))):
        assert metrics.strays(x, data)[:3].all()
        assert metrics.off_data(x[3:].expand(2, dim), data) == 0


def test_wrong_use_says_what_is_allowed():
    with pytest.raises(ValueError, match=r"samples have shape \(3, 1\), this mixture takes \(n, 2\)"):
        metrics.off_data(torch.zeros(3, 1), two_modes())
    with pytest.raises(ValueError, match="samples must be"):
        metrics.energy_distance(torch.zeros(3, 2), torch.zeros(3, 1))
    x = torch.zeros(3, 2)
    for metric in (metrics.energy_distance, metrics.sliced_wasserstein, metrics.wasserstein, metrics.frechet,
                   metrics.precision_recall_coverage):  # fmt: skip
        for one in (torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 2, 1)):
            with pytest.raises(ValueError, match=r"must be \(n, D\) and \(m, D\), got \(3, 2\) and \(3,"):
                metric(x, one)
            with pytest.raises(ValueError, match=r"must be \(n, D\) and \(m, D\), got \(3"):
                metric(one, x)
        for sizes in ((1, 3), (3, 1), (0, 3)):
            with pytest.raises(ValueError, match="at least 2 samples, got {} and {}".format(*sizes)):
                metric(*(torch.zeros(n, 2) for n in sizes))
    with pytest.raises(ValueError, match="equally many samples, at most 5000, got 4 and 3"):
        metrics.wasserstein(torch.zeros(4, 2), x)
    with pytest.raises(ValueError, match="equally many"):
        metrics.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at most 5000"):
        metrics.wasserstein(torch.zeros(5001, 2), torch.zeros(5001, 2))


def gaussian(mean, cov, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(n, len(mean), generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov).T


@given(arrays((12, 3)), arrays((12, 3)), arrays((3, 3)), arrays(3))
def test_frechet_is_the_distance_of_the_fitted_gaussians(x, y, map, shift):
    """Against scipy's matrix square root; symmetric; a shift costs its square; one set against itself is zero."""
    x, y = x @ map, y
    root = scipy.linalg.sqrtm(x.T.cov().numpy() @ y.T.cov().numpy() + 1e-12 * np.eye(3))
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace().real
    close(metrics.frechet(x, y), expected.item(), atol=1e-4, rtol=1e-4)
    close(metrics.frechet(y, x), metrics.frechet(x, y), atol=1e-5, rtol=1e-5)
    close(metrics.frechet(x, x + shift), shift.square().sum().item(), atol=1e-5, rtol=1e-5)


def test_neighbours_tell_what_is_missing_from_what_is_wrong():
    """Real data in two places. Samples in one: precise, half is not recalled or covered. Samples in a third place as
    well: nothing missing, a third wrong."""
    at = lambda place, n, seed: gaussian(torch.tensor([10.0 * place, 0.0]).double(), torch.eye(2).double(), n, seed)  # noqa: E731
    real = torch.cat([at(0, 300, 0), at(1, 300, 1)])
    half = metrics.precision_recall_coverage(at(0, 600, 2), real)
    assert half["precision"] > 0.95 and 0.4 < half["recall"] < 0.52 and 0.4 < half["coverage"] < 0.52
    more = metrics.precision_recall_coverage(torch.cat([at(place, 300, 3 + place) for place in range(3)]), real)
    assert 0.6 < more["precision"] < 0.69 and more["recall"] > 0.9 and more["coverage"] > 0.9
    same = metrics.precision_recall_coverage(real, real)
    assert same == {"precision": 1.0, "recall": 1.0, "coverage": 1.0}
    point = metrics.precision_recall_coverage(real[:1].expand(600, 2) + 1e-3 * at(0, 600, 9), real)
    assert point["recall"] < 0.05 and point["coverage"] < 0.05 and point["precision"] > 0.95, "a collapse shows"


@given(arrays((8, 2)), arrays((9, 2)), st.integers(1, 7))
def test_neighbours_are_their_definition(x, y, k):
    """By sorted lists of distances: the ball of a point reaches to its k-th nearest other one, its edge included."""
    distance = lambda a, b: (a - b).norm().item()  # noqa: E731
    reach = lambda points, i: sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]  # noqa: E731
    x, y = (points + 0.01 * torch.randn(points.shape, generator=torch.Generator().manual_seed(len(points))).double()
            for points in (x, y))  # fmt: skip
    share = lambda held: sum(held) / len(held)  # noqa: E731
    of_x, of_y = ([reach(points, i) for i in range(len(points))] for points in (x, y))
    expected = {
        "precision": share([any(distance(a, b) <= of_y[j] for j, b in enumerate(y)) for a in x]),
        "recall": share([any(distance(b, a) <= of_x[i] for i, a in enumerate(x)) for b in y]),
        "coverage": share([any(distance(b, a) <= of_y[j] for a in x) for j, b in enumerate(y)]),
    }
    assert metrics.precision_recall_coverage(x, y, k) == pytest.approx(expected)
    if k == 5:
        assert metrics.precision_recall_coverage(x, y) == pytest.approx(expected)


def test_the_edge_of_a_ball_is_in_it_and_five_is_the_usual_number_of_neighbours():
    """Real points 0, 1, ..., 9: the ball of 0 reaches to 5, that of 4 to 3 from it. More than k points are enough."""
    line = lambda *places: torch.tensor(places).double()[:, None]  # noqa: E731
    real = line(*range(10))
    for place, share in ((14.0, 1.0), (14.01, 0.5)):
        assert metrics.precision_recall_coverage(line(0.0, place), real, k=1) == pytest.approx(
            {"precision": 0.5, "recall": 1.0, "coverage": 0.2})  # fmt: skip
        far = torch.cat([line(place), line(*[0.0] * 5)])
        assert metrics.precision_recall_coverage(far, real)["precision"] == pytest.approx((5 + (share == 1)) / 6)
    assert set(metrics.precision_recall_coverage(real[:6], real[:6]).values()) == {1.0}


def test_all_metrics_of_points_are_those_of_above():
    """Energy distance and diversity on the first 5,000, coverage of a mixture that is known."""
    x, y = (gaussian(torch.zeros(2).double(), torch.eye(2).double(), 5002, seed) for seed in range(2))
    x[5000:] += 1e3
    y[5000:] -= 1e4
    expected = {
        "sliced_wasserstein": metrics.sliced_wasserstein(x, y, projections=256, seed=0),
        "off_data": metrics.off_data(x, y),
        "energy_distance": metrics.energy_distance(x[:5000], y[:5000]),
        "diversity": metrics.diversity(x[:1000], torch.zeros(1000)),
    }
    found = metrics.measure_points(x, y)
    assert found.keys() == expected.keys() and found["diversity"] == pytest.approx(torch.pdist(x[:5000]).mean().item())
    assert found["sliced_wasserstein"] == expected["sliced_wasserstein"] > 100
    assert found["energy_distance"] == expected["energy_distance"] < 0.1
    assert found["off_data"] == expected["off_data"] < 0.01
    assert metrics.measure_points(x, y, y + 1e3)["off_data"] == 5000 / 5002
    assert found["diversity"] == pytest.approx(expected["diversity"], rel=0.05)
    mixture = GaussianMixture([[0.0, 0.0], [50.0, 0.0]], [np.eye(2)] * 2)
    assert metrics.measure_points(x[:100], y[:100], mixture)["coverage"] == 0.5
    assert metrics.measure_points(x[:100], y[:100], mixture)["off_data"] == metrics.off_data(x[:100], mixture)


def test_all_metrics_of_images_are_those_of_above():
    """Frechet distance of all, neighbours on the first 5,000; what needs labels or a classifier where there is one."""
    x, y = (gaussian(torch.zeros(2).double(), torch.eye(2).double(), 5001, seed) for seed in range(2))
    x[5000], y[5000] = 1e3, -1e3
    expected = {"frechet": metrics.frechet(x, y), "off_data": metrics.off_data(x[:5000], y[:5000])}
    expected |= {**metrics.precision_recall_coverage(x[:5000], y[:5000])}
    assert metrics.measure_images(x, None, y) == expected and expected["coverage"] < 1
    some, label, real = x[:50], (x[:50, 1] > x[:50, 0]).long(), y[:60]
    diversity = {"diversity": metrics.diversity(some, label)}
    own = {"frechet": metrics.frechet(some, real), "off_data": metrics.off_data(some, real)}
    own |= {**metrics.precision_recall_coverage(some, real), **diversity}
    assert metrics.measure_images(some, label, real) == own

    class Net:
        last = staticmethod(lambda x: torch.stack([x[:, 0], x[:, 1], torch.full((len(x),), 1.0)], 1))

    share = sum(max(a, b, 1.0) == (b if k else a) for (a, b), k in zip(some.tolist(), label.tolist())) / 50
    assert metrics.measure_images(some, label, real, Net) == {**own, "accuracy": share} and 0 < share < 1
    assert metrics.measure_images(some, None, real, Net).keys() == {
        "frechet",
        "off_data",
        "precision",
        "recall",
        "coverage",
    }


def test_more_rows_than_one_piece_of_a_computation():
    """Distances are computed by pieces of 1,024 rows: as those of all at once."""
    x, y = (
        gaussian(torch.tensor(mean).double(), torch.eye(1).double(), n, n) for mean, n in (([0.0], 1100), ([1.0], 1300))
    )
    all_at_once = 2 * (x - y.T).abs().mean() - torch.pdist(x).mean() - torch.pdist(y).mean()
    close(metrics.energy_distance(x, y), all_at_once.item())
    of_x, of_y = ((points - points.T).abs().sort(1)[0][:, 5] for points in (x, y))
    apart = (x - y.T).abs()
    expected = [(apart <= of_y).any(1), (apart <= of_x[:, None]).any(0), (apart <= of_y).any(0)]
    found = metrics.precision_recall_coverage(x, y)
    assert list(found.values()) == [inside.double().mean().item() for inside in expected]
    assert metrics.wasserstein(x[:2], y[:2]) == pytest.approx(
        ((x[:2].sort(0)[0] - y[:2].sort(0)[0]) ** 2).mean() ** 0.5
    )


def test_directions_are_fixed_by_the_seed_and_even_over_the_sphere():
    """The usual ones are 256 of seed 0; a set and its mirror image in a corner are told apart, turned axes are not."""
    x, y = (gaussian(torch.zeros(3).double(), torch.eye(3).double(), 50, seed) for seed in range(2))
    value = metrics.sliced_wasserstein(x, y)
    assert value == metrics.sliced_wasserstein(x, y, 256, 0) != metrics.sliced_wasserstein(x, y, 256, 1)
    assert value != metrics.sliced_wasserstein(x, y, 255)
    many = [metrics.sliced_wasserstein(x + shift, x, 20_000) for shift in 3.0 * torch.eye(3).double()]
    assert many == pytest.approx([3**0.5] * 3, rel=0.02)
    wide = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).double()
    assert metrics.sliced_wasserstein(wide + 2.0, wide, 4096) == pytest.approx(2.0, rel=0.05)


@given(arrays((8, 2)), arrays(2), st.floats(0.1, 3))
def test_coverage_measures_along_the_axes_of_a_component(x, mean, radius):
    """Its standard deviations are those of its covariance: (x - m) S^-1 (x - m) at most their square."""
    S = torch.tensor([[4.0, 1.8], [1.8, 1.0]]).double()
    far = ((x - mean) @ torch.linalg.inv(S) * (x - mean)).sum(1).sqrt()
    assume((far - radius).abs().min() > 1e-9)
    assert metrics.coverage(x, GaussianMixture(mean[None], S[None]), radius) == ((far <= radius).sum() >= 4)


def test_five_thousand_samples_can_be_assigned(monkeypatch):
    monkeypatch.setattr(metrics, "linear_sum_assignment", lambda cost: (np.arange(len(cost)),) * 2)
    x = torch.zeros(5000, 1)
    assert metrics.wasserstein(x, x + 2) == 2


def test_coverage_needs_half_of_what_is_due_within_three_standard_deviations():
    """Two components with weights 3 and 1 and standard deviations 1 and 2, along the first axis; 8 samples, so that 6
    and 2 are due. A sample belongs to the component that is nearer in its own standard deviations."""
    mixture = GaussianMixture([[0.0, 0.0], [12.0, 0.0]], [np.eye(2), 4 * np.eye(2)], [3, 1])
    value = lambda *places, **how: metrics.coverage(torch.tensor([[p, 0.0] for p in places]), mixture, **how)  # noqa: E731
    far = [100.0]
    assert value(*[2.99] * 3, 6.01, *far * 4) == 1  # 3 of 6 and 1 of 2, each at 3 standard deviations
    assert value(*[3.0] * 3, 6.0, *far * 4) == 1  # the edge itself
    assert value(*[2.99] * 2, 6.01, *far * 5) == 0.5
    assert value(*[3.01] * 3, 6.01, *far * 4) == 0.5
    assert value(*[-2.99] * 3, 5.99, *far * 4) == 0.5
    assert value(*[3.01] * 3, 5.99, *far * 4, radius=3.02) == 1
    assert value(*[3.99] * 3, 4.01, *far * 4, radius=4) == 1  # 4 from the first, 8 / 2 from the second
    assert value(*[4.01] * 7, 3.99, radius=5) == 0.5 and value(*[5.0] * 8, radius=5) == 0.5


@given(arrays((8, 3)), st.floats(0, 1), st.permutations(range(8)))
def test_diversity_shrinks_with_the_samples_and_sees_classes_apart(x, shrink, order):
    """The mean distance of pairs within a class: linear in scale, blind to order and to distance between classes."""
    label = torch.arange(8) % 2
    pairs = [(x[i] - x[j]).norm() for i in range(8) for j in range(i) if label[i] == label[j]]
    value = metrics.diversity(x, label)
    close(value, torch.stack(pairs).mean().item())
    close(metrics.diversity(shrink * x, label), shrink * value)
    close(metrics.diversity((x + 100 * label[:, None])[order], label[list(order)]), value, atol=1e-6, rtol=1e-6)


def test_diversity_is_of_the_first_thousand_of_a_class_and_needs_two():
    x, label = torch.zeros(1005, 1), torch.cat([torch.zeros(1002), torch.ones(2), torch.full((1,), 2.0)])
    x[1000:1002], x[1002:1004], x[1004] = 1e6, torch.tensor([[0.0], [3.0]]), 1e9
    assert metrics.diversity(x, label) == 1.5


@given(seeds, st.integers(2, 8))
@settings(max_examples=20)
def test_frechet_of_sets_on_a_line(seed, D):
    """No covariance has an inverse, and rounding makes eigenvalues negative: the square of the spreads' difference."""
    draw = torch.Generator().manual_seed(seed)
    a, direction = torch.randn(20, 1, generator=draw).double(), torch.randn(1, D, generator=draw).double()
    x = (a - a.mean()) @ direction
    for scale in (0.0, 0.5, 3.0):
        close(metrics.frechet(x, scale * x), (1 - scale) ** 2 * x.var(0).sum().item(), atol=1e-6, rtol=1e-6)


def test_wrong_use_of_image_metrics_is_refused():
    x = torch.zeros(4, 2)
    for n, m in ((4, 4), (5, 5), (5, 9), (9, 5)):
        with pytest.raises(ValueError, match=f"more than k = 5 samples in each set, got {n} and {m}"):
            metrics.precision_recall_coverage(torch.zeros(n, 2), torch.zeros(m, 2))
    with pytest.raises(ValueError, match="a class with two samples"):
        metrics.diversity(x, torch.arange(4))
    with pytest.raises(ValueError, match="a label for each"):
        metrics.diversity(x, torch.arange(3))
    with pytest.raises(ValueError, match="samples must be"):
        metrics.frechet(x, torch.zeros(4, 3))
