"""A page to play with: one HTML file in which a browser runs the trained networks of a run on points in the plane.

The page is play.html, beside this file, with all that it needs written into it: weights rounded to as many bits as fit
into `LARGEST_PAGE`, noise, real points. Nothing is read from the network.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch

from ..evaluation.metrics import limit_of, sliced_wasserstein
from ..files import aside
from ..method.exact import GaussianMixture
from ..nets import MLP, PredictsData, Shifted
from .build import data_of
from .checks import same_data
from .evaluate import base_alone, baseline, near_of
from .settings import method_of, mode_of

LARGEST_PAGE = 1_500_000  # bytes
FEWEST_BITS, MOST_BITS = 8, 16  # of a weight
ON_PAGE, NEIGHBOURS = 2000, 20_000  # samples, and real points that they are to be near
LETTERS = "".join(chr(i) for i in range(33, 127) if chr(i) not in '"<\\')  # 91, of which two are thirteen bits
CALLED = {"twinflow": "TwinFlow", "rcgm": "base alone"}


def rounded(w, bits):
    """Whole numbers for a matrix (n, m), or a vector as one row, and a scale a row: w is about codes * scale.

    -> array (n, m) of numbers from -L to L, L = 2^(bits - 1) - 1; array (n,) float32
    """
    w = w.detach().cpu().double().numpy().reshape(1 if w.ndim < 2 else len(w), -1)
    scale = (np.abs(w).max(1) / (2 ** (bits - 1) - 1)).astype(np.float32)
    scale[scale == 0] = 1
    return np.rint(w / scale[:, None]).astype(np.int64), scale


def tensors_of(net):
    """What a page needs of an MLP and what stands around it.  -> dict of tensors, dict of what they are

    Raises ValueError for another network.
    """
    about = {"floor": 0.0, "twin": None}
    if isinstance(net, PredictsData):
        net, about["floor"] = net.net, net.floor
    table = None
    if isinstance(net, Shifted):
        net, about["twin"] = net.net, "shift"
        table = net.label(torch.arange(2 * net.label.plain.num_embeddings))
    if not isinstance(net, MLP):
        raise ValueError(f"the page runs an MLP, this network is a {type(net).__name__}")
    if table is None and net.label is not None:
        table = net.label.weight
    parts = {f"layer{i}": layer for i, layer in enumerate(net.layers)} | {"out": net.out}
    if net.modulation is not None:
        parts["modulation"] = net.modulation
    if any(value.any() for part in (net.twin_in, net.twin_out) for value in part.parameters()):
        parts |= {"twin_in": net.twin_in, "twin_out": net.twin_out}
        about["twin"] = about["twin"] or "sign"
    tensors = {f"{name}.{of}": value for name, part in parts.items() for of, value in part.named_parameters()}
    if table is not None:
        tensors["label"] = table
    sharp = net.unit is torch.nn.functional.relu
    about |= {"width": net.out.in_features, "depth": len(net.layers), "frequencies": len(net.k), "sharp": sharp}
    return tensors, about


def packed(tensors, bits):
    """Tensors in a page: names, shapes and bits, their scales, and the codes as one stream of bits."""
    listed, scales, stream = [], [], []
    for name, w in tensors.items():
        own = bits if w.ndim > 1 else MOST_BITS
        codes, scale = rounded(w, own)
        unsigned = (codes + 2 ** (own - 1) - 1).reshape(-1, 1) >> np.arange(own)[::-1]
        stream.append((unsigned & 1).astype(np.uint8).ravel())
        scales.append(scale)
        listed.append([name, list(codes.shape), own])
    return {"tensors": listed, "scales": _text(np.concatenate(scales)), "codes": in_letters(np.hstack(stream))}


def in_letters(bits):
    """Bits as text, thirteen in two letters, where base64 has twelve.  array (n,) of 0 and 1 -> str"""
    groups = (
        np.append(bits, np.zeros(-len(bits) % 13, bits.dtype)).reshape(-1, 13).astype(int) @ 2 ** np.arange(13)[::-1]
    )
    return np.array(list(LETTERS))[np.stack(np.divmod(groups, len(LETTERS)), 1)].tobytes().decode("utf-32-le")


def _text(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _points(x):
    return _text(x.numpy().astype("<f4"))


def limits_of(near):
    """What is off the data, for the page: a mixture, or some real points, and how far from them is too far.

    Points are kept in 16 bits, and the limit is that of the points as they are kept. -> dict
    """
    if isinstance(near, GaussianMixture):
        white = torch.linalg.inv(torch.linalg.cholesky(near.covs))
        return {"means": near.means.tolist(), "white": white.tolist(), "limit": limit_of(near)}
    codes, scale = rounded(near.T, 16)
    kept = torch.from_numpy(codes * scale[:, None].astype(np.float64)).T
    return {"points": _text(codes.T.astype("<i2")), "scale": scale.tolist(), "limit": limit_of(kept)}


def floor_between(x, y):
    """The distance that the page shows for two sets of real points; None where one of them has fewer than two."""
    most = min(len(x), len(y))
    return sliced_wasserstein(x[:most], y[:most]) if most > 1 else None


def _network(own):
    """A trained network as the page has it, but for its weights.  -> dict, and its tensors"""
    tensors, about = tensors_of(own.net)
    method, mode = method_of(own.config), mode_of(own.config)
    times = own.config["time_shape"] if mode == "any" else (1.0, 1.0, 1.0)
    return about | {"name": CALLED.get(method, method), "method": method, "mode": mode, "times": list(times)}, tensors


def page_of(runs, data, hint=""):
    """The page of trained networks on the same data, as text; the first is the run's own.

    Raises ValueError if they are too large for a page.
    """
    own = runs[0]
    config, about = own.config, own.saved["data"]
    (real, labels), (again, labels_again) = data.fresh(ON_PAGE, 0), data.fresh(ON_PAGE, 1)
    classes = about["classes"] if config["conditional"] else 0
    floors = [
        floor_between(real, again),
        *(floor_between(real[labels == k], again[labels_again == k]) for k in range(classes)),
    ]
    noise = torch.randn(2 * ON_PAGE, 2, generator=torch.Generator().manual_seed(config["seed"]))
    networks, tensors = zip(*map(_network, runs))
    count = sum(w.numel() for w in tensors[0].values())
    content = {
        "data": Path(config["data"]).name or "your data",
        "about": f"{own.saved['step']:,} steps of batch {config['batch_size']:,}, MLP of {config['depth']} layers of "
        f"{config['width']}, {count:,} weights, seed {config['seed']}",
        "classes": classes,
        "letters": LETTERS,
        "noise": _points(noise[:ON_PAGE]),  # as `folder.sampled` draws it
        "renoise": _points(noise[ON_PAGE:]),
        "real": _points(real),
        "labels": labels.tolist() if classes else [],
        "near": limits_of(near_of(config, data, real, NEIGHBOURS)),
        "floors": floors,
        "scaled": about.get("mean") is not None,
        "hint": hint,
    }

    def written(bits):
        whole = [net | packed(w, bits) for net, w in zip(networks, tensors)]
        text = json.dumps(content | {"bits": bits, "networks": whole}, separators=(",", ":"))
        return Path(__file__).with_suffix(".html").read_text().replace("{{run}}", text.replace("<", "\\u003c"))

    weights = sum(w.numel() for own in tensors for w in own.values())
    left = LARGEST_PAGE - len(written(FEWEST_BITS).encode())
    bits = min(MOST_BITS, FEWEST_BITS + left * 13 // (2 * weights))
    if bits < FEWEST_BITS:
        raise ValueError(
            f"{len(runs)} networks of {count:,} weights do not fit into a page of {LARGEST_PAGE / 1e6} MB at "
            f"{FEWEST_BITS} bits a weight: choose a smaller width or depth"
        )
    return written(bits)


def refuse_page(own, out):
    """Raise ValueError if no page can be made of a run, or written there."""
    config, (shape, classes) = own.config, (own.saved["data"][key] for key in ("shape", "classes"))
    if tuple(shape) != (2,):
        what = f"points of {shape[0]} numbers" if len(shape) == 1 else "images"
        raise ValueError(f"a page to play with is of points in the plane, this run makes {what}")
    if config["conditional"] and not classes:
        raise ValueError("a page to play with has labels or no condition, this run has conditions of another kind")
    if own.saved["step"] < config["steps"]:
        raise ValueError(
            f"{own.folder} is at step {own.saved['step']} of {config['steps']}: "
            f"python -m tinytwinflow train {config['recipe']} --out {own.folder} --resume first"
        )
    if out.suffix != ".html" or out.is_dir():
        raise ValueError(f"--out takes FILE.html, got {out}{', a folder' * out.is_dir()}")


def play(own, out=None, with_base=True, device="cpu"):
    """Write the page of a run, and train what it stands beside if it is not there yet, see `evaluate.baseline`.

    own: see `folder.Trained`, with a folder. out: FILE.html, by default play.html in that folder. with_base: train the
    any-step base alone, too. -> the path. Raises ValueError for a run of anything but points in the plane, or one that
    has not taken its last step.
    """
    out, config = Path(out or own.folder / "play.html"), own.config
    refuse_page(own, out)
    data = own.data
    if data is None:
        data = data_of(config)
        same_data(data, own.saved["data"], own.folder)
    own, runs, hint = own._replace(data=data), [own], ""
    if method_of(config) == "twinflow" and with_base:
        runs.append(base_alone(own, device))
    elif method_of(config) == "twinflow":
        hint = f"python -m tinytwinflow play {own.folder} trains the base alone, too, and adds it here."
    if method_of(config) != "flow matching":
        runs.append(baseline(own, device))
    text = page_of([run._replace(net=run.net.cpu()) for run in runs], data, hint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as file:
        file.write(text.encode())
    return out
