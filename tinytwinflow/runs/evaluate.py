"""What a run is worth: its samples measured against fresh data, next to flow matching's."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..evaluation import metrics
from ..data import toys
from .build import data_of
from .config import method_of, mode_of
from ..evaluation.features import Inception, classifier_of, features_of
from ..files import write_json
from .folder import finished, read_config, refuse_backbone, sampled, trained
from ..data.latents import autoencoder, decode
from .recipes import FLOW_MATCHING
from .run import continue_run, start

BASELINE = "flow-matching"


def measure_points(samples, real, mixture=None):
    """All metrics of a set of points.  (n, D), (n, D) -> dict.

    The energy distance is taken on the first 5,000 of each; diversity is the mean distance of two of the first 5,000
    samples, to be set against that of real data; coverage is given where the mixture is known.
    """
    values = {
        "sliced_wasserstein": metrics.sliced_wasserstein(samples, real),
        "energy_distance": metrics.energy_distance(samples[:5000], real[:5000]),
        "diversity": torch.pdist(samples[:5000]).mean().item(),
    }
    if mixture is not None:
        values["coverage"] = metrics.coverage(samples, mixture)
    return values


def measure_images(x, label, real, net=None):
    """All metrics of a set of images from their features.  (n, D), (n,) or None, (m, D) -> dict.

    Neighbours on the first 5,000 of each; with labels, diversity within a class, and, given the classifier
    `net`, accuracy: the share that it gives the label they were made for.
    """
    values = {"frechet": metrics.frechet(x, real), **metrics.precision_recall_coverage(x[:5000], real[:5000])}
    if label is not None:
        values["diversity"] = metrics.diversity(x, label)
    if label is not None and net is not None:
        values["accuracy"] = (net.last(x).argmax(1) == label).double().mean().item()
    return values


class Yardstick(NamedTuple):
    """What the runs on one set of data are measured with."""

    real: torch.Tensor  # (n, *D), real samples
    label: torch.Tensor | None  # (n,), their labels; a conditional model's samples are made for the same ones
    measure: Callable  # samples, labels -> dict of metrics
    floor: dict  # the metrics of other real samples
    show: Callable  # samples -> what a picture shows of them


def yardstick(folder, config, device="cpu"):
    """Real samples and metrics for a run. A classifier for images is kept in the run folder; latents are judged by
    a classifier of latents, or decoded by the run's `vae` for Inception."""
    source, n = data_of(config), config["eval_samples"]
    (real, label), (again, label_again) = source.fresh(n, 0), source.fresh(n, 1)
    if not config["conditional"]:
        label = label_again = None
    vae = autoencoder(config["vae"], device) if config.get("vae") else None

    def pixels(x):
        return x if vae is None else decode(x, vae, **source.scaling)

    if "size" not in config:
        mixture = toys.mixture(config["data"])

        def measure(x, label):
            return measure_points(x, real, mixture)
    else:
        if config["features"] == "classifier":
            common = {**config, "seed": 0, "batch_size": 128, "subset": 0, "flip": False}
            net = classifier_of(folder, data_of(common), device)
            judge = copy.deepcopy(net).cpu()
        else:
            net, judge = Inception(config["features"]).to(device).eval(), None

        def see(x):
            return features_of(net, pixels(x) if judge is None else x, device)

        of_real = see(real)

        def measure(x, label):
            return measure_images(see(x), label, of_real, judge)

    return Yardstick(real, label, measure, measure(again, label_again), lambda x: pixels(x[:64]) if vae else x)


def rows_of(folder, nfes, yard, device="cpu"):
    """Metrics of a run at each number of network calls, at 1 alone for a method that makes one step only.

    -> list of rows, and dict (method, nfe) -> samples.
    """
    net, config, saved = trained(folder, device)
    method, rows, kept = method_of(config), [], {}
    mode = mode_of(config)
    nfes, mode = (nfes, mode) if mode else ((1,), "any")
    for nfe in nfes:
        x = sampled(net, len(yard.real), saved["data"]["shape"], nfe, mode, config["seed"], yard.label)
        rows.append({"method": method, "mode": mode, "nfe": nfe, **yard.measure(x, yard.label)})
        kept[method, nfe] = x
    return rows, kept


def baseline(folder, device="cpu"):
    """The flow-matching run inside a run folder, trained now if it is not there yet.  -> its path.

    Same network, first weights, data, steps, batch and seed; only the loss is another.
    """
    folder = Path(folder)
    inside = folder / BASELINE
    if not (inside / "config.json").exists():
        start(inside, {**read_config(folder), **FLOW_MATCHING})
    if not finished(inside):
        continue_run(inside, device=device)
    return inside


def evaluate(folder, nfes=(1, 2, 4, 8, 100), flow_nfes=(1, 100), with_baseline=True, device="cpu"):
    """Measure a run and its flow-matching baseline, write metrics.json, and return it with the samples.

    -> metrics as in metrics.json, and a dict (method, nfe) -> samples, with "data" for real ones.
    """
    began = time.perf_counter()
    config = read_config(folder)
    refuse_backbone(folder, config)
    yard = yardstick(folder, config, device)
    rows, kept = rows_of(folder, nfes, yard, device)
    if with_baseline and method_of(config) != "flow matching":
        more, flow_kept = rows_of(baseline(folder, device), flow_nfes, yard, device)
        rows, kept = rows + more, kept | flow_kept
    kept["data"] = yard.real
    kept = {name: yard.show(x) for name, x in kept.items()}
    result = {
        "data": config["data"],
        "seed": config["seed"],
        "seconds": round(time.perf_counter() - began, 2),
        "device": str(device),
        "samples": len(yard.real),
        "floor": yard.floor,
        "rows": rows,
    }
    write_json(Path(folder) / "metrics.json", result)
    return result, kept


def run_table(result):
    """The rows of metrics.json as text."""
    names = list(result["floor"])
    lines = [f"{'method':<16}{'mode':<8}{'NFE':>5}" + "".join(f"{name:>20}" for name in names)]
    for row in result["rows"]:
        lines.append(f"{row['method']:<16}{row['mode']:<8}{row['nfe']:>5}" + "".join(f"{row[m]:>20.4f}" for m in names))
    lines.append(f"{'real data':<29}" + "".join(f"{result['floor'][name]:>20.4f}" for name in names))
    return "\n".join(lines)
