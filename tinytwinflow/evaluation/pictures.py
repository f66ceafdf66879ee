"""Pictures of a run. matplotlib is imported only when one is drawn."""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ..files import aside

INK, REAL, ONE, FLOW = "#222222", "#555555", "#d1495b", "#2e6f95"
OTHERS = ("#e69f00", "#009e73", "#56b4e9", "#9b5fc0", "#8c6d31", "#cc79a7")


def _canvas(panels, width=3.1, height=3.6, rows=1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height * rows), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, panels, squeeze=False)


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

    panels: list of (title, points (n, D) or images (n, C, H, W), color, off); the first points set the limits of all.
    off: which of the points are off the data (n,) bool, to be marked, their share in the title; None marks nothing.
    """
    figure, (axes,) = _canvas(len(panels) + 1)
    first = panels[0][1]
    limits = None if first.ndim == 4 else _limits(first)
    for axis, (name, x, color, off) in zip(axes, panels):
        panel(axis, x[:8000], name, color, limits)
        if off is not None:
            axis.set_title(f"{axis.get_title()}\n{off.mean():.2%} off data", fontsize=10)
            if x.shape[1] > 1:
                axis.scatter(*x[:8000][off[:8000], :2].T, s=3, color=INK, linewidths=0)
    training_curve(axes[-1], log, config)
    figure.suptitle(words(title), fontsize=11)
    _save(figure, path)


def draw_one(path, x, title):
    """Draw one set of points (n, D) or images (n, C, H, W)."""
    figure, ((axis,),) = _canvas(1)
    panel(axis, x, title, ONE)
    _save(figure, path)


def draw_comparison(path, rows, floors, names, families):
    """Sliced W2 and off data, a column a data set, a row a method, the best at 1 NFE on top.

    Dots at 1 NFE, with their spread, under them digits at 2, 4, 8; flow matching at 100 and real data are lines to
    reach. families: method -> what it is of, a colour each.
    """
    from matplotlib.ticker import LogLocator

    lanes = {1: 0.3, 2: 0.1, 4: -0.1, 8: -0.3}  # or digits would hide each other
    methods, kinds = list(families), dict.fromkeys(families.values())
    others = iter(OTHERS)
    colors = {kind: {"self-adversarial": ONE, "flow matching": FLOW}.get(kind) or next(others) for kind in kinds}
    yardsticks = (("sliced_wasserstein", "sliced W2"), ("off_data", "off data"))
    figure, axes = _canvas(len(names), width=4.8, height=1.2 + 0.36 * len(methods), rows=2)
    for (metric, label), row in zip(yardsticks, axes):
        for axis, name in zip(row, names):
            own = {(r["method"], r["nfe"]): r for r in rows if r["data"] == name and metric in r}
            first = {method: own[method, 1][metric] if (method, 1) in own else math.inf for method in methods}
            order = sorted(methods, key=first.get, reverse=True)
            for (method, nfe), r in own.items():
                place, color = order.index(method), colors[families[method]]
                if nfe == 1:
                    axis.errorbar(
                        r[metric], place + lanes[1], xerr=r[f"{metric}_spread"], color=color, marker="o", ms=5
                    )
                elif nfe in lanes:
                    axis.plot(r[metric], place + lanes[nfe], color=color, marker=f"${nfe}$", ms=5.5, mew=0.2)
                else:
                    axis.axvline(r[metric], color=FLOW, ls="--", lw=1, label=words(f"{method}, {nfe} NFE"))
            axis.axvline(floors[name][metric], color="#999999", ls=":", lw=1, label="real data")
            if metric == "off_data":  # of which there may be none
                axis.set_xscale("symlog", linthresh=1e-3)
                axis.xaxis.set_major_formatter("{x:.1%}")
                axis.set_xlim(left=0)
            else:
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("")
            axis.set(title=words(Path(name).name), xlabel=f"{label} at 1 NFE (dot) and at 2, 4, 8 NFE (digits)")
            axis.set_ylim(-0.5, len(methods) - 0.5)
            axis.set_yticks(range(len(methods)), map(words, order))
            axis.hlines(np.arange(1, len(methods)) - 0.5, 0, 1, "#eeeeee", transform=axis.get_yaxis_transform())
            axis.tick_params(labelsize=8)
            axis.xaxis.label.set_fontsize(8)
    for kind, color in colors.items():
        axes[0, 0].plot([], [], color=color, marker="o", ms=5, ls="", label=kind)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside upper center")
    _save(figure, path)


def draw_costs(path, rows, lines, methods, metrics):
    """A panel a metric: figures at 1 NFE against what the training cost, a line a method, both axes logarithmic.

    rows: dicts of method, cost, and each metric with its spread. lines: name -> metrics, drawn across. metrics: see
    `tables.paying_table`. TwinFlow is red and its base black, of several lines of a colour the later ones are dashed.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    others, colors, used = iter(OTHERS * len(methods)), {}, []
    for name in methods:
        own = ONE if name.startswith("twinflow") else INK if name.startswith(("rcgm", "the paper's base")) else None
        colors[name] = FLOW if name.startswith("flow matching") else own or next(others)
    figure, (axes,) = _canvas(len(metrics), width=5.0, height=4.6)
    for axis, (metric, (called, form)) in zip(axes, metrics.items()):
        used.clear()
        for name in methods:
            own = [r for r in rows if r["method"] == name and metric in r]
            style = ("-", "--", ":")[used.count(colors[name]) % 3]
            used.append(colors[name])
            x, y, spread = ([r[key] for r in own] for key in ("cost", metric, f"{metric}_spread"))
            axis.errorbar(x, y, yerr=spread, color=colors[name], ls=style, marker="o", ms=4, lw=1.6, label=words(name))
        for name, line in lines.items():
            if not name.endswith(", 1 NFE"):
                color, style = (FLOW, "--") if name.startswith("flow") else (REAL, ":")
                axis.axhline(line[metric], color=color, ls=style, lw=1.2, label=words(name))
        axis.set(xscale="log", yscale="log", title=words(f"{called} at 1 NFE"))
        for one, shown in ((axis.xaxis, "{x:g}"), (axis.yaxis, "{x:" + (".1%" if "%" in form else "g") + "}")):
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(shown)
            one.set_minor_formatter(NullFormatter())
        axis.set_xlabel("cost of the training, in flow-matching steps")
        axis.tick_params(labelsize=8)
        axis.grid(color="#eeeeee")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, handlelength=4)
    _save(figure, path)
