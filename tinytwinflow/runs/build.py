"""From a run's settings to its data, its network and its State, on one process or many."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from ..backbones.first_adapters import begin_at
from ..backbones.quantised import refuse_copies
from ..backbones.states import backbone_state, build_backbone
from ..backbones.texts import LATENTS, Texts
from ..data.images import Images
from ..data.points import Points
from ..evaluation.features import Classifier, train_classifier
from ..files import load_weights, read_weights
from ..nets import MLP, DiT, PredictsData, Shifted, UNet, dit, load_published
from ..training.distributed import as_copies, deal_out, prepare, without_weights
from ..training.state import new_state
from .settings import loss_of, method_of

OWN = "own"  # the setting `net` of a network that the user gave


def data_of(config, world=None):
    """The training data that a run's settings describe; of each batch, the rows of this process."""
    part = (world.rank, world.size) if world else (0, 1)
    if not config["data"]:
        raise ValueError("the data of this run were handed over in Python: give them again, load(folder).train(data)")
    if "model" in config:
        data = Texts(config["data"], config["batch_size"], config["seed"], part, config["latents"] or None)
        if LATENTS not in data.tensors and not config["data_free"]:
            raise ValueError(f"{config['data']} holds no latents: --set data_free=true, or embed with --size")
        return data
    if "size" not in config:
        data = Points(config["data"], config["batch_size"], config["seed"], part)
    else:
        keys = ("data", "batch_size", "seed", "data_dir", "size", "flip", "subset")
        data = Images(*(config[key] for key in keys), part=part)
    if config["conditional"] and not data.classes:
        raise ValueError(f"{config['data']} has no labels: --set conditional=false")
    return data


def net_of(config, shape, classes):
    """The network that a run's settings describe, for samples of a shape: (D,) or (C, H, H)."""
    how = {key: config[key] for key in ("shifted", "predicts")}
    return dressed(partial(bare_net, config, shape), classes if config["conditional"] else 0, **how)


def dressed(make, classes, shifted=False, predicts="velocity"):
    """A network for so many classes, of a function that makes a bare one, in what a method needs around it."""
    net = Shifted(make, classes) if shifted else make(classes)
    return PredictsData(net) if predicts == "data" else net


def bare_net(config, shape, classes):
    """The network itself, whatever it answers with."""
    kind = config["net"]
    if kind == OWN:
        raise ValueError("its network is of the user's own: tinytwinflow.load(path, net=...) takes it")
    if (kind == "mlp") != (len(shape) == 1):
        raise ValueError(
            f"net {kind!r} does not fit samples of shape {tuple(shape)}: mlp is for points, others for images"
        )
    needed = {
        "mlp": ("width", "depth", "sharp"),
        "unet": ("width", "depth"),
        "dit": ("width", "depth", "heads", "patch"),
    }
    missing = [key for key in needed.get(kind, ()) if key not in config]
    if missing:
        raise ValueError(f"net {kind!r} needs {', '.join(missing)}, which recipe {config['recipe']} does not set")
    if kind == "mlp":
        return MLP(shape[0], config["width"], config["depth"], classes, sharp=config["sharp"])
    channels, size = shape[0], shape[-1]
    if kind == "unet":
        return UNet(size, channels, classes, [config["width"] * times for times in (1, 2, 2)], config["depth"])
    if kind == "dit":
        return DiT(size, channels, classes, *(config[key] for key in ("width", "depth", "heads", "patch")))
    if kind.startswith("dit-"):
        return dit(kind.removeprefix("dit-"), size, channels, classes, config.get("epsilon", False))
    raise ValueError(f"unknown net {kind!r}: choose from mlp, unet, dit, dit-s-2 ... dit-xl-8")


def published_kind(source):
    """Of "sit:FILE" and "dit:FILE" the kind and the file; any other text is a path, whatever colons are in it.

    >>> published_kind("sit:runs/12:30"), published_kind("runs/12:30")
    (('sit', 'runs/12:30'), ('', 'runs/12:30'))
    """
    kind, colon, path = str(source).partition(":")
    return (kind, path) if colon and kind in ("sit", "dit") else ("", str(source))


def first_weights(net, source):
    """Fill a network from a run folder, a checkpoint, or "sit:FILE" or "dit:FILE", published weights.

    -> what was taken of the file, in words, if it is not all
    """
    kind, path = published_kind(source)
    if kind:
        if not isinstance(net, DiT):
            raise ValueError(f"{source}: published weights are for a dit with predicts=velocity and shifted=false")
        return load_published(net, path, kind)
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    weights, said = read_weights(path)
    load_weights(net, weights, path)
    return said


def first_net(config, data, weights=True, fresh=True):
    """The network as a run's seed makes it, and its first weights if it is fresh; weights=False: structure alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(config["seed"])
        backbone = "model" in config
        net = build_backbone(config, weights) if backbone else net_of(config, data.shape, data.classes)
    if weights and fresh and config["init_from"]:
        (begin_at if backbone else first_weights)(net, config["init_from"])
    return net


def features_for(loss, config, data, device="cpu", fresh=True):
    """What a loss compares images by, if it asks for it: a classifier of the data, of another seed than the judge's.

    fresh=False: without weights. Raises ValueError for images without labels.
    """
    if "features" not in getattr(loss, "helpers", {}).values() or len(data.shape) == 1:
        return None
    if not data.classes:
        raise ValueError(f"{config['method']} compares images by a classifier's features: the data need labels")
    if not fresh:
        with torch.random.fork_rng(devices=[]):
            return Classifier(data.shape[0], data.classes).to(device).requires_grad_(False).eval()
    if config["data"]:
        data = data_of({**config, "seed": 1, "batch_size": 128, "subset": 0, "flip": False})
    return train_classifier(data, device=device, shown=True, seed=config["seed"] + 1)  # the judge's is that or 0


def state_of(config, data, device="cpu", world=None, fresh=True, net=None):
    """The State of a run on this process's device; fresh=False leaves its weights for a checkpoint to fill.

    net: the network, where it is of the user's own. In pieces every process makes the network without weights, and the
    first one once more with them, which it deals out.
    """
    loss = loss_of(config)
    if world is not None and (config["method"], config["base"]) != ("twinflow", "any-step"):
        raise ValueError(f"{method_of(config)} trains on one process: start it without torchrun")
    if world is not None and config["parallel"] == "ddp" and config.get("optimizer") == "adafactor":
        raise ValueError("optimizer adafactor steps before ddp has averaged gradients: --set parallel=fsdp")
    in_pieces = world is not None and config["parallel"] != "ddp"
    how = {key: config[key] for key in ("parallel", "precision", "recompute", "compile")}
    place = partial(prepare, world=world, **how)
    if net is None:
        with without_weights() if in_pieces else nullcontext():
            net = first_net(config, data, weights=not in_pieces, fresh=fresh)
    if world is not None and not in_pieces:
        refuse_copies(net)
    net = net if in_pieces else net.to(device)
    if "model" in config:
        state = backbone_state(net, config, place)
    else:
        more = {"helpers": getattr(loss, "helpers", None), "place": place, "muon_lr": config["muon_lr"]}
        more["features"] = features_for(loss, config, data, device, fresh)
        state = new_state(net, config["lr"], seed=config["seed"], **more)
    if in_pieces and (fresh or config.get("lora_rank")):  # a checkpoint of adapters does not hold the backbone
        deal_out(state.net, first_net(config, data, fresh=fresh).state_dict() if world.rank == 0 else {})
        state.restart()
    elif world is not None and not in_pieces:
        state.call = as_copies(state.net, device)
    return state
