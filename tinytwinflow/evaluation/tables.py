"""Results as text: one run's metrics, and what a comparison found, averaged over its seeds, in Markdown."""

import math
from pathlib import Path
from statistics import mean, pstdev

NFES = (1, 2, 4, 8)
LINE = ("flow matching", 100)  # what one step is compared with
ROUGH = 100  # of fewer samples a spread a third too wide is not told from chance: 0.56 ± 0.12 against 0.42 ± 0.10 of 25
SEEN = "the real data were trained on, none of them being held out: a model that repeats them looks good"
COLUMNS = ("sliced_wasserstein", "off_data", "energy_distance", "coverage", "diversity", "frechet")


def run_table(result):
    """The rows of metrics.json as text, off_data in per cent."""
    names = list(result["floor"])

    def shown(values):
        return "".join(f"{values[name]:>20{'.2%' if name == 'off_data' else '.4f'}}" for name in names)

    lines = [f"{'method':<16}{'mode':<8}{'NFE':>5}" + "".join(f"{name:>20}" for name in names)]
    for row in result["rows"]:
        lines.append(f"{row['method']:<16}{row['mode']:<8}{row['nfe']:>5}" + shown(row))
    lines.append(f"{'real data':<29}" + shown(result["floor"]))
    if min(row.get("energy_distance", 0.0) for row in (*result["rows"], result["floor"])) < 0:
        lines.append("an energy distance is estimated without bias: where it is about zero, it may come out negative")
    if result.get("samples", ROUGH) < ROUGH:
        lines.append(f"measured on {result['samples']} samples and as many real ones: figures of so few are rough")
    return "\n".join(lines + ([] if result.get("held_out", True) else [SEEN]))


def markdown(header, rows):
    """A Markdown table of a list of cells and a list of such lists."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def floor_of(results, name):
    """Each metric between two sets of real data, mean over the runs on one data set."""
    own = [r["floor"] for r in results if r["data"] == name]
    return {metric: mean(floor[metric] for floor in own) for metric in COLUMNS if metric in own[0]}


def summary(results, names, methods):
    """Mean and spread over seeds of each data set, method and NFE; runs that diverged are listed, not averaged."""
    out = []
    for name in names:
        for method in methods:
            own = [r for r in results if (r["data"], r["method"]) == (name, method)]
            diverged = [f"seed {r['seed']}: {r['diverged']}" for r in own if r["diverged"]]
            rows = [row for r in own for row in r["rows"]]
            for nfe in sorted({row["nfe"] for row in rows}) or NFES:
                out.append({"data": name, "method": method, "nfe": nfe, "diverged": diverged})
                for metric in COLUMNS:
                    values = [row[metric] for row in rows if row["nfe"] == nfe and metric in row]
                    if values:
                        out[-1] |= {metric: mean(values), f"{metric}_spread": pstdev(values)}
    return out


def comparison_table(rows, floors, names, methods, costs):
    """Markdown tables: what each method costs, and what it gives, a row a method, at 1, 2, 4, 8 NFE.

    costs: name -> figures of `memory.step_cost`, and `family`.
    """
    header = ["method", "family", "auxiliary networks, trained / frozen", "weights held", "step time"]
    header.append("peak memory of a step")
    cells = []
    for method in methods:
        c = costs[method]
        held, time = f"{c['weights'] / c['net']:.0f} x", f"{c['seconds_ratio']:.2f} x"
        beside = f"{c['trained']} / {c['frozen']}"
        cells.append([method, c["family"], beside, held, time, f"{c['peak'] / 2**20:.1f} MiB"])
    lines = [markdown(header, cells)]
    for name in names:
        of_line = [r for r in rows if (r["data"], r["method"], r["nfe"]) == (name, *LINE)]
        line = of_line[0].get("sliced_wasserstein") if of_line else None
        shown = "".join(f" {nfe} NFE |" for nfe in NFES)
        lines += ["", f"**{Path(name).name}**: sliced W2 (mean ± spread over seeds), and at 1 NFE the rest", ""]
        lines.append(
            f"| method |{shown} x {LINE[0]} at {LINE[1]} | off data | energy distance | modes covered | diversity |"
        )
        lines.append("|---" * (len(NFES) + 6) + "|")
        for method in methods:
            own = {r["nfe"]: r for r in rows if (r["data"], r["method"]) == (name, method)}
            lines.append(f"| {method} |" + "".join(f" {cell(own.get(nfe))} |" for nfe in NFES) + rest(own[1], line))
            if LINE[1] in own:
                blank = " |" * (len(NFES) - 1)
                lines.append(f"| {method}, {LINE[1]} NFE | {cell(own[LINE[1]])} |{blank}" + rest(own[LINE[1]], line))
        floor = floors[name]
        covered = f"{floor['coverage']:.0%}" if "coverage" in floor else "-"
        lines.append(
            f"| real data | {floor['sliced_wasserstein']:.3f} |" + " |" * (len(NFES) - 1) + " | "
            f"{floor['off_data']:.2%} | {floor['energy_distance']:.5f} | {covered} | {floor['diversity']:.2f} |"
        )
    return "\n".join(lines + (means(rows, names, methods, costs) if len(names) > 1 else []))


def paying_table(rows, lines, methods, lengths, metrics):
    """A Markdown table a metric: what a number of fine-tuning steps gives at one call, and in brackets what it costs.

    lines: name -> metrics, of what is not fine-tuned. metrics: name -> how it is called, how its numbers are written.
    """
    parts = []
    for metric, (called, form) in metrics.items():
        cells = []
        for method in methods:
            own = {row["steps"]: row for row in rows if row["method"] == method}
            cells.append([method, *(f"{cell(own[n], metric, form)} ({own[n]['cost']:,.0f})" for n in lengths)])
        cells += [[name, f"{line[metric]:{form}}", *[""] * (len(lengths) - 1)] for name, line in lines.items()]
        parts += [f"**{called}** at 1 NFE, mean ± spread over seeds (cost in flow-matching steps)", ""]
        parts += [markdown(["method", *(f"{n} steps" for n in lengths)], cells), ""]
    return "\n".join(parts[:-1])


def means(rows, names, methods, costs):
    """One more table: means over the data sets, of methods that have a figure on all, of sliced W2 and of off data, the
    best at 1 NFE on top, with what they take beside the network.
    """

    def average(metric, method, nfe):
        own = {r["data"]: r.get(metric, math.inf) for r in rows if (r["method"], r["nfe"]) == (method, nfe)}
        return mean(own.get(name, math.inf) for name in names)

    def ratio(metric, method):
        value, line = average(metric, method, 1), average(metric, *LINE)
        return f"{value / line:.2f}" if value < math.inf and 0 < line < math.inf else "-"

    line = f"x {LINE[0]} at {LINE[1]}"
    header = ["method", "beside it", "step time", *(f"{nfe} NFE" for nfe in (*NFES, LINE[1])), f"1 NFE {line}"]
    header += ["off data at 1 NFE", line]
    cells = []
    for method in sorted(methods, key=lambda method: average("sliced_wasserstein", method, 1)):
        own = [average("sliced_wasserstein", method, nfe) for nfe in (*NFES, LINE[1])]
        shown, off = ["" if value == math.inf else f"{value:.4f}" for value in own], average("off_data", method, 1)
        shown += [ratio("sliced_wasserstein", method), "" if off == math.inf else f"{off:.2%}"]
        c = costs[method]
        held = [f"{c['trained']} / {c['frozen']}", f"{c['seconds_ratio']:.2f} x"]
        cells.append([method, *held, *shown, ratio("off_data", method)])
    return ["", "**Mean over the data sets**: sliced W2, and off data", "", markdown(header, cells)]


def cell(row, metric="sliced_wasserstein", form=".3f"):
    """A metric of a row, nothing where a method makes no such number of steps; what became of seeds that diverged."""
    if row is None:
        return ""
    text = "; ".join(row["diverged"])
    if metric not in row:
        return f"diverged ({text})"
    number = f"{row[metric]:{form}} ± {row[f'{metric}_spread']:{form}}"
    return f"{number} (diverged: {text})" if text else number


def rest(row, line):
    """The other columns of a row."""
    if "sliced_wasserstein" not in row:
        return " | | | | |"
    ratio = f"{row['sliced_wasserstein'] / line:.2f}" if line else "-"
    covered = f"{row['coverage']:.0%}" if "coverage" in row else "-"
    off = f"{row['off_data']:.2%} ± {row['off_data_spread']:.2%}"
    return f" {ratio} | {off} | {row['energy_distance']:.5f} | {covered} | {row['diversity']:.2f} |"
