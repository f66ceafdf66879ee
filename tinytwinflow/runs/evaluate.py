"""What a run is worth: its samples measured against fresh data, next to flow matching's."""

import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..bars import bar
from ..data import toys
from ..data.latents import autoencoder, decode
from ..evaluation.features import Inception, classifier_of, features_of
from ..evaluation.metrics import measure_images, measure_points, strays
from ..files import write_json
from .build import data_of
from .checks import enough_to_measure, same_data
from .folder import finished, sampled, trained
from .methods import FLOW_MATCHING, RCGM
from .run import begin, finish, resume
from .settings import method_of, mode_of

BASELINE = "flow-matching"


class Yardstick(NamedTuple):
    """What the runs on one set of data are measured with."""

    real: torch.Tensor  # (n, *D), real samples
    label: torch.Tensor | None  # (n,), their labels; a conditional model's samples are made for the same ones
    measure: Callable  # samples, labels -> dict of metrics
    floor: dict  # the metrics of other real samples
    show: Callable  # samples -> what a picture shows of them
    held_out: bool  # whether the real samples were kept from training
    near: object  # of points, what they are to be near: a mixture or many real samples (m, D), see `off_data`


def yardstick(config, data=None, folder=None, device="cpu", shown=False):
    """Real samples and metrics for the runs of a config. A classifier of images is kept in the folder, if there is one;
    latents are judged by a classifier of latents, or decoded by the run's `vae` for Inception.

    data: where they are given, and not what the settings name. shown: with a bar where it takes its time.
    """
    source, n = data_of(config) if data is None else data, config["eval_samples"]
    if hasattr(source, "test_rows"):
        enough_to_measure(config, source)
    (real, label), (again, label_again) = source.fresh(n, 0), source.fresh(n, 1)
    if not config["conditional"]:
        label = label_again = None
    vae = autoencoder(config["vae"], device) if config.get("vae") else None

    def pixels(x):
        return x if vae is None else decode(x, vae, **source.scaling)

    by_classifier, near = config.get("features", "classifier") == "classifier", None
    if real.ndim == 2 or by_classifier and not source.classes:  # images without labels are measured as points
        D = real[0].numel()
        near = near_of(config, source, real, 200_000 // D if D <= 8 else 5000)

        def measure(x, label):
            return measure_points(x.flatten(1), real.flatten(1), near)
    else:
        if by_classifier:
            common = {"seed": 0, "batch_size": 128, "subset": 0, "flip": False}
            judged_by = data_of({**config, **common}) if data is None or config["data"] else data
            net = classifier_of(folder, judged_by, device, shown)
            judge = copy.deepcopy(net).cpu()
        else:
            net, judge = Inception(config["features"]).to(device).eval(), None

        def see(x):
            return features_of(net, pixels(x) if judge is None else x, device)

        of_real = see(real)

        def measure(x, label):
            return measure_images(see(x), label, of_real, judge)

    floor, held_out = measure(again, label_again), getattr(source, "held_out", True)
    return Yardstick(real, label, measure, floor, lambda x: pixels(x[:64]) if vae else x, held_out, near)


def near_of(config, source, real, most):
    """What samples are to be near: a mixture, or so many real samples at most.  -> GaussianMixture or (m, D)"""
    mixture = toys.mixture(config["data"])
    if mixture is not None:
        return mixture
    return (source.neighbours(most) if hasattr(source, "neighbours") else real[:most]).flatten(1)


def rows_of(own, nfes, yard, shown=False):
    """Metrics of a trained network at each number of calls, at 1 alone for a method that makes one step only.

    own: see `folder.Trained`. -> list of rows, and dict (method, nfe) -> samples.
    """
    method, mode, rows, kept = method_of(own.config), mode_of(own.config), [], {}
    nfes, mode = (nfes, mode) if mode else ((1,), "any")
    n, shape, seed = len(yard.real), own.saved["data"]["shape"], own.config["seed"]
    with bar(None, f"measuring {method}", n * sum(nfes), unit="calls", hidden=not shown) as told:
        for nfe in nfes:
            times = own.config["time_shape"]
            x = sampled(own.net, n, shape, nfe, mode, seed, yard.label, tell=told.update, time_shape=times)
            rows.append({"method": method, "mode": mode, "nfe": nfe, **yard.measure(x, yard.label)})
            kept[method, nfe] = x
    return rows, kept


def beside(own, name, changes, device="cpu"):
    """A run with other settings inside a run's folder, trained now if it is not there yet.  -> Trained

    Same network, first weights, data, steps, batch and seed; only the loss is another.
    """
    inside = own.folder / name
    if not finished(inside):
        begun = (inside / "config.json").exists()
        finish(
            resume(inside, device, data=own.data)
            if begun
            else begin(own.config | changes, inside, device, data=own.data)
        )
    return trained(inside, device)


def baseline(own, device="cpu"):
    """The flow-matching run inside a run's folder, see `beside`."""
    return beside(own, BASELINE, FLOW_MATCHING, device)


def base_alone(own, device="cpu"):
    """The any-step base without the twin, a run inside a run's folder, see `beside`."""
    return beside(own, "base-alone", RCGM, device)


def evaluate(own, nfes=(1, 2, 4, 8, 100), flow_nfes=(1, 100), with_baseline=True, device="cpu"):
    """Measure a trained network and its flow-matching baseline; write metrics.json if it has a folder.

    own: see `folder.Trained`. -> metrics as in metrics.json; a dict (method, nfe) -> samples, "data" for real ones; of
    points, a dict (method, nfe) -> an array (n,), which of them are off the data.
    """
    began = time.perf_counter()
    data = own.data
    if data is None:
        data = data_of(own.config)
        same_data(data, own.saved["data"], own.folder)
    yard = yardstick(own.config, data, own.folder, device, shown=True)
    rows, kept = rows_of(own, nfes, yard, shown=True)
    if with_baseline and method_of(own.config) != "flow matching":
        more, flow_kept = rows_of(baseline(own, device), flow_nfes, yard, shown=True)
        rows, kept = rows + more, kept | flow_kept
    off = {name: strays(x, yard.near).numpy() for name, x in kept.items() if x.ndim == 2}
    kept["data"] = yard.real
    kept = {name: yard.show(x) for name, x in kept.items()}
    result = {
        "data": own.config["data"],
        "seed": own.config["seed"],
        "seconds": round(time.perf_counter() - began, 2),
        "device": str(device),
        "samples": len(yard.real),
        "held_out": yard.held_out,
        "floor": yard.floor,
        "rows": rows,
    }
    if own.folder is not None:
        write_json(own.folder / "metrics.json", result)
    return result, kept, off
