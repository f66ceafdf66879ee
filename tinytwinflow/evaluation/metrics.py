"""How far a set of samples is from real data: a few numbers with exact definitions.

Samples are rows, x (n, D) and y (m, D). Every distance is zero in expectation or in the limit only
when the distributions agree; between two finite sets of real data it is not zero, so a figure means
little without that floor next to it.
"""

import functools
import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.special import gammaincinv

from ..method.exact import GaussianMixture

RARE = 1e-3  # of real samples, the share that is off the data: the edge of the data leaves out so many


def _check(x, y):
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"samples must be (n, D) and (m, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"each set needs at least 2 samples, got {len(x)} and {len(y)}")


def sliced_wasserstein(x, y, projections=256, seed=0):
    """Sliced Wasserstein-2 distance: sqrt of the mean over directions of W2^2 of the projected sets.

    x, y (n, D), equally many. Directions are uniform on the sphere, fixed by the seed; in one
    dimension W2 pairs the sorted values.
    """
    _check(x, y)
    if len(x) != len(y):
        raise ValueError(f"sliced_wasserstein needs equally many samples, got {len(x)} and {len(y)}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64).to(x)
    directions = directions / directions.norm(dim=0)
    total = 0.0
    for some in directions.split(32, dim=1):
        total += ((x @ some).sort(0)[0] - (y @ some).sort(0)[0]).square().mean(0).sum().item()
    return (total / projections) ** 0.5


def energy_distance(x, y):
    """Squared energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (may be slightly negative).

    x (n, D), y (m, D). Pairs of a sample with itself are left out, which makes it unbiased.
    """
    _check(x, y)

    def mean_distance(a, b, pairs):
        return sum(torch.cdist(some, b).sum(dtype=torch.float64).item() for some in a.split(1024)) / pairs

    n, m = len(x), len(y)
    within = mean_distance(x, x, n * (n - 1)) + mean_distance(y, y, m * (m - 1))
    return 2 * mean_distance(x, y, n * m) - within


def wasserstein(x, y):
    """Exact Wasserstein-2 distance of two sets of n samples, by optimal assignment.  O(n^3): n <= 5,000."""
    _check(x, y)
    if len(x) != len(y) or len(x) > 5000:
        raise ValueError(f"wasserstein needs equally many samples, at most 5000, got {len(x)} and {len(y)}")
    cost = torch.cdist(x.double(), y.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean() ** 0.5)


def coverage(x, mixture, radius=3.0):
    """Share of a mixture's components that the samples cover.  (n, D) -> number in [0, 1].

    A sample belongs to the nearest component (in that component's standard deviations) if it lies
    within `radius` of them; a component is covered if it gets at least half the samples due to it.
    """
    distance, component = deviations(x, mixture).min(0)
    hits = torch.bincount(component[distance <= radius], minlength=len(mixture.means))
    return (hits >= 0.5 * mixture.weights * len(x)).double().mean().item()


def deviations(x, mixture):
    """Distance of each sample from each component of a mixture, in its standard deviations.  (n, D) -> (K, n)"""
    if x.ndim != 2 or x.shape[1] != mixture.means.shape[1]:
        raise ValueError(f"samples have shape {tuple(x.shape)}, this mixture takes (n, {mixture.means.shape[1]})")
    error = x.double()[None] - mixture.means[:, None]
    return torch.linalg.solve_triangular(torch.linalg.cholesky(mixture.covs), error.mT, upper=False).norm(dim=1)


def nearest(x, y, k=1):
    """Distance of each row of x to its k-th nearest of y, not finite where x is not.  (n, D), (m, D) -> (n,)"""
    _check(x, y)
    x, y = x.double(), y.double()
    if x.shape[1] > 8:
        return torch.cat([torch.cdist(some, y).topk(k, largest=False)[0][:, -1] for some in x.split(1024)])
    distance, finite = torch.full((len(x),), math.inf, dtype=x.dtype), x.isfinite().all(1)
    distance[finite] = torch.from_numpy(cKDTree(y.numpy()).query(x[finite].numpy(), [k])[0][:, 0])
    return distance


@functools.lru_cache(maxsize=32)
def _limit_of_mixture(mixture, n=100_000):
    """By n points of a mixture that are evenly spread over the farthest fiftieth from their own component.

    So it is exact, up to 1e-3, where components do not overlap; by all points where they lie on top of each other.
    """
    generator, L, D = torch.Generator().manual_seed(0), torch.linalg.cholesky(mixture.covs), mixture.means.shape[1]
    for share in (0.02, 1.0):
        quantiles = 1 - share * (np.arange(n) + 0.5) / n
        own, distance = torch.from_numpy(np.sqrt(2 * gammaincinv(D / 2, quantiles))), []
        for radius in own.split(10_000):
            k = torch.multinomial(mixture.weights, len(radius), replacement=True, generator=generator)
            step = torch.randn(len(radius), D, 1, generator=generator, dtype=torch.float64)
            step = L[k] @ (step * (radius[:, None, None] / step.norm(dim=1, keepdim=True)))
            distance.append(deviations(mixture.means[k] + step[..., 0], mixture).amin(0))
        limit = torch.cat(distance).quantile(1 - RARE / share)
        if limit >= own[-1]:
            break  # no point that is nearer to its own component lies beyond it
    return limit.item()


def limit_of(data):
    """How far from the data all but one in a thousand of fresh real samples are at most.

    data: a GaussianMixture, distances being deviations from its nearest component; or real samples (m, D), distances
    being those to the nearest, of each of them to the nearest other one. Of fewer than a thousand it is about the
    largest of these, so that it tells little of few samples; it is 0 where nearly each has a copy among them.
    """
    if isinstance(data, GaussianMixture):
        return _limit_of_mixture(data)
    return nearest(data, data, 2).quantile(1 - RARE).item()


def strays(x, data):
    """Which samples are off the data, farther from it than its limit, or not finite.  (n, D) -> (n,) bool

    data: as for `limit_of`.
    """
    distance = deviations(x, data).amin(0) if isinstance(data, GaussianMixture) else nearest(x, data)
    return ~(distance <= limit_of(data))


def off_data(x, data):
    """Share of samples farther from the data than all but one in a thousand fresh real samples are.  (n, D) -> [0, 1]

    data: a GaussianMixture, or many real samples (m, D), see `limit_of`. Fresh real samples have about 0.001. Unlike a
    distance of distributions it sees a bridge between two modes, and not how the mass is shared out among them.

    Its relation to precision, which asks whether a sample lies in the ball of a real one that reaches to the k-th
    nearest other: the limit is the radius that all but one in a thousand of these balls have at most for k = 1, and
    here all balls have that one radius. So precision counts what is rarer than the data around it, off_data what is far
    from all data; by k = 1 what is off data lies in no ball but the largest one in a thousand.
    """
    return strays(x, data).double().mean().item()


def frechet(x, y):
    """Frechet distance |mean x - mean y|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)) of the Gaussians fitted to two sets.

    x (n, D), y (m, D), features of images. A square, not a root, as is custom. It depends on the features:
    published FIDs are of one particular Inception file and way to resize. Biased upwards for few samples: compare
    only figures of equal n.
    """
    _check(x, y)
    x, y = x.double(), y.double()
    Cx, Cy = x.T.cov().view(x.shape[1], -1), y.T.cov().view(x.shape[1], -1)
    values, vectors = torch.linalg.eigh(Cx)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ Cy @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + Cx.trace() + Cy.trace() - 2 * cross).item()


def _radius(x, k):
    """Distance of each row to its k-th nearest other row.  (n, D) -> (n,)."""
    return torch.cat([torch.cdist(some, x).kthvalue(k + 1, dim=1)[0] for some in x.split(1024)])


def _any_near(x, y, radius):
    """Whether each row of x has a y within a radius, that of x (n, 1) or of y (m,).  (n, D), (m, D) -> (n,) bool."""
    radius = radius.expand(len(x), len(y))
    return torch.cat([(torch.cdist(some, y) <= r).any(1) for some, r in zip(x.split(1024), radius.split(1024))])


def precision_recall_coverage(x, y, k=5):
    """Precision, recall and coverage of samples x against real y by balls to the k-th nearest neighbour.

    precision: share of samples inside the ball of a real one; recall: share of real ones inside the
    ball of a sample (arXiv 1904.06991); coverage: share of real ones whose own ball holds a sample
    (arXiv 2002.09797). Each needs more than k rows in both sets.
    """
    _check(x, y)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"neighbours needs more than k = {k} samples in each set, got {len(x)} and {len(y)}")
    real, own = _radius(y, k), _radius(x, k)
    kinds = {
        "precision": _any_near(x, y, real),
        "recall": _any_near(y, x, own),
        "coverage": _any_near(y, x, real[:, None]),
    }
    return {name: inside.double().mean().item() for name, inside in kinds.items()}


def diversity(x, label):
    """Mean distance of two samples of the same class, averaged over classes.  (n, D), (n,) -> number.

    It falls towards zero when the samples of a class collapse onto one. Classes of one sample are left out.
    """
    if len(x) != len(label):
        raise ValueError(f"diversity needs a label for each sample, got {len(x)} and {len(label)}")
    groups = [x[label == value] for value in label.unique()]
    means = [torch.pdist(group[:1000]).mean() for group in groups if len(group) > 1]
    if not means:
        raise ValueError("diversity needs a class with two samples")
    return torch.stack(means).mean().item()


def measure_points(samples, real, near=None):
    """All metrics of a set of points.  (n, D), (n, D) -> dict.

    near: the data as `off_data` takes them, a GaussianMixture or many real samples, by default `real`. The energy
    distance is taken on the first 5,000 of each; diversity is the mean distance of two of the first 5,000 samples, to
    be set against that of real data; coverage is given where the mixture is known.
    """
    values = {
        "sliced_wasserstein": sliced_wasserstein(samples, real),
        "off_data": off_data(samples, real if near is None else near),
        "energy_distance": energy_distance(samples[:5000], real[:5000]),
        "diversity": torch.pdist(samples[:5000]).mean().item(),
    }
    if isinstance(near, GaussianMixture):
        values["coverage"] = coverage(samples, near)
    return values


def measure_images(x, label, real, net=None):
    """All metrics of a set of images from their features.  (n, D), (n,) or None, (m, D) -> dict.

    Neighbours, those of off_data too, on the first 5,000 of each; with labels, diversity within a class, and, given
    the classifier `net`, accuracy: the share that it gives the label they were made for.
    """
    some, of_real = x[:5000], real[:5000]
    values = {"frechet": frechet(x, real), "off_data": off_data(some, of_real)}
    values |= precision_recall_coverage(some, of_real)
    if label is not None:
        values["diversity"] = diversity(x, label)
    if label is not None and net is not None:
        values["accuracy"] = (net.last(x).argmax(1) == label).double().mean().item()
    return values
