"""How far a set of samples is from real data: a few numbers with exact definitions.

Samples are rows, x (n, D) and y (m, D). Every distance is zero in expectation or in the limit only
when the distributions agree; between two finite sets of real data it is not zero, so a figure means
little without that floor next to it.
"""

import torch
from scipy.optimize import linear_sum_assignment


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
    L = torch.linalg.cholesky(mixture.covs)
    error = x.double()[None] - mixture.means[:, None]
    deviations = torch.linalg.solve_triangular(L, error.mT, upper=False).norm(dim=1)
    distance, nearest = deviations.min(0)
    hits = torch.bincount(nearest[distance <= radius], minlength=len(mixture.means))
    return (hits >= 0.5 * mixture.weights * len(x)).double().mean().item()


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


def measure_points(samples, real, mixture=None):
    """All metrics of a set of points.  (n, D), (n, D) -> dict.

    The energy distance is taken on the first 5,000 of each; diversity is the mean distance of two of the first 5,000
    samples, to be set against that of real data; coverage is given where the mixture is known.
    """
    values = {
        "sliced_wasserstein": sliced_wasserstein(samples, real),
        "energy_distance": energy_distance(samples[:5000], real[:5000]),
        "diversity": torch.pdist(samples[:5000]).mean().item(),
    }
    if mixture is not None:
        values["coverage"] = coverage(samples, mixture)
    return values


def measure_images(x, label, real, net=None):
    """All metrics of a set of images from their features.  (n, D), (n,) or None, (m, D) -> dict.

    Neighbours on the first 5,000 of each; with labels, diversity within a class, and, given the classifier
    `net`, accuracy: the share that it gives the label they were made for.
    """
    values = {"frechet": frechet(x, real), **precision_recall_coverage(x[:5000], real[:5000])}
    if label is not None:
        values["diversity"] = diversity(x, label)
    if label is not None and net is not None:
        values["accuracy"] = (net.last(x).argmax(1) == label).double().mean().item()
    return values
