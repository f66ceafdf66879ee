"""What would fail after an hour of training is refused before the first step, and before anything is written."""

import copy
import sys

import torch

from ..backbones.first_adapters import begin_at
from ..backbones.prompts import decode_latents, load_decoder
from ..backbones.states import build_backbone
from ..backbones.texts import read_conditions
from ..data.batches import known_of, null_of
from ..data.latents import autoencoder
from ..evaluation.features import Inception
from ..files import damage_named, reason
from ..method.conditions import count_rows
from ..method.path import same_shape
from ..method.twin import check_field
from ..nets import PredictsData
from ..training.checkpoints import has_checkpoint
from ..training.distributed import blocks_of, without_weights
from .build import first_weights, net_of
from .settings import method_of


def refuse_misfits(config, data, net=None, folder=None, measured=True):
    """Raise ValueError if a run would fail after its beginning for what can be seen before; write nothing."""
    if folder is not None and (
        any((folder / name).exists() for name in ("config.json", "log.jsonl")) or has_checkpoint(folder)
    ):
        raise ValueError(
            f"{folder} already holds a run: --resume or load(folder).train() continues it, --out DIR starts another"
        )
    if "model" in config:
        with without_weights():
            net = build_backbone(config, weights=False)
        if config["init_from"]:
            begin_at(net, config["init_from"])
        x, cond = data.batch(0)
        net.check(x, cond)
        for shape in getattr(data, "shapes", [data.shape]):
            net.check(torch.zeros(1, *shape), data.null)
        if config["validation"]:
            cond = read_conditions(config["validation"])
            net.check(torch.zeros(count_rows(cond), *data.shape), cond)
    elif net is not None:
        if config.get("predicts") == "data" and not isinstance(net, PredictsData):
            raise ValueError(f"{method_of(config)} takes a network that predicts x: net=nets.PredictsData(net)")
        _try(net, data, config.get("shifted", False))
    else:
        if config["conditional"] and not data.classes:
            raise ValueError("labels are (n,) whole numbers from 0 on: other conditions need a net of your own")
        with torch.device("meta"):
            net = net_of(config, data.shape, data.classes)
        if config["init_from"]:
            said = first_weights(net_of(config, data.shape, data.classes), config["init_from"])
            if said:
                print(f"{config['init_from']}: {said}", file=sys.stderr)
    if config["guidance"] and null_of(data) is None:
        raise ValueError("guidance needs labels, or data with null, a condition that stands for none")
    if config["recompute"] and not blocks_of(net):
        raise ValueError(f"recompute is for networks with blocks, net {config['net']!r} has none")
    if measured and hasattr(data, "test_rows"):
        enough_to_measure(config, data)
    if config.get("features", "classifier") != "classifier":
        judged = Inception(config["features"])
        if data.shape[0] != 3 and not config.get("vae"):
            raise ValueError(f"Inception takes RGB images, not {data.shape[0]} channels: --set features=classifier")
        del judged
    if config.get("vae") and "model" in config:
        with damage_named(config["vae"], f"decodes no latents of shape {tuple(data.shape)}"):
            decode_latents(torch.zeros(1, *data.shape)[..., :8, :8], load_decoder(config["vae"]))
    elif config.get("vae"):
        autoencoder(config["vae"])


def same_data(data, known, folder):
    """Raise ValueError that says what differs if data are not those that a run was begun with.

    known: what its checkpoint says of them. Of an iterable or a function of the step other batches may have been looked
    at: mean and spread may differ by half of the spread, and units and number of labels stay the run's.
    """
    now, streamed, differs = known_of(data), hasattr(data, "keep_units"), None
    for name in ("shape",) if streamed else ("shape", "classes", "count"):
        if known.get(name, now.get(name)) != now.get(name):
            differs = differs or f"{name} was {known[name]}, is now {now.get(name)}"
    if differs is None and known.get("mean") is not None:
        for name in ("mean", "std"):
            values = torch.broadcast_tensors(known[name].cpu(), now[name].cpu(), known["std"].cpu())
            was, new, scale = (value.double().flatten() for value in values)
            off = ((new - was).abs() > (0.5 if streamed else 1e-6) * scale).nonzero().flatten().tolist()
            if off and differs is None:
                differs = f"the {name} of column {off[0]} was {was[off[0]]:.6g}, is now {new[off[0]]:.6g}"
    if differs is None and known.get("mark", now.get("mark")) != now.get("mark"):
        differs = "as many, but some of them are others"
    if differs:
        raise ValueError(f"{folder or 'the model'} was begun with other data: {differs}")
    if streamed:
        data.keep_units(known)


@torch.no_grad()
def _try(net, data, shifted=False):
    """Raise ValueError unless a user's network is one that can be trained, and answers in the shape of x.

    shifted: it has to take shifted conditions, too, see `nets.Shifted`.
    """
    if not isinstance(net, torch.nn.Module):
        raise ValueError(f"a net to train is an nn.Module, got {type(net).__name__}")
    check_field(net)
    x, cond = data.fresh(2)
    t, r = torch.full((len(x),), 0.5), torch.full((len(x),), 0.25)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("a net to train has parameters that learn, this one has none")
    try:
        copied = copy.deepcopy(net).cpu().eval()
        answer = copied(x, t, r, cond)
        if shifted:
            same_shape(copied(x, t, r, {"cond": cond, "shift": torch.ones(len(x), dtype=torch.long)}), x, "net and x")
    except ValueError:
        raise
    except Exception as error:  # whatever a network of a user's own raises
        raise ValueError(f"net fails on two samples ({reason(error)})") from error
    same_shape(answer, x, "net's answer and x")
    if answer.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"net's answer to x in float32 must be of such numbers, too, got {answer.dtype}")


def enough_to_measure(config, data):
    """Raise ValueError if too few images are kept from training for the metrics of a run."""
    kept = f"{config['data']}: {len(data.test_rows)} images are kept to measure against, of a folder every twentieth"
    if len(data.test_rows) < 12:
        raise ValueError(f"{kept}; at least 12 are needed, so 240 in the folder, which holds {len(data.train)}")
    for draw in (0, 1) if config["conditional"] else ():
        labels = data.test.labels[data.fresh_rows(config["eval_samples"], draw)]
        if labels.bincount().max() < 2:
            raise ValueError(f"{kept}; diversity needs two of one class among the {len(labels)} that are looked at")
