"""Tables: what stands in them is what was measured, with the spread over seeds, and means over the data sets."""

from statistics import mean, pstdev

import pytest

from tinytwinflow.evaluation.tables import comparison_table, floor_of, run_table, summary

METHODS, SETS = ["flow matching", "twinflow", "burst"], ["moons", "rings"]
COST = {"family": "any-step", "weights": 2, "net": 1, "seconds_ratio": 1.0, "trained": 0, "frozen": 0, "peak": 2**20}


def result(name, method, seed):
    """Figures that tell data set, method, NFE and seed; `burst` diverged with seed 1."""
    k, diverged = METHODS.index(method) + 3 * SETS.index(name), method == "burst" and seed == 1

    def figures(nfe):
        w = 0.01 * (k + 1) + 0.001 * seed + 0.0001 * nfe
        return {"sliced_wasserstein": w, "off_data": w / 2, "energy_distance": w / 10, "diversity": 1.8}

    nfes = () if diverged else (1, 2, 4, 8, 100) if method == "flow matching" else (1, 2)
    about = {"data": name, "seed": seed, "method": method, "diverged": "step 3" if diverged else None}
    floor = {"sliced_wasserstein": 0.02, "off_data": 0.001 * (seed + 1), "energy_distance": 0.0, "diversity": 1.7}
    return {**about, "floor": floor, "rows": [{"nfe": nfe, **about, **figures(nfe)} for nfe in nfes]}


def cells(text, start, part=0):
    """The cells of the line that starts so, in the given one of the tables that hold such a line."""
    line = [line for line in text.splitlines() if line.startswith(f"| {start} |")][part]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def results():
    return [result(name, method, seed) for name in SETS for method in METHODS for seed in (0, 1)]


@pytest.fixture(scope="module")
def text(results):
    floors = {name: floor_of(results, name) for name in SETS}
    return comparison_table(summary(results, SETS, METHODS), floors, SETS, METHODS, dict.fromkeys(METHODS, COST))


def test_off_data_stands_beside_sliced_w2_with_its_spread_and_the_lines_to_reach(results, text):
    """At 1 NFE, flow matching at 100 and real data under it; a method that diverged has the seeds that did not."""
    for name, part in (("moons", 1), ("rings", 2)):
        head = cells(text, "method", part)
        for method, nfe in (("twinflow", 1), ("flow matching", 1), ("flow matching", 100), ("burst", 1)):
            own = [row for r in results if (r["data"], r["method"]) == (name, method) for row in r["rows"]]
            off, w = (
                [row[metric] for row in own if row["nfe"] == nfe] for metric in ("off_data", "sliced_wasserstein")
            )
            row = cells(text, method if nfe == 1 else f"{method}, {nfe} NFE", part if nfe == 1 else part - 1)
            assert len(row) == len(head)
            assert row[head.index("off data")] == f"{mean(off):.2%} ± {pstdev(off):.2%}"
            assert row[1].startswith(f"{mean(w):.3f} ± {pstdev(w):.3f}")
        real = cells(text, "real data", part - 1)
        assert len(real) == len(head) and real[head.index("off data")] == "0.15%"


def test_means_over_the_data_sets_are_of_both_yardsticks(results, text):
    head, rows = cells(text, "method", 3), {method: cells(text, method, 3) for method in METHODS}

    def average(method, nfe):
        return mean(row["off_data"] for r in results if r["method"] == method for row in r["rows"] if row["nfe"] == nfe)

    for method in ("flow matching", "twinflow"):
        value, line = average(method, 1), average("flow matching", 100)
        assert rows[method][head.index("off data at 1 NFE") :] == [f"{value:.2%}", f"{value / line:.2f}"]
    assert rows["twinflow"][1:4] == ["0 / 0", "1.00 x", "0.0356"] and rows["twinflow"][5] == ""
    order = [line.split("|")[1].strip() for line in text.splitlines()[-3:]]
    assert order == ["flow matching", "twinflow", "burst"] and cells(text, "twinflow")[1] == "any-step"


def test_without_the_line_or_with_none_off_data_there_is_no_ratio():
    some = [result(name, "twinflow", 0) for name in SETS]
    floors, costs = {name: floor_of(some, name) for name in SETS}, {"twinflow": COST}
    text = comparison_table(summary(some, SETS, ["twinflow"]), floors, SETS, ["twinflow"], costs)
    assert cells(text, "twinflow", 3)[-3::2] == ["-", "-"]
    flow = [result(name, "flow matching", 0) for name in SETS]
    for row in (row for r in flow for row in r["rows"]):
        row["off_data"] = 0.0
    text = comparison_table(summary(flow, SETS, METHODS[:1]), floors, SETS, METHODS[:1], {"flow matching": COST})
    assert cells(text, "flow matching", 3)[-2:] == ["0.00%", "-"]


def test_the_table_of_a_run_shows_off_data_in_per_cent():
    row = {"sliced_wasserstein": 0.04125, "off_data": 0.0551, "coverage": 1.0}
    text = run_table(
        {"floor": {**row, "off_data": 0.0004}, "rows": [{"method": "twinflow", "mode": "any", "nfe": 1, **row}]}
    )
    head, line, real = (line.split() for line in text.splitlines())
    assert head[3:] == ["sliced_wasserstein", "off_data", "coverage"]
    assert line[3:] == ["0.0413", "5.51%", "1.0000"] or line[3:] == ["0.0412", "5.51%", "1.0000"]
    assert real[-2] == "0.04%"
