"""What training knows: the network, its averages, the optimiser, the noise, the step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .ema import average_of, update, warmed_up
from .optimizers import optimizer_of

WEIGHT_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass
class State:
    """A network in training: net, two moving averages of it, the optimiser, the noise generator, steps done.

    `average`, the slow one, is the model to sample from; `teacher`, the fast one, is F^-. `helpers`: the networks
    that a peer's loss needs beside these, by name. `call` is net as the loss calls it, where something stands around
    it, and `original` the frozen network of guidance and data-free training, where there is one. `unread`: of the steps
    whose loss terms are still on the device, the step, the terms' names and the terms; see `loop.read_terms`.
    """

    net: torch.nn.Module
    average: torch.nn.Module
    teacher: torch.nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    helpers: torch.nn.ModuleDict
    step: int = 0
    call: Callable | None = None
    original: Callable | None = None
    unread: list = field(default_factory=list)

    def restart(self):
        """Set the averages to the network."""
        for average in dict.fromkeys((self.average, self.teacher)):
            average.load_state_dict(self.net.state_dict())

    def follow(self, ema, teacher_ema):
        """Move the averages towards the network."""
        update(self.average, self.net, warmed_up(ema, self.step))
        if self.teacher is not self.average:
            update(self.teacher, self.net, warmed_up(teacher_ema, self.step))

    def weights(self):
        """All that is trained or follows: tensors by name, by network."""
        networks = {"net": self.net, "average": self.average, "teacher": self.teacher, "helpers": self.helpers}
        if self.teacher is self.average:
            del networks["teacher"]
        return {name: network.state_dict() for name, network in networks.items()}

    def state_dict(self):
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    @torch.no_grad()
    def load_state_dict(self, saved):
        for name, tensors in self.weights().items():
            for key, tensor in tensors.items():
                tensor.copy_(saved[name][key])
        self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # which keeps the tensors that it is given
        try:
            self.generator.set_state(saved["generator"])
        except RuntimeError as error:
            raise ValueError("the run was trained on another kind of device: go on with it there") from error
        self.step = saved["step"]
        self.unread.clear()


def new_state(
    net,
    lr=1e-3,
    betas=(0.9, 0.99),
    seed=0,
    helpers=None,
    place=lambda net: net,
    one_average=False,
    muon_lr=None,
    features=None,
):
    """Start of training: the optimiser, see `optimizer_of`, and the averages equal to the network.

    helpers: of a peer's loss, name -> kind; see `peers`. one_average: to sample from and to teach. place: what is
    done to each network before the optimiser is made, see `distributed.prepare`. features: the network for a helper of
    that kind, if there is one.
    """
    helpers = helpers or {}
    kinds = {name: kind for name, kind in helpers.items() if kind not in ("average", "features")}
    made = torch.nn.ModuleDict(
        {name: average_of(net) if kinds[name] == "frozen" else copy.deepcopy(net) for name in kinds}
    )
    if any(p.dtype == torch.float16 for p in net.parameters() if p.requires_grad):
        raise ValueError("weights in float16 do not learn, AdamW's smallest numbers vanish: use float32 or bfloat16")
    average = average_of(net)
    teacher = average if one_average else average_of(net)
    for network in dict.fromkeys((net, average, teacher, *made.values())):
        place(network)
    learning = [net, *(made[name] for name, kind in kinds.items() if kind != "frozen")]
    if features is not None:
        made.update({name: features for name, kind in helpers.items() if kind == "features"})
    optimizer = optimizer_of(learning, lr, muon_lr, betas)
    generator = torch.Generator(next(net.parameters()).device).manual_seed(seed)
    return State(net, average, teacher, optimizer, generator, made)
