"""Shared strategies. Numbers come from Hypothesis, so that a failing case shrinks to a readable one."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytwinflow as ttf

settings.register_profile("exact", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("exact")
torch.set_num_threads(1)

numbers = st.floats(-3, 3, width=32).map(lambda a: round(a, 3))
unit = st.floats(0, 1).map(lambda a: round(a, 4))
inside = st.floats(0.02, 0.98).map(lambda a: round(a, 4))
seeds = st.integers(0, 2**31 - 1)


def arrays(shape, elements=numbers):
    """Float64 tensors of a shape."""
    return hnp.arrays(np.float64, shape, elements=elements).map(torch.from_numpy)


@st.composite
def batches(draw, count, dims=None):
    """`count` tensors of one shape (B, *D), D of one to three axes, and times (B,)."""
    shape = (draw(st.integers(1, 4)), *(dims or draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))))
    return [draw(arrays(shape)) for _ in range(count)], draw(arrays(shape[0], unit))


@st.composite
def mixtures(draw, dim=None, components=3):
    """Gaussian mixtures with full covariances, of any dimension up to 3."""
    D, K = dim or draw(st.integers(1, 3)), draw(st.integers(1, components))
    means = draw(arrays((K, D), st.floats(-2, 2).map(lambda a: round(a, 2))))
    root = draw(arrays((K, D, D), st.floats(-0.5, 0.5).map(lambda a: round(a, 2))))
    weights = draw(arrays(K, st.floats(0.2, 1).map(lambda a: round(a, 2))))
    return ttf.GaussianMixture(means, root @ root.mT + 0.3 * torch.eye(D, dtype=torch.float64), weights)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
