"""Files of low-rank adapters, as diffusers and PEFT read them."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import distributed as dist
from torch import nn

from ..files import aside, opened_safetensors
from .lora import AVERAGE, adapters_of, prefix_of, weights_of

ADAPTERS_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it in a folder
LAYERS, WHOLE = "transformer.", "lora_also."  # before the names of adapters, and of modules trained in full
SUM = ("gate_value", "deltatime_type")  # settings of a model that say how its embeddings are added
LORA_KEY, OWN_KEY = "lora_adapter_metadata", "twinflow"  # in a file's metadata: what PEFT is told, and what else is


class AdapterFile(NamedTuple):
    """What there is in a file of adapters."""

    tensors: dict  # transformer.LAYER.lora_A.weight and lora_B
    whole: dict  # what was trained in full, by its names in a `Velocity`: r_embedder.linear_1.weight
    lora: dict  # what PEFT is told: rank, alpha, layers
    about: dict  # all else that is said of them; "also": names of the modules trained in full
    path: str = "adapters"

    def layers(self):
        return self.lora[f"{LAYERS}target_modules"]


def adapter_file(net, **about):
    """The average's adapters of a network as they stand in a file. Under FSDP2 all processes call it."""
    adapters, tensors = adapters_of(net), {}
    for name, value in weights_of(net, AVERAGE).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        tensors[name] = value.detach().cpu().contiguous()
    layers = [name.removeprefix(prefix_of(net)) for name in adapters.layers]
    lora = {"r": adapters.rank, "lora_alpha": adapters.alpha, "target_modules": layers, "rank_pattern": {}}
    lora = {f"{LAYERS}{key}": value for key, value in lora.items()}
    whole = {name.removeprefix(WHOLE): tensors.pop(name) for name in [*tensors] if name.startswith(WHOLE)}
    config = getattr(getattr(net, "model", None), "config", {})
    about |= {key: config[key] for key in SUM if key in config}
    return AdapterFile(tensors, whole, lora, {"also": list(adapters.also), **about})


def write_adapters(file, path):
    """Write an `AdapterFile` as diffusers and PEFT read it: safetensors, rank and alpha inside.

    Names of modules trained in full begin with lora_also, and diffusers passes them by. Of several processes the first
    one writes.
    """
    from safetensors.torch import save

    if not dist.is_initialized() or dist.get_rank() == 0:
        said = {LORA_KEY: json.dumps(file.lora), OWN_KEY: json.dumps(file.about), "format": "pt"}
        whole = {f"{WHOLE}{name}": value for name, value in file.whole.items()}
        with aside(path) as writing:
            writing.write(save({**file.tensors, **whole}, said))


def read_file(path, names=(ADAPTERS_FILE,)):
    """A file of adapters of any origin, or one of such names in a folder.

    -> its path, its tensors, what it says to PEFT and to this library. Raises ValueError if there is none, or it is
    damaged or not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path)
    with opened_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        lora, own = (json.loads((file.metadata() or {}).get(key, "{}")) for key in (LORA_KEY, OWN_KEY))
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    return path, tensors, lora, own


def read_adapters(path):
    """What `write_adapters` wrote, in a file or in a folder.  -> AdapterFile

    Raises ValueError as `read_file` does, and if there is no embedder of r, as with adapters that were not trained by
    this method.
    """
    path, tensors, lora, own = read_file(path)
    whole = {name.removeprefix(WHOLE): tensors.pop(name) for name in [*tensors] if name.startswith(WHOLE)}
    if not lora or not own or not any(name.startswith("r_embedder.") for name in whole):
        raise ValueError(f"{path}: holds no embedder of r, so these adapters were not trained to make jumps")
    return AdapterFile(tensors, whole, lora, own, str(path))


def check_sum(model, about, path):
    """Raise ValueError if what a file says of its model's sum of embeddings, if anything, is not so of this model."""
    here, there = ([said.get(key) for key in SUM] for said in (getattr(model, "config", {}), about))
    if here != there:
        raise ValueError(f"{path}: adapters of another model ({' and '.join(SUM)} {there} there, {here} here)")


def check_adapters(model, file):
    """Raise ValueError that names the first layer of an `AdapterFile` that a model has not, or has of another size."""
    check_sum(model, file.about, file.path)
    modules, rank = dict(model.named_modules()), file.lora[f"{LAYERS}r"]
    for layer in file.layers():
        found = modules.get(layer)
        found = getattr(found, "base_layer", found)  # where another adapter sits on it already
        if not isinstance(found, nn.Linear):
            raise ValueError(f"{file.path}: adapters of another model ({layer} is no linear layer here)")
        here = [(rank, found.in_features), (found.out_features, rank)]
        there = [file.tensors.get(f"{LAYERS}{layer}.{part}.weight") for part in ("lora_A", "lora_B")]
        there = [None if value is None else tuple(value.shape) for value in there]
        if here != there:
            raise ValueError(f"{file.path}: adapters of another model or rank ({layer}: {there} there, {here} here)")
