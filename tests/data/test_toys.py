"""The named sets: their number, scale and labels."""

import pytest
import torch

from tinytwinflow.data import toys


def test_there_are_at_least_ten_sets():
    assert len(toys.TOYS) >= 10
    assert {"8gaussians", "25gaussians", "checkerboard", "moons", "swissroll", "rings", "pinwheel", "2spirals"} <= {
        *toys.TOYS
    }


@pytest.mark.parametrize("name", toys.TOYS)
def test_sets_are_centred_with_a_spread_of_about_one(name):
    x, label = toys.draw_points(name, 20000, torch.Generator().manual_seed(0))
    assert x.shape == (20000, 2) and x.dtype == torch.float32 and label.shape == (20000,)
    assert x.mean(0).abs().max() < 0.15, x.mean(0)
    assert 0.75 < x.std(0).min() and x.std(0).max() < 1.25, x.std(0)
    assert sorted(label.unique().tolist()) == list(range(toys.count_labels(name)))
