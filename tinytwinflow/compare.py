"""Methods on equal terms: same data, network, steps, batch and seeds; one table and one picture."""

import json
import time
from pathlib import Path
from statistics import mean, pstdev

from . import data, pictures
from .evaluate import rows_of, yardstick
from .files import write_json
from .recipes import FLOW_MATCHING, RCGM, settings
from .runs import continue_run, read_config, start

STEPS = 8000  # where flow matching at 100 NFE has come near the floor
SAMPLES = 50000  # so many that the floor, real data against real data, is well below what is measured
DATA = ("8gaussians", "checkerboard", "moons", "swissroll")
METHODS = {
    "twinflow": ({}, (1, 2, 4)),
    "rcgm": (RCGM, (1, 2, 4)),
    "flow matching": (FLOW_MATCHING, (1, 2, 4, 100)),
}


def compare(names, seeds, changes, out):
    """Train and measure every method on every data set and seed; write metrics.json, table.md, compare.png.

    Stopped and called again with the same arguments it goes on where it was. Raises ValueError for
    an unknown data set or setting, or if `out` was made with other settings.
    """
    began, results = time.perf_counter(), []
    changes = [f"eval_samples={SAMPLES}", f"steps={STEPS}", *changes]
    for name in names:
        data.Points(name, 1)
    for name in names:
        for seed in range(seeds):
            results += one(name, seed, changes, out)
    rows = summary([row for result in results for row in result["rows"]], names)
    floors = {name: mean(r["floor"]["sliced_wasserstein"] for r in results if r["data"] == name) for name in names}
    text = table(rows, floors, names)
    print(text)
    write_json(out / "metrics.json", {"seeds": seeds, "seconds": round(time.perf_counter() - began), "device": "cpu",
                                      "floor": floors, "rows": rows})  # fmt: skip
    (out / "table.md").write_text(text + "\n")
    pictures.draw_comparison(out / "compare.png", rows, floors, names)
    print(f"\n{out}/table.md  {out}/compare.png  {out}/metrics.json")


def one(name, seed, changes, out):
    """All methods on one data set with one seed.  -> a list of results, one a method."""
    results = []
    for method, (own, nfes) in METHODS.items():
        folder = Path(out) / Path(name).stem / f"seed-{seed}" / method.replace(" ", "-")
        config = {"recipe": "toy", "seed": seed, **settings("toy", changes), "data": name, **own}
        if not (folder / "config.json").exists():
            start(folder, config)
        elif read_config(folder) != json.loads(json.dumps(config)):
            raise ValueError(f"{folder} was made with other settings: choose another --out")
        done = folder / "metrics.json"
        if not done.exists():
            began = time.perf_counter()
            continue_run(folder)
            trained_in = time.perf_counter() - began
            yard = yardstick(folder, config)
            rows, _ = rows_of(folder, nfes, yard)
            rows = [{"data": name, "seed": seed, **row} for row in rows]
            write_json(done, {"data": name, "seed": seed, "seconds": round(trained_in, 1), "device": "cpu",
                              "floor": yard.floor, "rows": rows})  # fmt: skip
        results.append(json.loads(done.read_text()))
    return results


def summary(rows, names):
    """Mean and spread over seeds of each data set, method and NFE."""
    out = []
    for name in names:
        for method, (_, nfes) in METHODS.items():
            for nfe in nfes:
                same = [r for r in rows if (r["data"], r["method"], r["nfe"]) == (name, method, nfe)]
                row = {"data": name, "method": method, "mode": same[0]["mode"], "nfe": nfe}
                for metric in ("sliced_wasserstein", "energy_distance", "coverage"):
                    values = [r[metric] for r in same if metric in r]
                    if values:
                        row |= {metric: mean(values), f"{metric}_spread": pstdev(values)}
                out.append(row)
    return out


def table(rows, floors, names):
    """Sliced W2 as a Markdown table, with each row's mean over the data as a multiple of flow matching's at 100 NFE."""
    cells = {(r["data"], r["method"], r["nfe"]): r for r in rows}

    def average(method, nfe):
        return mean(cells[name, method, nfe]["sliced_wasserstein"] for name in names)

    line = average("flow matching", 100)
    shown = [Path(name).name for name in names]
    lines = ["| method | NFE | " + " | ".join(shown) + " | mean | x flow matching at 100 NFE | modes covered |"]
    lines.append("|---" * (len(names) + 5) + "|")
    for method, (_, nfes) in METHODS.items():
        for nfe in nfes:
            own = [cells[name, method, nfe] for name in names]
            numbers = [f"{c['sliced_wasserstein']:.3f} ± {c['sliced_wasserstein_spread']:.3f}" for c in own]
            covered = [f"{c['coverage']:.0%}" for c in own if "coverage" in c]
            a = average(method, nfe)
            lines.append(
                f"| {method} | {nfe} | {' | '.join(numbers)} | {a:.4f} | {a / line:.2f} | {', '.join(covered)} |"
            )
    numbers = " | ".join(f"{floors[name]:.3f}" for name in names)
    a = mean(floors.values())
    lines.append(f"| real data | | {numbers} | {a:.4f} | {a / line:.2f} | |")
    return "\n".join(lines)
