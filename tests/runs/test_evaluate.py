"""What a run is measured with: real data's own figure is taken of other samples than those that set the limit."""

import pytest
import torch

from tinytwinflow.data import toys
from tinytwinflow.data.given import as_data_set
from tinytwinflow.evaluation import metrics
from tinytwinflow.runs.evaluate import yardstick
from tinytwinflow.runs.recipes import configured


def yard_of(data=None, name=""):
    return yardstick(configured("toy") | {"data": name}, data)


@pytest.mark.parametrize("name", ["8gaussians", "checkerboard"])
def test_of_a_named_set_real_data_have_about_one_in_a_thousand_off(name):
    """By the mixture where there is one, else by 100,000 points; of 20,000 others 20 are due, give or take 4.5, and as
    many more or less for a limit that 100 of the 100,000 say."""
    yard = yard_of(name=name)
    assert yard.floor["off_data"] == pytest.approx(1e-3, abs=7e-4) and yard.floor["off_data"] > 0
    assert yard.floor["off_data"] != yard.measure(yard.real, None)["off_data"]
    assert yard.near is toys.mixture(name) if name == "8gaussians" else yard.near.shape == (100_000, 2)
    half = torch.cat([yard.real[:10_000], yard.real[:10_000] + 10])
    assert metrics.off_data(half, yard.near) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["table", "batches", "few rows", "many columns"])
def test_of_data_of_ones_own_too(kind):
    """A table by the rows that are trained on, batches and few rows by half of what is measured against: the other half
    is never among them. In more than 8 dimensions by 5,000."""
    generator = torch.Generator().manual_seed(0)
    n, D = {"table": (200_000, 2), "batches": (30_000, 2), "few rows": (200, 2), "many columns": (6000, 9)}[kind]
    x = torch.randn(n, D, generator=generator)
    data = as_data_set(list(x.split(500)) if kind == "batches" else x, 64 if kind != "batches" else None)
    yard, again = yard_of(data), data.fresh(20_000, 1)[0]
    assert len(yard.near) == {"table": 100_000, "batches": 15_000, "few rows": 100, "many columns": 5000}[kind]
    assert not (again[:200, None] == yard.near).all(2).any()
    assert yard.floor["off_data"] == metrics.off_data(again, yard.near)
    assert yard.floor["off_data"] <= (0.05 if kind == "few rows" else 0.01 if kind == "many columns" else 0.002)
    assert yard.measure(again + 20, None)["off_data"] == 1
