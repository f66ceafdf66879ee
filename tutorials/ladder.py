"""The ladder: what limits one step? Rung by rung from the exact flow map to TwinFlow, on 8 Gaussians.

    python tutorials/ladder.py [--steps 2000] [--seeds 0 1 2] [--out runs/ladder] [--device cpu]
    python tutorials/ladder.py --report --out runs/ladder

All rungs have the toy recipe's network, batch and steps. Each rung of each seed leaves its networks and its figures in
DIR/seedN and is not done again, so a ladder that was stopped goes on where it was, and seeds may be climbed side by
side. The report, a table and two pictures, is made of whatever seeds are in DIR; ladder.md says what they mean.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import ClassVar

import torch
from style import FLOW, INK, ONE, canvas, dots, plt, sharp

from tinytwinflow import TwinFlowLoss, Twins, gap, generate, sample
from tinytwinflow.bars import bar
from tinytwinflow.data.toys import mixture
from tinytwinflow.evaluation.metrics import deviations, off_data, sliced_wasserstein, strays
from tinytwinflow.evaluation.tables import markdown
from tinytwinflow.files import aside, read_json, write_json
from tinytwinflow.method.distances import squared_error
from tinytwinflow.method.draws import normal, seeded, uniform
from tinytwinflow.method.path import expand, interpolate
from tinytwinflow.peers.common import fake_score, renoise, terms
from tinytwinflow.runs.build import data_of, first_net
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish
from tinytwinflow.runs.settings import loss_of
from tinytwinflow.training import new_state, train
from tinytwinflow.training.loop import OPTIONS, learning_rate

DATA = mixture("8gaussians")
FAR = math.sqrt(-2 * math.log(0.001))  # 3.717: beyond it lies one real sample in a thousand
PAIRS = 65536  # of noise and where a flow carries it
FAKES = 4096  # drawn anew at each step for the exact fake velocity
RATE = 5e-4  # of rectification; its weight does not matter, AdamW divides it out
UPDATES = 5  # of a fake network for each of the generator
EARLIEST = 0.05  # smallest t', and 1 less the largest
POOL = 32768  # fakes by which the exact fake velocity is known at the end
SAMPLES = 50000  # that are measured
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EDGES = (0, 1, 2, 3, FAR, 4.5, math.inf)  # of the bins of a fake's distance from the nearest mode
MAPS = {"cosine": "cosine of dv", "error": "error of dv", "real": "error of v", "fake": "error of v_fake"}


def distance(x):
    """Distance from the nearest mode, in standard deviations.  (n, 2) -> (n,)"""
    return deviations(x.cpu(), DATA).min(0)[0]


def of_points(points):
    """The exact velocity field of a set of points (M, D), each as likely: field(x_t, t, r) at r = t in (0, 1).

    v = E[z - x | x_t] = (x_t - E[x | x_t]) / t, where point i has the weight exp(-|x_t - (1 - t) x_i|^2 / (2 t^2)).
    Of M fakes of a generator it is the fakes' velocity up to Monte Carlo, and it is unbiased only in the limit: where t
    is small, one or two points have all the weight. So the fake that x_t was made of must be among them, or the
    velocity there would be that of a stranger, of any size.
    """

    def field(x_t, t, r, cond=None):
        scaled = x_t / expand(1 - t, x_t)  # in units of x, for one matrix of distances
        apart = torch.cdist(scaled, points, compute_mode="donot_use_mm_for_euclid_dist")
        weight = (-0.5 * (apart * expand((1 - t) / t, x_t)).square()).softmax(1)
        return (x_t - weight @ points) / expand(t, x_t)

    return field


def even_noise(n, draw):
    """Noise (n, 2): each row is normal, and together they are spread more evenly than by chance (a Sobol sequence).

    Of 4,096 fakes of chance noise a mode gets 4 % too many or too few, and dv would drive all fakes of a batch at once
    to make up for that.
    """
    seed = torch.randint(2**31, (), generator=draw, device=draw.device).item()
    share = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return torch.special.ndtri(share + 2**-31).float().to(draw.device)


def backwards(net):
    """The fake twin of a network as a velocity field of its own: times with the sign turned."""
    return lambda x_t, t, r, cond=None: net(x_t, -t, -r, cond)


class Regression:
    """A loss for `train`: the jump from z to the point that a flow carries it to, handed over as the condition."""

    def __call__(self, net, z, cond, **_):
        return terms(regression=squared_error(generate(net, z), cond).mean())


def rectification(net, z, z_new, t, real, fake):
    """L_rectify (Eq. 9): F(z, 1, 0) is drawn onto itself + dv, the gap of two fields at its noised fakes.  -> scalar"""
    F = net(z, torch.ones_like(t), torch.zeros_like(t))
    with torch.no_grad():
        dv = gap(Twins(real, fake), interpolate(z - F, z_new, t), t)
    return squared_error(F, F.detach() + dv).mean()


@dataclass
class Climb:
    """One seed's way up: where its networks are kept, and how long and on what they are trained."""

    seed: int
    steps: int
    folder: Path
    device: str = "cpu"

    def network(self, weights=None):
        """The recipe's network: as the seed makes it, or with given weights."""
        net = first_net(self.settings(), data_of(self.settings()))
        if weights is not None:
            net.load_state_dict(weights)
        return net.to(self.device)

    def settings(self, **changes):
        return configured("toy", steps=self.steps, seed=self.seed, **changes)

    def networks(self, name):
        """The networks that a rung has left, which is climbed if it has not been.  -> {"net": ..., ...}"""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            start = time.time()
            made = RUNGS[name][1](self)
            with aside(path) as file:
                weights = {key: net.state_dict() for key, net in made.items()}
                torch.save({"seconds": time.time() - start, **weights}, file)
        saved = torch.load(path, map_location=self.device, weights_only=True)
        del saved["seconds"]
        return {key: self.network(weights).requires_grad_(False) for key, weights in saved.items()}

    def noise(self, n, draw):
        """Noise (n, 2) that is the same for all rungs; `draw` tells sets apart."""
        return torch.randn(n, 2, generator=seeded(self.seed, 7, draw)).to(self.device)


def recipe(climb, **changes):
    """A run of the toy recipe with changes."""
    run = finish(begin(climb.settings(**changes), device=climb.device))
    return {"net": run.state.average}


def regressed(climb, carry, part=1.0, share=1.0):
    """The jump regressed onto pairs (z, carry(z)) alone, for part of the steps and with a share of the batch."""
    z = climb.noise(PAIRS, draw=0)
    x = torch.cat([carry(some) for some in z.split(2048)])
    config, draw, steps = climb.settings(), seeded(climb.seed, 8), round(part * climb.steps)
    state = new_state(climb.network(), config["lr"], seed=climb.seed, muon_lr=config["muon_lr"])

    def batch(step):
        rows = torch.randint(PAIRS, (round(share * config["batch_size"]),), generator=draw).to(z.device)
        return z[rows], x[rows]

    for _ in bar(train(state, Regression(), batch, steps), "regression", steps, unit="steps"):
        pass
    return {"net": state.average}


def exact_flow(z):
    """Where the exact velocity carries z by 128 calls of Heun's method: off by 5e-4 in the mean."""
    return sample(DATA, z.double(), 128, "multi", order=2).to(z)


def own_flow(climb, steps):
    """Where the flow-matching network carries noise in so many Euler steps."""
    net = climb.networks("flow")["net"]
    return lambda z: sample(net, z, steps, "multi")


def rectified(climb, start, real=DATA, learnt=False, power=2, part=1.0, share=1.0):
    """The one-step generator of a network, trained by rectification alone, t' = U^power.

    real: a velocity field. learnt: the fake velocity is that of a network of its own, which begins as `start` did and
    takes `UPDATES` steps for each of the generator's; else it is exact, of fresh fakes at each step. part of
    the ladder's steps and share of the batch are what is spent.
    """
    first = climb.networks(start)["net"]
    one = new_state(climb.network(first.state_dict()), RATE, seed=climb.seed)
    two = new_state(climb.network(first.state_dict()), RATE, seed=climb.seed + 1)
    steps, draw = round(part * climb.steps), one.generator
    size = round(share * climb.settings()["batch_size"])
    like = torch.empty(size, 2, device=climb.device)

    def times():
        return EARLIEST + (1 - 2 * EARLIEST) * uniform(like, draw) ** power

    def fakes(z):
        with torch.no_grad():
            return generate(one.net, z)

    def step(state, loss, last):
        for group in state.optimizer.param_groups:
            group["lr"] = RATE * learning_rate(state.step, last)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.follow(0.999, 0.99)
        state.step += 1

    for _ in bar(range(steps), "rectification", unit="steps"):
        for _ in range(UPDATES if learnt else 0):
            t = times()
            x_t, u = renoise(fakes(normal(like, draw)), t, draw)
            step(two, fake_score(two.net, x_t, t, u), UPDATES * steps)
        z = even_noise(FAKES, draw)
        fake = two.net if learnt else of_points(fakes(z))
        loss = rectification(one.net, z[:size], normal(like, draw), times(), real, fake)
        step(one, loss, steps)
    return {"net": one.average, **({"fake": two.average} if learnt else {})}


def again(climb):
    """The base once more, from where it was: what as many further steps give without a twin."""
    run = begin(climb.settings(share=0.0, warmup_steps=0, base_steps=0), device=climb.device)
    run.state.net.load_state_dict(climb.networks("base")["net"].state_dict())
    run.state.restart()
    return {"net": finish(run).state.average}


class Informed(TwinFlowLoss):
    """The TwinFlow loss but for one thing: dv is exact, at t' = U^power."""

    power: ClassVar = 1

    def _gap_at_fakes(self, draws, rows, F, net, cond):
        noise = even_noise(FAKES, seeded(*draws.rows[:4].tolist())).to(F)
        fakes = torch.cat([draws.z[rows] - F, generate(net, noise)])
        t = EARLIEST + (1 - 2 * EARLIEST) * draws.t[rows] ** self.power
        return gap(Twins(DATA, of_points(fakes)), interpolate(fakes[: len(F)], draws.z_new[rows], t), t)


def informed(climb, power, **changes):
    """TwinFlow as the recipe has it, but for changes, with the exact dv in the place of the learnt one."""
    config = climb.settings(**changes)
    run = begin(config, device=climb.device)
    loss = Informed(**vars(loss_of(config)))
    loss.power = power
    options = {name: config[name] for name in OPTIONS}
    over = train(run.state, loss, lambda i: run.data.batch(i)[0], **options)
    for _ in bar(over, "TwinFlow, exact dv", climb.steps, unit="steps"):
        pass
    return {"net": run.state.average}


RUNGS = {  # name: what it is, how it is climbed
    "flow": ("flow matching, 100 NFE", lambda c: recipe(c, order=0, share=0.0, warmup_steps=0, base_steps=0)),
    "a": ("(a) exact flow map, regressed", lambda c: regressed(c, exact_flow)),
    "b100": ("(b) own flow by 100 steps, regressed", lambda c: regressed(c, own_flow(c, 100))),
    "b32": ("(b) own flow by 32 steps", lambda c: regressed(c, own_flow(c, 32))),
    "b8": ("(b) own flow by 8 steps", lambda c: regressed(c, own_flow(c, 8))),
    "b0": ("(b) by 100, with the rows of (c)", lambda c: regressed(c, own_flow(c, 100), part=0.75, share=0.28)),
    "base": ("(c) any-step base", lambda c: recipe(c, share=0.0)),
    "again": ("(c) and as many steps again", again),
    "d": ("(d) exact v, exact v_fake, t' = U^2", lambda c: rectified(c, "base")),
    "d1": ("(d) the same, t' uniform", lambda c: rectified(c, "base", power=1)),
    "d0": ("(d) with the rows and steps of (g)", lambda c: rectified(c, "base", part=0.4, share=1 / 6)),
    "da": ("(d) the same from (a), t' = U^2", lambda c: rectified(c, "a")),
    "e": ("(e) exact v, learnt v_fake", lambda c: rectified(c, "base", learnt=True)),
    "f": ("(f) both learnt, two networks", lambda c: rectified(c, "base", c.networks("flow")["net"], learnt=True)),
    "g": ("(g) TwinFlow, one network", recipe),
    "g1": ("(g) but dv exact, t' uniform", lambda c: informed(c, power=1)),
    "g2": ("(g) but dv exact, t' = U^2", lambda c: informed(c, power=2)),
    "g3": ("(g) the same, ten times the weight", lambda c: informed(c, power=2, rectify_weight=3.0)),
}


def velocities(climb, name, pool):
    """The real and the fake velocity that a rung's generator was trained with, as fields; None if with neither."""
    made = climb.networks(name)
    if name in ("d", "d1", "d0", "da"):
        return DATA, of_points(pool[:FAKES])
    if name in ("e", "f"):
        return (DATA if name == "e" else climb.networks("flow")["net"]), made["fake"]
    return (made["net"], backwards(made["net"])) if name == "g" else None


def compared(x, t, real, fake, exact_fake, draw):
    """How learnt velocities differ from exact ones at the fakes x (n, 2), noised to the times t (n,).

    -> dict: `size` of the exact dv (its root mean square); `cosine` of learnt and exact dv, each point weighing as much
    as its dv is large; `error` of dv, and the part of `real` and of `fake` velocity in it, as shares of `size`.
    """
    x_t, _ = renoise(x, t, draw)
    field = zip(x_t.split(16), t.split(16))
    v, v_fake, v_exact = real(x_t, t, t), fake(x_t, t, t), DATA(x_t, t, t)
    v_fake_exact = torch.cat([exact_fake(some, time, time) for some, time in field])
    dv, exact = v - v_fake, v_exact - v_fake_exact
    shares = {"error": dv - exact, "real": v - v_exact, "fake": v_fake - v_fake_exact}
    found = {key: (wrong.norm() / exact.norm()).item() for key, wrong in shares.items()}
    cosine = ((dv * exact).sum() / (dv.norm() * exact.norm())).item()
    return {"size": exact.square().mean().sqrt().item(), "cosine": cosine, **found}


@torch.no_grad()
def gaps(climb, name):
    """A rung's dv beside the exact one, over all fakes and t' uniform, and for each time and distance from a mode.

    -> {"all": see `compared`, "share": of the fakes in each bin, "map": a list a bin, of one such dict a time, empty
    for a bin of fewer than 20 fakes}
    """
    net = climb.networks(name)["net"]
    noise = even_noise(POOL, seeded(climb.seed, 7, 1)).to(climb.device)
    pool = torch.cat([generate(net, z) for z in noise.split(2048)])
    fields = velocities(climb, name, pool)
    if fields is None:
        return {}
    draw = torch.Generator(climb.device).manual_seed(climb.seed)
    some = pool[:FAKES]  # those that the Monte Carlo velocity of (d) is made of
    t = EARLIEST + (1 - 2 * EARLIEST) * uniform(some, draw)
    found = {"all": compared(some, t, *fields, of_points(pool), draw), "share": [], "map": []}
    inside = some if name.startswith("d") else pool
    far = distance(inside)
    for low, high in zip(EDGES[:-1], EDGES[1:]):
        own = inside[(low <= far) & (far < high)]
        found["share"].append(len(own) / len(inside))
        times = [torch.full((min(len(own), 256),), t, device=own.device) for t in TIMES if len(own) >= 20]
        found["map"].append([compared(own[: len(t)], t, *fields, of_points(pool), draw) for t in times])
    return found


@torch.no_grad()
def samples(climb, name, n):
    """Samples of a rung: one step, of flow matching a hundred."""
    net, z = climb.networks(name)["net"], climb.noise(n, draw=2)
    how = {"steps": 100, "mode": "multi"} if name == "flow" else {"steps": 1}
    return torch.cat([sample(net, some, **how) for some in z.split(2048)])


def measured(x, climb):
    """Off the data, and sliced W2 to real samples that are the same for all rungs."""
    real = DATA.sample(SAMPLES, seeded(climb.seed, 9), dtype=torch.float32).to(x)
    return {"off_data": off_data(x.cpu(), DATA), "sliced_wasserstein": sliced_wasserstein(x, real)}


def climb_rung(climb, name):
    """Climb one rung, and write its figures."""
    climb.networks(name)
    seconds = torch.load(climb.folder / f"{name}.pt", weights_only=True)["seconds"]
    found = measured(samples(climb, name, SAMPLES), climb)
    write_json(
        climb.folder / f"{name}.json", {"steps": climb.steps, "seconds": seconds, **found, "gap": gaps(climb, name)}
    )
    print(f"seed {climb.seed}  {RUNGS[name][0]:<38}{found['off_data']:>8.2%}{seconds:>8.0f} s", flush=True)


def climb_all(climb):
    """Climb every rung of a seed that is not done yet. Raises ValueError for a ladder of other steps."""
    climb.folder.mkdir(parents=True, exist_ok=True)
    for name in RUNGS:
        path = climb.folder / f"{name}.json"
        if not path.exists():
            climb_rung(climb, name)
        elif (steps := read_json(path, "figures")["steps"]) != climb.steps:
            raise ValueError(f"{path} is of {steps} steps, not {climb.steps}: choose another --out")
    real = DATA.sample(SAMPLES, seeded(climb.seed, 10), dtype=torch.float32)
    write_json(climb.folder / "real.json", measured(real, climb))


def seeds_in(out):
    """What the ladders in a folder have measured: a dict a seed, name -> figures."""
    folders = sorted(out.glob("seed*"))
    found = {folder: {path.stem: read_json(path, "figures") for path in folder.glob("*.json")} for folder in folders}
    if not any(found.values()):
        raise ValueError(f"{out}: no ladder here yet, climb one without --report")
    return found


def spread(values, shown):
    """Mean and, of more seeds than one, spread."""
    values = list(values)
    return f"{mean(values):{shown}}" + (f" ± {pstdev(values):{shown}}" if len(values) > 1 else "")


def table(found):
    """The rungs in Markdown, means and spreads over seeds."""
    rows = []
    for name, words in {"real": "real data", **{name: words for name, (words, _) in RUNGS.items()}}.items():
        own = [figures[name] for figures in found if name in figures]
        if not own:
            continue
        shown = {"off_data": ".2%", "sliced_wasserstein": ".4f"}
        rows.append([words, *(spread((r[key] for r in own), how) for key, how in shown.items())])
        dv = [r["gap"]["all"] for r in own if r.get("gap")]
        rows[-1] += [spread((d[key] for d in dv), ".2f") if dv else "" for key in ("size", *MAPS)]
        rows[-1].append(f"{mean(r['seconds'] for r in own):.0f}" if "seconds" in own[0] else "")
    header = ["rung", "off data", "sliced W2", "size of dv", *MAPS.values(), "seconds"]
    return markdown(header, rows)


def draw_samples(path, folder, figures):
    """Samples of one seed's rungs, those off the data in black."""
    names = [name for name in RUNGS if name in figures]
    climb = Climb(int(folder.name.removeprefix("seed")), figures[names[0]]["steps"], folder)
    sheet, axes = canvas(4, max(2, math.ceil(len(names) / 4)), height=2.75)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        x = samples(climb, name, 8000)
        off = strays(x, DATA)
        title = f"{RUNGS[name][0]}\n{figures[name]['off_data']:.1%} off the data"
        dots(axis, x[~off], title, color=FLOW if name == "flow" else ONE, size=1.0, limit=1.95, alpha=0.4)
        axis.scatter(*x[off].T, s=3, color=INK, linewidths=0, rasterized=True)
    with aside(path) as file:
        file.write(sharp(sheet)[0])
    plt.close(sheet)


def draw_maps(path, found):
    """Where learnt velocities are wrong: a row a rung, t' across, distance of the noised fake from a mode upwards."""
    from matplotlib.figure import Figure

    names = [name for name in ("d", "e", "f", "g") if any(name in figures for figures in found)]
    if not names:  # no seed is up there yet
        return
    sheet = Figure(figsize=(12.5, 2.5 * len(names)), dpi=110, layout="constrained")
    bins = [f"{low:.1f}-{high:.1f}" if high < math.inf else f"> {low:.1f}" for low, high in zip(EDGES[:-1], EDGES[1:])]
    for axes, name in zip(sheet.subplots(len(names), len(MAPS) + 1, squeeze=False), names):
        maps = [figures[name]["gap"]["map"] for figures in found if name in figures]
        for axis, (key, title) in zip(axes, {"size": "size of exact dv", **MAPS}.items()):
            cells = [[[m[i][j][key] for m in maps if m[i]] for j in range(len(TIMES))] for i in range(len(bins))]
            values = [[mean(cell) if cell else math.nan for cell in row] for row in cells]
            low, high, colors = {"cosine": (-1, 1, "RdBu"), "size": (0, 1, "Greys")}.get(key, (0, 2, "Reds"))
            axis.imshow(values, vmin=low, vmax=high, cmap=colors, origin="lower", aspect="auto")
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if not math.isnan(value):
                        ink = "w" if abs(value) > 0.6 * high else "k"
                        shown = f"{value:.2f}" if key == "size" else f"{value:.1f}"
                        axis.text(j, i, shown, ha="center", va="center", fontsize=5, color=ink)
            axis.set_title(f"{RUNGS[name][0]}\n{title}" if key == "size" else title, fontsize=7)
            axis.set_xticks(range(len(TIMES)), [f"{t:g}" for t in TIMES], fontsize=5)
            axis.set_yticks(range(len(bins)), bins if key == "size" else [""] * len(bins), fontsize=6)
    sheet.supxlabel("t'", fontsize=8)
    sheet.supylabel("standard deviations from the nearest mode", fontsize=8)
    sheet.savefig(path)


def report(out):
    """Table and pictures of the seeds in a folder, written into it."""
    found = seeds_in(out)
    folder, figures = max(
        found.items(), key=lambda item: len(item[1])
    )  # the seed that is highest up, the first of such
    text = table(list(found.values()))
    (out / "ladder.md").write_text(text + "\n")
    draw_samples(out / "ladder.png", folder, figures)
    draw_maps(out / "ladder_maps.png", list(found.values()))
    print(text)


def main():
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--steps", type=int, default=2000, help="of each rung")
    reader.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reader.add_argument("--out", type=Path, default=Path("runs/ladder"))
    reader.add_argument("--device", default="cpu")
    reader.add_argument("--report", action="store_true", help="only table and pictures, of what is in --out")
    words = reader.parse_args()
    try:
        for seed in [] if words.report else words.seeds:
            climb_all(Climb(seed, words.steps, words.out / f"seed{seed}", words.device))
        report(words.out)
    except ValueError as error:
        reader.error(str(error))


if __name__ == "__main__":
    main()
