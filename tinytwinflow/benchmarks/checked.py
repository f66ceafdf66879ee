"""What holds for each family of backbones, tried on its small variant, and how large its published models are."""

import copy
import tempfile
from pathlib import Path

import torch

from ..backbones import lora
from ..backbones.families import FAMILIES, diffusers_class
from ..backbones.states import adapt
from ..backbones.velocity import Velocity
from ..backbones.velocity_files import load_velocity, save_velocity
from ..bars import bar
from ..evaluation.tables import markdown
from ..method.draws import normal
from ..method.losses import TwinFlowLoss
from ..training.distributed import without_weights
from .calls import condition_for, named_structure
from .plan import needs_of_step
from .speed_backbone import loss_for, small_shape, with_random_weights

CHECKS = {
    "r = t": "the embedder of r has no effect at r = t, and has one elsewhere",
    "loss": "20 steps on all parameters make the loss less",
    "adapters": "they change nothing at birth, and 20 steps on them alone make the loss less",
    "file": "what is saved is loaded to the bit",
}


def checked_family(kind, seed=0):
    """Try one family on its small variant, weights random.  -> dict: name of `CHECKS` -> whether it holds"""
    family = FAMILIES[kind]
    settings = [about.settings for about in family.published.values()][:1]
    with without_weights():
        net = Velocity(diffusers_class(kind, kind)(**{**dict(*settings), **family.small}))
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        with_random_weights(net, torch.float32, "cpu")
    x = normal(torch.empty(2, *small_shape(net)), draw)
    cond = condition_for(net, 2, 8, lambda shape, device: torch.rand(shape, generator=draw), "cpu")
    cond = {name: value if value.dtype == torch.bool else value.float() for name, value in cond.items()}
    t, r = torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.1])
    held = {}
    with torch.no_grad():
        other = copy.deepcopy(net)
        for parameter in other.r_embedder.parameters():
            parameter.mul_(3.0)
        held["r = t"] = torch.equal(net(x, t, t, cond), other(x, t, t, cond))
        held["r = t"] &= not torch.equal(net(x, t, r, cond), other(x, t, r, cond))
        with tempfile.TemporaryDirectory() as folder:
            save_velocity(net, Path(folder) / "model")
            again = load_velocity(Path(folder) / "model")
            held["file"] = torch.equal(again(x, t, r, cond), net(x, t, r, cond))
    adapted = copy.deepcopy(net)
    adapt(adapted, 4, seed=seed)
    with torch.no_grad():
        same = torch.allclose(adapted(x, t, r, cond), net(x, t, r, cond), atol=1e-5, rtol=1e-5)
    held["adapters"] = same and _falls(adapted, lora.parameters(adapted), x, cond, seed)
    held["loss"] = _falls(net, list(net.parameters()), x, cond, seed)
    return {name: held[name] for name in CHECKS}


def _falls(net, parameters, x, cond, seed):
    """Whether 20 steps of Adam on some parameters make the loss on the same draws less."""
    loss, optimizer = TwinFlowLoss(order=1, share=0.5, one_step_share=0.5), torch.optim.Adam(parameters, lr=1e-4)

    def now():
        return loss(net, x, cond, generator=torch.Generator().manual_seed(seed)).total

    before = now().item()
    for _ in range(20):
        optimizer.zero_grad()
        now().backward()
        optimizer.step()
    return now().item() < before


def table_of_families(kinds=None):
    """Two tables in Markdown: of each family what holds, and of each published model what it is and needs.

    kinds: classes, by default all. A step's bytes are those of adapters at one row, counted as `plan` counts them.
    """
    families, models = [], []
    for kind in bar(list(kinds or FAMILIES), "families", unit="families"):
        family, held = FAMILIES[kind], checked_family(kind)
        needs = [*family.cond, *(f"({name})" for name in family.optional)]
        names = [pipeline.name.removesuffix("Pipeline") for pipeline in family.pipelines]
        some = ["yes" if held[name] else "NO" for name in CHECKS]
        families.append([kind, ", ".join(needs), ", ".join(names) or "-", *some])
        for name, about in family.published.items():
            count = sum(p.numel() for p in named_structure(name)[0].model.parameters())
            bytes_of = needs_of_step(name, loss_for("twinflow", "adapters"), 1, "adapters")
            size, step = " x ".join(map(str, about.latents)), bytes_of["peak"] / 2**30
            models.append([name, kind, f"{count / 1e9:.1f} B", size, str(about.tokens), f"{step:.1f} GiB"])
    first = markdown(["class", "conditions", "pipelines", *CHECKS], families)
    return first + "\n\n" + markdown(["--net", "class", "parameters", "latents", "tokens", "a step"], models)
