"""Pictures of a run. matplotlib is imported only when one is drawn."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ..files import aside

INK, REAL, ONE, FLOW = "#222222", "#555555", "#d1495b", "#2e6f95"


def _canvas(panels, width=3.1, height=3.6):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), dpi=130, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def words(text):
    """A text as a picture shows it: never a formula, and what the font has no letter for as its code."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    shown = [c if c.isprintable() and font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in str(text)]
    return "".join(shown).replace("$", r"\$")


def _save(figure, path):
    """Write a figure as a PNG, to a path or into an open file."""
    with nullcontext(path) if hasattr(path, "write") else aside(path) as file:
        figure.savefig(file, format="png")


def scatter(axis, x, title, color, limits):
    """Points of the first two dimensions, drawn faintly so that density shows; of one dimension, a histogram."""
    if x.shape[1] == 1:
        axis.hist(x[:, 0], 80, range=limits[0], density=True, color=color)
        axis.set(title=words(title), xlim=limits[0], yticks=[])
    else:
        size, alpha = (1.2, 0.35) if len(x) >= 500 else (8, 0.8)
        axis.scatter(x[:, 0], x[:, 1], s=size, alpha=alpha, color=color, linewidths=0, rasterized=True)
        axis.set(title=words(title), xlim=limits[0], ylim=limits[1], xticks=[], yticks=[], aspect="equal")
    axis.title.set_fontsize(10)


def tile(axis, x, title, side=8):
    """The first side * side images (n, C, H, W) in [-1, 1], in rows; one channel is drawn in grey, others as RGB."""
    n, C, H, W = x[: side * side].shape
    pixels = np.clip((np.asarray(x[: side * side]) + 1) / 2, 0, 1)
    pixels = np.concatenate([pixels, np.ones((side * side - n, C, H, W), pixels.dtype)])[:, :3]
    whole = pixels.reshape(side, side, -1, H, W).transpose(0, 3, 1, 4, 2).reshape(side * H, side * W, -1)
    axis.imshow(whole.mean(-1) if whole.shape[-1] != 3 else whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=words(title), xticks=[], yticks=[])
    axis.title.set_fontsize(10)


def panel(axis, x, title, color, limits=None):
    """Points (n, D), by default within their own limits, or images (n, C, H, W)."""
    if x.ndim == 4:
        tile(axis, x, title)
    else:
        scatter(axis, x, title, color, limits or _limits(x))


def _limits(x):
    low, high = np.quantile(x[:, :2], 0.001, axis=0), np.quantile(x[:, :2], 0.999, axis=0)
    middle, half = (low + high) / 2, 0.6 * (high - low).max() or 1.0  # of a single point
    return [(m - half, m + half) for m in middle]


def training_curve(axis, log, config):
    """The gap of the two velocities at noised fakes over training, or a peer's loss, averaged over 50 records."""
    key, title, label = "gap", "gap of real and fake velocity", "mean of (v - v_fake)²"
    if config["method"] != "twinflow":
        key, title, label = "total", "training loss", f"loss of {config['method']}"
    records = [r for r in log if key == "total" or r.get("gap", 0) > 0]
    step, value = np.array([r["step"] for r in records]), np.array([r[key] for r in records])
    width = max(1, min(50, len(value) // 4))
    if len(value):
        axis.plot(step[width - 1 :], np.convolve(value, np.ones(width) / width, "valid"), color=INK, lw=1.2)
        axis.set_yscale("log" if value.min() > 0 else "linear")
    begin = 0
    for name, key in (("flow matching", "warmup_steps"), ("any-step base", "base_steps")):
        end = begin + config[key]
        if end > begin:
            axis.axvspan(begin, end, color="#eeeeee" if begin == 0 else "#f6f6f6", lw=0)
            axis.text((begin + end) / 2, 0.5, name, rotation=90, ha="center", va="center",
                      transform=axis.get_xaxis_transform(), fontsize=8, color="#777777")  # fmt: skip
        begin = end
    axis.set(title=words(title), xlabel="training step", ylabel=words(label))
    axis.set_xlim(0, config["steps"])
    axis.title.set_fontsize(10)


def draw(path, panels, log, config, title):
    """Draw samples side by side, then a curve of the training.

    panels: list of (title, points (n, D) or images (n, C, H, W), color); the first points set the limits of all.
    """
    figure, axes = _canvas(len(panels) + 1)
    first = panels[0][1]
    limits = None if first.ndim == 4 else _limits(first)
    for axis, (name, x, color) in zip(axes, panels):
        panel(axis, x[:8000], name, color, limits)
    training_curve(axes[-1], log, config)
    figure.suptitle(words(title), fontsize=11)
    _save(figure, path)


def draw_one(path, x, title):
    """Draw one set of points (n, D) or images (n, C, H, W)."""
    figure, axes = _canvas(1)
    panel(axes[0], x, title, ONE)
    _save(figure, path)


def draw_comparison(path, rows, floors, names, methods):
    """Sliced W2, a row a method: dots at 1 NFE, digits at 2, 4, 8; flow matching at 100 and real data as lines."""
    figure, axes = _canvas(len(names), width=4.4, height=1.4 + 0.26 * len(methods))
    for axis, name in zip(axes, names):
        for place, method in enumerate(reversed(methods)):
            color = {"twinflow": ONE, "flow matching": FLOW}.get(method, REAL)
            for r in rows:
                if (r["data"], r["method"]) != (name, method) or "sliced_wasserstein" not in r:
                    continue
                value, spread = r["sliced_wasserstein"], r["sliced_wasserstein_spread"]
                if r["nfe"] == 1:
                    axis.errorbar(value, place, xerr=spread, color=color, marker="o", ms=6)
                elif r["nfe"] <= 8:
                    axis.plot(value, place, color=color, marker=f"${r['nfe']}$", ms=5, alpha=0.7)
                else:
                    axis.axvline(value, color=FLOW, ls="--", lw=1, label=words(f"{method}, {r['nfe']} NFE"))
        axis.axvline(floors[name]["sliced_wasserstein"], color="#999999", ls=":", lw=1, label="real data")
        axis.set(
            title=words(Path(name).name), xscale="log", xlabel="sliced W2 at 1 NFE (dot) and at 2, 4, 8 NFE (digits)"
        )
        shown = [words(method) if axis is axes[0] else "" for method in reversed(methods)]
        axis.set_yticks(range(len(methods)), shown)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_fontsize(8)
    axes[0].legend(fontsize=7)
    _save(figure, path)
