"""Pictures: what a text is drawn as, and points of any number and dimension. A warning of the drawing is an error."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from tinytwinflow.evaluation import pictures
from tinytwinflow.evaluation.pictures import draw, draw_comparison, draw_one, scatter, words


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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn instead of written."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (figure.canvas.draw(), figures.append(figure)))
    return figures


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_what_is_off_data_is_marked_and_its_share_is_that_of_all(drawn, dim):
    """Of 10,000 points 8,000 are drawn; the share is of all. Without a mark nothing is said."""
    x = np.random.default_rng(0).standard_normal((10_000, dim))
    off = np.isin(np.arange(10_000), [0, 4000, 8000, 9000, 9999])  # two of them are drawn
    config = {"method": "twinflow", "steps": 3, "warmup_steps": 0, "base_steps": 0}
    log = [{"step": step, "total": 1.0, "gap": 1.0} for step in (1, 2, 3)]
    draw("", [("data", x, "grey", None), ("fakes", x, "red", off)], log, config, "title")
    data, fakes = drawn[0].axes[:2]
    assert data.get_title() == "data" and fakes.get_title() == "fakes\n0.05% off data"
    if dim > 1:
        assert len(data.collections) == 1 and len(fakes.collections) == 2
        assert np.array_equal(fakes.collections[1].get_offsets(), x[[0, 4000], :2])


def test_the_comparison_has_the_best_on_top_by_each_yardstick_with_lines_to_reach(drawn):
    """b before a by sliced W2, a before b by off data, of which flow matching has none at all; c diverged: below."""
    worth = {"a": (0.3, 0.01), "b": (0.2, 0.02), "flow matching": (0.4, 0.0)}
    spreads = {"diverged": [], "sliced_wasserstein_spread": 0.1, "off_data_spread": 0.001}
    rows = [
        {"data": "moons", "method": method, "nfe": nfe, "sliced_wasserstein": w / nfe, "off_data": off / nfe, **spreads}
        for method, (w, off) in worth.items() for nfe in ((1, 2, 4, 8, 100) if method == "flow matching" else (1, 2))
    ]  # fmt: skip
    rows.append({"data": "moons", "method": "c", "nfe": 1, "diverged": ["seed 0: step 3"]})
    floors = {"moons": {"sliced_wasserstein": 0.02, "off_data": 0.001}}
    draw_comparison("", rows, floors, ["moons"], dict.fromkeys(["c", "flow matching", "a", "b"], "one"))
    for axis, order, flow, real in zip(
        drawn[0].axes, (["b", "a", "flow matching", "c"], ["flow matching", "a", "b", "c"]), (0.004, 0.0), (0.02, 0.001)
    ):
        assert [label.get_text() for label in axis.get_yticklabels()][::-1] == order
        lines = {line.get_label(): line.get_xdata()[0] for line in axis.lines if len(line.get_xdata())}
        assert (lines["flow matching, 100 NFE"], lines["real data"]) == (flow, real)
        digits = [line for line in axis.lines if line.get_marker() in ("$2$", "$4$", "$8$")]
        assert len(digits) == 3 + 1 + 1
