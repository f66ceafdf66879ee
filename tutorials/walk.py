"""The moving picture of the README: the toy recipe trains, and its fakes walk onto the data.

    python tutorials/walk.py [--steps 2000] [--out tutorials/pictures/walk.gif]

The fakes of all frames are made of the same noise, so a point keeps its colour and can be followed.
"""

import argparse
import io
from pathlib import Path

import torch
from PIL import Image
from style import DATA, FAKE, FLOW, INK, ONE, OTHERS, arrows, canvas, dots, plt, same

from tinytwinflow import gap, generate, sample
from tinytwinflow.bars import bar
from tinytwinflow.data.toys import mixture
from tinytwinflow.evaluation.metrics import off_data
from tinytwinflow.files import aside
from tinytwinflow.method.draws import seeded
from tinytwinflow.method.path import interpolate
from tinytwinflow.runs.methods import FLOW_MATCHING
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish, steps

DATA_SET, TIME, FRAMES = mixture("8gaussians"), 0.3, 50
REAL = DATA_SET.sample(3000, seeded(3))
Z = torch.randn(3000, 2, generator=seeded(1))  # of the fakes, in every frame
NOISE = torch.randn(120, 2, generator=seeded(2))  # is put on the first of them
FOLLOWED = (Z.norm(dim=1) < 1.8).nonzero()[:4, 0]  # fakes that are in the picture from the first


def shot(net):
    """What a frame shows: the fakes, some of them noised, where the gap there pulls them, the share off the data."""
    with torch.no_grad():
        x = generate(net, Z)
        x_t = interpolate(x[: len(NOISE)], NOISE, TIME)
        pull = -gap(net, x_t, same(TIME, x_t))  # z - F moves along -dv where F moves along +dv
    return x, x_t, pull, off_data(x.double(), DATA_SET)


def filmed(config):
    """Train by the toy recipe.  -> list of (step, shot)"""
    run, every = begin(config), max(1, config["steps"] // FRAMES)
    film = [(0, shot(run.state.average))]
    due = (r["step"] for r in steps(run) if r["step"] % every == 0 or r["step"] == config["steps"])
    return film + [(step, shot(run.state.average)) for step in due]


def goal_of(config):
    """What flow matching leaves off the data in 100 steps: same network, data, steps and noise."""
    net = finish(begin(config | FLOW_MATCHING)).state.average
    with torch.no_grad():
        return off_data(sample(net, Z, steps=100, mode="multi").double(), DATA_SET)


def frame(film, base_film, number, config, goal):
    """One picture of the film."""
    (step, (x, x_t, pull, _)), last = film[number], film[-1][0]
    flow, base = config["warmup_steps"], config["warmup_steps"] + config["base_steps"]
    phase = "flow matching" if step < flow else "any-step base" if step < base else "any-step base and twin"
    figure, (left, middle, right) = canvas(3, height=3.4)
    figure.suptitle(f"training step {step:,}: {phase}")
    for axis, title in ((left, "one-step samples, the fakes"), (middle, "where the gap pulls noised fakes")):
        dots(axis, REAL, title, DATA, size=4, limit=2.2, alpha=0.25)
    dots(left, x, left.get_title(), ONE, size=4, limit=2.2)
    for i, color in zip(FOLLOWED, OTHERS):
        way = torch.stack([x[i] for _, (x, *_) in film[max(0, number - 11) : number + 1]])
        left.plot(*way.T, color=color, lw=1.4)
        left.plot(*way[-1], "o", color=color, ms=6, mec="white", mew=0.8)
    dots(middle, x_t, middle.get_title(), FAKE, size=14, limit=2.2, alpha=0.9)
    arrows(middle, x_t, 4 * pull, longest=0.9)
    if step <= base:
        middle.set_title(f"no gap yet: the twin begins at {base:,}")
    right.axvspan(0, flow, color="#eeeeee", lw=0)
    right.axvspan(flow, base, color="#f6f6f6", lw=0)
    at, share = zip(*((step, off) for step, (*_, off) in film))
    right.plot(at, [off for _, (*_, off) in base_film], color=INK, lw=1, ls=":")
    right.text(last, 0.06, "any-step base alone", color=INK, ha="right", fontsize=8)
    right.axvline(base, color=ONE, lw=0.8)
    right.text(base, 1.1, " twin", color=ONE, fontsize=8, va="top")
    right.plot(at[: number + 1], share[: number + 1], color=ONE, lw=2.4)
    right.axhline(goal, color=FLOW, ls="--")
    right.text(0.03 * last, goal * 1.1, "flow matching, 100 NFE", color=FLOW, fontsize=8)
    right.set(title="samples off the data", xlabel="training step", yscale="log", xlim=(0, last), ylim=(5e-3, 1.3))
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    figure.savefig(file := io.BytesIO(), format="png", dpi=90)
    plt.close(figure)
    return Image.open(file).convert("RGB").quantize(160, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures" / "walk.gif")
    args = parser.parse_args()
    try:
        config = configured("toy", steps=args.steps)
    except ValueError as error:
        parser.error(str(error))
    film, goal, base_film = filmed(config), goal_of(config), filmed(config | {"share": 0.0})
    shown = bar(range(len(film)), "drawing", unit="frames")
    frames = [frame(film, base_film, number, config, goal) for number in shown]
    with aside(args.out) as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], loop=0, optimize=True,
                       duration=[110] * (len(frames) - 1) + [4000])  # fmt: skip
    off, of_base = film[-1][1][-1], base_film[-1][1][-1]
    print(
        f"{args.out}: off data {off:.1%} in one step, base alone {of_base:.1%}, flow matching {goal:.1%} in a hundred"
    )


if __name__ == "__main__":
    main()
