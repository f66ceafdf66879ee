"""Training a pretrained backbone: low-rank adapters, or all its parameters with one average of them or with none."""

import torch

from ..training.ema import warmed_up
from ..training.in_backward import in_backward
from ..training.optimizers import optimizer_of
from ..training.state import WEIGHT_DTYPES, State, new_state
from . import lora
from .velocity_files import load_structure, load_velocity


class LowRank(State):
    """Adapters in training: teacher, average and the frozen original are the same network, its adapters switched."""

    def restart(self):
        lora.move_average(self.net, 0.0)

    def follow(self, ema, teacher_ema):
        lora.move_average(self.net, warmed_up(ema, self.step))

    def weights(self):
        return {"net": lora.adapter_state(self.net)}


class Own(State):
    """A network without an average, its own teacher: what fits when nothing else does."""

    def restart(self):
        pass

    def follow(self, ema, teacher_ema):
        pass

    def weights(self):
        return {"net": self.net.state_dict()}


def build_backbone(config, weights=True):
    """The network that the settings of a recipe with a `model` describe; weights=False: its structure only."""
    load, frozen = load_velocity if weights else load_structure, config["lora_rank"] > 0 and config["parallel"] == "ddp"
    net = load(config["model"], WEIGHT_DTYPES[config["weights"]], config["quantize"], frozen)
    if config["lora_rank"]:
        adapt(net, config["lora_rank"], config["lora_layers"], config["seed"])
    return net


def adapt(net, rank, layers=(), seed=0):
    """Put adapters in float32 on attention and MLPs of a backbone, or on the layers named; its new embedders learn."""
    extra = ("r_embedder", "twin_embedder")
    lora.add(net, layers or linear_layers(net), rank, dtype=torch.float32, seed=seed, also=extra)


MODULATION = ("mod", "norm", "adaLN")


def linear_layers(net):
    """Names of the linear layers of attention and MLPs in a backbone's blocks: all but those the time steers."""
    inside = {id(module) for block in net.blocks() for module in block.modules()}
    return [
        name
        for name, module in net.model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside and not any(m in name for m in MODULATION)
    ]


def backbone_state(net, config, place, helpers=None):
    """The State of a backbone in training, as its settings say: adapters, all parameters in float32 with an average,
    or all parameters, stepped and rounded one by one inside the backward pass. helpers: of a peer's loss, see `peers`;
    only where all parameters are in float32 are they made.
    """
    if config["lora_rank"] or config["optimizer"] == "adafactor":
        place(net)
        device = next(net.parameters()).device
        generator, none = torch.Generator(device).manual_seed(config["seed"]), torch.nn.ModuleDict()
        if config["lora_rank"]:
            average, optimizer = lora.average(net), optimizer_of([net], config["lr"])
            return LowRank(net, average, average, optimizer, generator, none, original=lora.original(net))
        trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        optimizer = in_backward(trained, config["lr"], seed=config["seed"])
        return Own(net, net, None, optimizer, generator, none)
    return new_state(net, config["lr"], seed=config["seed"], helpers=helpers, place=place, one_average=True)


def saved_weights(net, config):
    """What a run of a backbone saves of it: its adapters, or all."""
    return lora.adapter_state(net) if config["lora_rank"] else net.state_dict()


def view(net, config):
    """The velocity field to sample from: the average of the adapters, or the network itself."""
    return lora.average(net) if config["lora_rank"] else net
