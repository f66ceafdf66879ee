"""Low-rank adapters: a student, its moving average and the original on one copy of the weights (arXiv 2106.09685).

A linear layer W gets two pairs of thin matrices, (A, B) of the student and (A, B) of its average, and computes
W x + (alpha / rank) B A x with one of them or with none. So the network that is trained, the teacher F^- and the
frozen original are one network and a switch:

    lora.add(net, ["attn.to_q", "attn.to_v"], rank=64)
    loss(net, x, teacher=lora.average(net), original=lora.original(net))

A layer must be called: an adapter of a layer whose weight alone is read has no effect and gets no gradient.
"""

import copy
import fnmatch
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..training import ema

STUDENT, AVERAGE, ORIGINAL = "student", "average", "original"
PAIRS = {STUDENT: ("lora_A", "lora_B"), AVERAGE: ("average_A", "average_B")}


@dataclass
class Adapters:
    """What all adapted layers of one network share: the switch, and what `add` did."""

    rank: int
    alpha: float
    layers: tuple  # names of the adapted layers
    also: tuple  # names of the modules trained in full
    active: str = STUDENT


def add(net, layers, rank, alpha=None, also=(), dtype=None, seed=0):
    """Freeze a network and put adapters on linear layers of it, in place; its function stays what it was.

    layers: endings of their names such as "attn.to_q", or patterns such as "blocks.*.to_?"; if net has a `model`, as
    a wrapped backbone has, layers of that are meant. alpha: default rank. dtype: that adapters and `also` are kept in,
    best float32 if the weights are bfloat16; default as they are, or what they are computed in where quantised. seed:
    of A, uniform in +-1 / sqrt(inputs); B begins at 0.

    also: names of modules to be trained in full, such as time embedders. Of each two copies are kept, its average
    and the original. Raises ValueError for names that are not there or fit no linear layer, and for other numbers.
    """
    if hasattr(net, "lora"):
        raise ValueError("this network has adapters already")
    alpha = rank if alpha is None else alpha
    if not (isinstance(rank, int) and rank >= 1 and 0 < alpha < math.inf):
        raise ValueError(f"rank must be a whole number >= 1 and alpha > 0, got {rank!r} and {alpha!r}")
    names = _matching(net, layers)
    modules = dict(net.named_modules())
    for outer in also:
        if not outer or outer not in modules or type(modules[outer]).forward is nn.Module.forward:
            raise ValueError(f"{outer!r} in also is no module that the network calls")
        inside = [name for name in names if f"{name}.".startswith(outer + ".")]
        inside += [name for name in also if name.startswith(outer + ".")]
        if inside:
            raise ValueError(f"{inside[0]!r} lies in {outer!r}, which is trained in full: leave one of them out")
    net.requires_grad_(False)
    net.lora = Adapters(rank, alpha, tuple(names), tuple(also))
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = modules[name]
        A = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        for which, pair in PAIRS.items():
            for part, value in zip(pair, (A, torch.zeros(layer.out_features, rank))):
                value = value.to(layer.weight.device, dtype or _precision(layer), copy=True)
                setattr(layer, part, _linear(value, which == STUDENT))
        layer.lora = net.lora
        layer.register_forward_hook(_adapt)
    net.lora_also = nn.ModuleDict({which: nn.ModuleList() for which in (AVERAGE, ORIGINAL)})
    for module in map(modules.get, also):
        module.to(dtype=dtype)
        copies = {which: copy.deepcopy(module) for which in net.lora_also}
        for which, kept in net.lora_also.items():
            kept.append(copies[which])
        module.lora, module.lora_copies = net.lora, copies
        module.requires_grad_()
        module.register_forward_hook(_replace, with_kwargs=True)


def average(net):
    """The velocity field of the average, net(x, t, r, cond) without gradient."""
    return partial(_view, net, AVERAGE)


def original(net):
    """The velocity field of the network as it was before `add`, net(x, t, r, cond) without gradient."""
    return partial(_view, net, ORIGINAL)


def parameters(net):
    """What is trained: the student's matrices and the modules trained in full."""
    return list(weights_of(net, STUDENT).values())


def move_average(net, decay):
    """Move the average towards the student: average <- decay * average + (1 - decay) * student; decay in [0, 1)."""
    students, averages = (nn.ParameterList(weights_of(net, which).values()) for which in (STUDENT, AVERAGE))
    ema.update(averages, students, decay)


def adapter_state(net):
    """The student and the average, a small part of net.state_dict() and under the same names."""
    own = {id(p) for which in PAIRS for p in weights_of(net, which).values()}
    names = {name for name, p in net.named_parameters() if id(p) in own}
    return {name: value for name, value in net.state_dict().items() if name in names}


def _adapt(layer, inputs, output):
    """Hook on a linear layer: its output, plus that of the active adapter."""
    adapters = layer.lora
    if adapters.active == ORIGINAL:
        return output
    x = inputs[0]
    # in the layer's precision: float32 matrices keep small steps, and rounded for a product they are in error by no
    # more than the layer's own output is, which is a sum of the same precision; in float32 the product of a GPU is
    # some ten times as slow
    A, B = (getattr(layer, part).weight.to(x.dtype) for part in PAIRS[adapters.active])
    change = nn.functional.linear(nn.functional.linear(x, A), B)
    return output + (adapters.alpha / adapters.rank * change).to(output.dtype)


def _replace(module, args, kwargs, output):
    """Hook on a module trained in full: the output of the copy that is active, if it is not the student."""
    active = module.lora.active
    return output if active == STUDENT else module.lora_copies[active](*args, **kwargs)


# without gradient: where activations are computed again in backward, the switch would be back at the student
@torch.no_grad()
def _view(net, which, x, t, r, cond=None):
    adapters = adapters_of(net)
    before, adapters.active = adapters.active, which
    try:
        return net(x, t, r, cond)
    finally:
        adapters.active = before


def adapters_of(net):
    """The Adapters of a network. Raises ValueError if it has none."""
    adapters = getattr(net, "lora", None)
    if not isinstance(adapters, Adapters):
        raise ValueError("this network has no adapters: lora.add puts them in")
    return adapters


def weights_of(net, which):
    """The parameters of the student or of the average, by their names in a file."""
    found, adapters = {}, adapters_of(net)
    for name in adapters.layers:
        for part, here in zip(PAIRS[STUDENT], PAIRS[which]):
            weight = net.get_submodule(f"{name}.{here}").weight
            found[f"transformer.{name.removeprefix(prefix_of(net))}.{part}.weight"] = weight
    for name in adapters.also:
        module = net.get_submodule(name)
        module = module if which == STUDENT else module.lora_copies[which]
        found |= {f"lora_also.{name}.{key}": value for key, value in module.named_parameters()}
    return found


def prefix_of(net):
    """How the names of a wrapped backbone's layers begin."""
    return "model." if isinstance(getattr(net, "model", None), nn.Module) else ""


def _matching(net, patterns):
    """Names of the linear layers that some pattern fits, in the order of the network."""
    there = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix_of(net))]
    found = set()
    for pattern in patterns:
        fits = fnmatch.filter([f".{name}" for name in there], f"*.{pattern}")
        if not fits:
            some = ", ".join(there[:: max(1, len(there) // 5)][:6])
            raise ValueError(f"no linear layer is called {pattern!r}; some there are: {some}")
        found.update(fits)
    if not found:
        raise ValueError("layers must name at least one linear layer")
    return [name for name in there if f".{name}" in found]


def _precision(layer):
    """What a linear layer computes in; quantised weights may be whole numbers."""
    kind = layer.weight.dtype
    return kind if kind.is_floating_point else layer.compute_dtype or torch.float32


def _linear(weight, trained):
    """A linear layer with this weight and no bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    return layer
