"""Files of low-rank adapters, as diffusers and PEFT read and write them."""

import json

import torch
from torch import distributed as dist

from ..files import aside, check_weights
from .lora import AVERAGE, PAIRS, STUDENT, adapters_of, prefix_of, weights_of

METADATA = "lora_adapter_metadata"  # where diffusers looks for what PEFT has to know


def save_adapters(net, path, which=AVERAGE):
    """Write the average's or the student's adapters as diffusers and PEFT read them: safetensors, alpha inside.

    Names are transformer.LAYER.lora_A.weight and lora_B; those of modules trained in full begin with lora_also, and
    diffusers passes them by. Under FSDP2 all processes call it and the first one writes.
    """
    from safetensors.torch import save as as_bytes

    adapters, tensors = adapters_of(net), {}
    for name, value in weights_of(net, which).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        tensors[name] = value.detach().cpu().contiguous()
    layers = [name.removeprefix(prefix_of(net)) for name in adapters.layers]
    about = {"r": adapters.rank, "lora_alpha": adapters.alpha, "target_modules": layers, "rank_pattern": {}}
    about = json.dumps({f"transformer.{key}": value for key, value in about.items()})
    if not dist.is_initialized() or dist.get_rank() == 0:
        with aside(path) as file:
            file.write(as_bytes(tensors, {"format": "pt", METADATA: about}))


@torch.no_grad()
def load_adapters(net, path):
    """Read a file of `save` into student and average of a network that has the same adapters, not sharded.

    Raises ValueError if it is no such file, or of other layers, another rank or another alpha.
    """
    from safetensors import safe_open

    adapters = adapters_of(net, merged=False)
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            alpha = about.get("transformer.lora_alpha", adapters.rank)  # diffusers' rule where none is said
    except Exception as error:  # whatever a missing or damaged file makes the reader raise
        raise ValueError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    check_weights(weights_of(net, STUDENT), found, path)
    if alpha != adapters.alpha:
        raise ValueError(f"{path}: its alpha is {alpha}, here it is {adapters.alpha}")
    for which in PAIRS:
        for name, value in weights_of(net, which).items():
            value.copy_(found[name])
