"""Two-dimensional data sets, each drawn afresh as often as it is asked for.

Every set is a function (n, generator) -> points (n, 2) and labels (n,), scaled to a spread of about
one in each direction, the spread of the noise. The label says which piece of the set a point is from.
"""

import functools
import math

import torch

from ..method.exact import GaussianMixture


def _uniform(n, generator, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(n, generator=generator)


def _normal(n, generator, scale):
    return scale * torch.randn(n, 2, generator=generator)


def _pieces(n, generator, k):
    return torch.randint(k, (n,), generator=generator)


def _polar(radius, angle):
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


@functools.cache
def _eight():
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixture(math.sqrt(2) * _polar(torch.ones(8), angle), (0.1**2 * torch.eye(2)).expand(8, 2, 2))


@functools.cache
def _twenty_five():
    axis = torch.linspace(-1.4, 1.4, 5)
    return GaussianMixture(torch.cartesian_prod(axis, axis), (0.07**2 * torch.eye(2)).expand(25, 2, 2))


def checkerboard(n, generator):
    k = _pieces(n, generator, 8)
    column, row = k % 4, k // 4
    corner = torch.stack([column - 2, 2 * row - 2 + column % 2], 1)
    return (corner + torch.rand(n, 2, generator=generator)) / 1.15, k


def moons(n, generator):
    k, angle = _pieces(n, generator, 2), _uniform(n, generator, 0, math.pi)
    upper, lower = _polar(torch.ones(n), angle), _polar(torch.ones(n), angle + math.pi) + torch.tensor([1.0, 0.5])
    x = torch.where(k[:, None] == 0, upper, lower) + _normal(n, generator, 0.05)
    return (x - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]), k


def swissroll(n, generator):
    angle = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
    x = _polar(angle, angle) + _normal(n, generator, 0.3)
    return (x - torch.tensor([1.95, 0.18])) / 6.8, torch.zeros(n, dtype=torch.long)


def circles(n, generator):
    k = _pieces(n, generator, 2)
    radius = torch.where(k == 0, 1.0, 0.4)
    return 1.8 * (_polar(radius, _uniform(n, generator, 0, 2 * math.pi)) + _normal(n, generator, 0.04)), k


def rings(n, generator):
    k = _pieces(n, generator, 4)
    return 0.5 * (_polar(k + 1.0, _uniform(n, generator, 0, 2 * math.pi)) + _normal(n, generator, 0.08)), k


def pinwheel(n, generator):
    k, x = _pieces(n, generator, 5), _normal(n, generator, 1.0) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angle = 2 * math.pi / 5 * k + 0.25 * x[:, 0].exp()
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos], 1)
    return 1.3 * turned, k


def two_spirals(n, generator):
    k, angle = _pieces(n, generator, 2), 3 * math.pi * _uniform(n, generator).sqrt()
    x = _polar(angle, angle + math.pi * k) + _normal(n, generator, 0.25)
    return x / 4.7, k


def scurve(n, generator):
    s = 3 * math.pi * _uniform(n, generator, -0.5, 0.5)
    x = torch.stack([s.sin(), s.sign() * (s.cos() - 1)], 1) + _normal(n, generator, 0.05)
    return x / torch.tensor([0.75, 1.2]), torch.zeros(n, dtype=torch.long)


def sine(n, generator):
    s = _uniform(n, generator, -math.pi, math.pi)
    x = torch.stack([s / 1.8, 1.4 * (2 * s).sin()], 1) + _normal(n, generator, 0.08)
    return x, torch.zeros(n, dtype=torch.long)


MIXTURES = {"8gaussians": _eight, "25gaussians": _twenty_five}
SETS = {
    "checkerboard": checkerboard,
    "moons": moons,
    "swissroll": swissroll,
    "circles": circles,
    "rings": rings,
    "pinwheel": pinwheel,
    "2spirals": two_spirals,
    "scurve": scurve,
    "sine": sine,
}
TOYS = (*MIXTURES, *SETS)


def mixture(name):
    """The exact mixture behind a data set, or None where there is none."""
    return MIXTURES[name]() if name in MIXTURES else None


def draw_points(name, n, generator=None):
    """Draw n points of a named set.  -> x (n, 2) float32, labels (n,). Raises ValueError for another name."""
    if name in MIXTURES:
        return MIXTURES[name]().sample(n, generator, dtype=torch.float32, labels=True)
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(TOYS)}, or a FILE.npy or FILE.csv")
    return SETS[name](n, generator)


def count_labels(name):
    """Number of labels of a named set."""
    return int(draw_points(name, 4096, torch.Generator().manual_seed(0))[1].max()) + 1
