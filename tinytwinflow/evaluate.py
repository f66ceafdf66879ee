"""What a run is worth: its samples measured against fresh data, next to flow matching's."""

import time
from pathlib import Path

import torch

from . import data, metrics
from .recipes import FLOW_MATCHING, method_of
from .runs import continue_run, data_of, read_config, start, trained, write_json
from .samplers import sample

BASELINE = "flow-matching"


def measure(samples, real, mixture=None):
    """All metrics of a set of samples.  (n, D), (n, D) -> dict.

    The energy distance is taken on the first 5,000 of each, coverage where the mixture is known.
    """
    values = {
        "sliced_wasserstein": metrics.sliced_wasserstein(samples, real),
        "energy_distance": metrics.energy_distance(samples[:5000], real[:5000]),
    }
    if mixture is not None:
        values["coverage"] = metrics.coverage(samples, mixture)
    return values


def sampled(net, n, dim, steps, mode, seed, label=None, classes=0):
    """n samples, the same noise for the same seed; labels at random where the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, dim, generator=generator)
    cond = None
    if classes:
        cond = torch.randint(classes, (n,), generator=generator) if label is None else torch.full((n,), label)
    device = next(net.parameters()).device
    fresh = torch.Generator(device).manual_seed(seed)
    parts = []
    for rows in torch.arange(n).split(4000):
        some = None if cond is None else cond[rows].to(device)
        parts.append(sample(net, z[rows].to(device), steps, mode, cond=some, generator=fresh).cpu())
    return torch.cat(parts)


def yardstick(config):
    """What a run is measured against.  -> real points, the mixture behind them or None, the floor's metrics."""
    source, n, mixture = data_of(config), config["eval_samples"], data.mixture(config["data"])
    real, again = source.fresh(n, 0), source.fresh(n, 1)
    return real, mixture, measure(again, real, mixture)


def rows_of(folder, nfes, real, mixture=None, device="cpu"):
    """Metrics of a run at each number of network calls.  -> list of rows, each with its samples set aside."""
    net, config, saved = trained(folder, device)
    method, rows, kept = method_of(config), [], {}
    mode = "multi" if method == "flow matching" else "any"
    classes = saved["data"]["classes"] if config["conditional"] else 0
    for nfe in nfes:
        x = sampled(net, len(real), saved["data"]["dim"], nfe, mode, config["seed"], classes=classes)
        rows.append({"method": method, "mode": mode, "nfe": nfe, **measure(x, real, mixture)})
        kept[method, nfe] = x
    return rows, kept


def baseline(folder, device="cpu"):
    """The flow-matching run inside a run folder, trained now if it is not there yet.  -> its path.

    Same network, data, steps, batch and seed; only the loss is another.
    """
    folder = Path(folder)
    inside = folder / BASELINE
    if not (inside / "config.json").exists():
        start(inside, {**read_config(folder), **FLOW_MATCHING})
    continue_run(inside, device=device)
    return inside


def evaluate(folder, nfes=(1, 2, 4, 8, 100), flow_nfes=(1, 100), with_baseline=True, device="cpu"):
    """Measure a run and its flow-matching baseline, write metrics.json, and return it with the samples.

    -> metrics as in metrics.json, and a dict (method, nfe) -> samples, with "data" for real ones.
    """
    began = time.perf_counter()
    config = read_config(folder)
    real, mixture, floor = yardstick(config)
    rows, kept = rows_of(folder, nfes, real, mixture, device)
    if with_baseline and method_of(config) != "flow matching":
        more, flow_kept = rows_of(baseline(folder, device), flow_nfes, real, mixture, device)
        rows, kept = rows + more, kept | flow_kept
    kept["data"] = real
    result = {
        "data": config["data"],
        "seed": config["seed"],
        "seconds": round(time.perf_counter() - began, 2),
        "device": str(device),
        "floor": floor,
        "rows": rows,
    }
    write_json(Path(folder) / "metrics.json", result)
    return result, kept


def table(result):
    """The rows of metrics.json as text."""
    names = list(result["floor"])
    lines = [f"{'method':<16}{'mode':<8}{'NFE':>5}" + "".join(f"{name:>20}" for name in names)]
    for row in result["rows"]:
        lines.append(f"{row['method']:<16}{row['mode']:<8}{row['nfe']:>5}" + "".join(f"{row[m]:>20.4f}" for m in names))
    lines.append(f"{'real data':<29}" + "".join(f"{result['floor'][name]:>20.4f}" for name in names))
    return "\n".join(lines)
