"""Pictures: what a text is drawn as, and points of any number and dimension. A warning of the drawing is an error."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from tinytwinflow.evaluation.pictures import draw_one, scatter, words


def pixels(title):
    """A picture with a title, as an array."""
    file = io.BytesIO()
    draw_one(file, np.random.default_rng(0).standard_normal((50, 2)), title)
    return np.asarray(Image.open(file).convert("L"))


@settings(max_examples=10)
@given(st.text("$ab{}_^\\%#&~\n\t\x00\ud8000数据데デ😀", max_size=12))
def test_any_name_is_drawn_without_a_warning_or_a_fault(name):
    pixels(name)


def test_a_name_is_drawn_as_it_is_and_not_as_a_formula():
    assert words("a $1 b $2") == r"a \$1 b \$2" and words("run_1^2 {x}") == "run_1^2 {x}"
    assert words("数据 é\n") == r"\u6570\u636e é\n"
    assert (pixels("$a$") != pixels("a")).any()


@pytest.mark.parametrize("n, dim", [(1, 1), (1, 2), (2, 3), (100, 1)])
def test_few_points_and_points_of_one_dimension_are_drawn(n, dim):
    draw_one(io.BytesIO(), np.ones((n, dim)), "ones")


def test_one_dimension_is_a_histogram():
    """Its bars are the density of the points that lie within the limits."""
    axis, x = Figure().subplots(), np.array([[0.1], [0.12], [0.9]])
    scatter(axis, x, "x", "red", [(0, 1)])
    heights = np.array([bar.get_height() for bar in axis.patches])
    middles = np.array([bar.get_x() + bar.get_width() / 2 for bar in axis.patches])
    assert heights.sum() * axis.patches[0].get_width() == pytest.approx(1)
    assert heights[(middles > 0.08) & (middles < 0.14)].sum() == pytest.approx(2 * heights[middles > 0.8].sum())
