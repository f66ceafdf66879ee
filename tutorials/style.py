"""What the tutorials share: one size and one set of colours of pictures, a few kinds of them, seeded noise.

With TTF_QUICK=1 in the environment the notebooks take small numbers, for the tests.
"""

import io
import os

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from PIL import Image

from tinytwinflow.evaluation import pictures
from tinytwinflow.method import twin

QUICK = os.environ.get("TTF_QUICK") == "1"

# a colour means the same in every picture
DATA = "#777777"
ONE = pictures.ONE  # one step of the model
FLOW = pictures.FLOW  # flow matching, and what takes a hundred steps
INK = pictures.INK  # the gap, a single point, a line to compare with
FAKE = "#e69f00"  # fakes, and the twin's velocity
EXACT = "#009e73"  # known in closed form
OTHERS = ("#9b5fc0", "#56b4e9", "#8c6d31", "#cc79a7")

WIDTH = 10.0  # inches, of every picture

same = twin.same_time  # the time t for every row of x

plt.rcParams.update({
    "figure.dpi": 72, "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False, "lines.linewidth": 1.8,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#eeeeee",
})  # fmt: skip


def sharp(figure):
    """A figure as a PNG of twice the dots, for sharp screens, in 256 colours.  -> bytes, {"width", "height"}"""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * figure.dpi)
    image = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(out := io.BytesIO(), format="png", optimize=True)
    return out.getvalue(), {"width": image.width // 2, "height": image.height // 2}


def in_notebooks():
    """Let notebooks show figures so; elsewhere nothing changes."""
    try:
        formatters = get_ipython().display_formatter.formatters
    except NameError:
        return
    plt.close(plt.figure())  # now the backend is chosen, and will not put its own way back
    formatters["image/png"].for_type(Figure, sharp)


in_notebooks()


def canvas(columns=1, rows=1, height=3.0, **options):
    """A figure as wide as the page and its axes, (columns,) or (rows, columns); height in inches, of a row."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False, **options)
    return figure, axes if rows > 1 else axes[0]


def square(axis, title, limit=2.6):
    """An axis for points of the plane."""
    axis.set(title=title, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="#cccccc")


def dots(axis, x, title="", color=DATA, size=3.0, limit=2.6, alpha=0.5):
    """Points of the plane."""
    axis.scatter(x[:, 0], x[:, 1], s=size, color=color, alpha=alpha, linewidths=0, rasterized=True)
    square(axis, title, limit)


def arrows(axis, x, v, color=INK, longest=0.45, width=0.005, **options):
    """Arrows along v at x, |v| / (1 + |v|) of `longest` long: all are seen, and none covers another."""
    length = longest * v / (1 + v.norm(dim=1, keepdim=True))
    head = {"headwidth": 4, "headlength": 4, "headaxislength": 3.5, "minlength": 0}
    axis.quiver(
        *x.T, *length.T, color=color, width=width, angles="xy", scale_units="xy", scale=1, **head | options
    )  # fmt: skip


def grid(n=13, limit=2.6):
    """Points of the plane in rows.  -> (n * n, 2), double"""
    line = torch.linspace(-limit, limit, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def density(axis, mixture, t, limit=2.6, color="Greys", **options):
    """The density of x_t for a mixture, filled; a colour map's name, see matplotlib."""
    x = grid(90, limit)
    p = mixture.log_density(x, t).exp()
    axis.contourf(*(a.view(90, 90) for a in (x[:, 0], x[:, 1], p)), levels=8, cmap=color, vmax=2 * p.max(), **options)


def seeded(number):
    """A generator of its own for random numbers."""
    return torch.Generator().manual_seed(number)


def noise(n, generator):
    """n points of Gaussian noise.  -> (n, 2), double"""
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def ways(axis, states, color=INK, width=2.0, **options):
    """Paths, an arrowhead at the end of each.  states (times, n, 2)"""
    for points in states.transpose(0, 1).tolist():
        arrow = {"arrowstyle": "-|>", "mutation_scale": 7 * width**0.5, "joinstyle": "round"}
        axis.add_patch(FancyArrowPatch(path=Path(points), color=color, lw=width, fill=False, **arrow | options))
