"""Files of low-rank adapters, as diffusers and PEFT read them."""

import json

from torch import distributed as dist

from ..files import aside
from .lora import AVERAGE, adapters_of, prefix_of, weights_of


def save_adapters(net, path):
    """Write the average's adapters as diffusers and PEFT read them: safetensors, rank and alpha inside.

    Names are transformer.LAYER.lora_A.weight and lora_B; those of modules trained in full begin with lora_also, and
    diffusers passes them by. Under FSDP2 all processes call it and the first one writes.
    """
    from safetensors.torch import save

    adapters, tensors = adapters_of(net), {}
    for name, value in weights_of(net, AVERAGE).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        tensors[name] = value.detach().cpu().contiguous()
    layers = [name.removeprefix(prefix_of(net)) for name in adapters.layers]
    about = {"r": adapters.rank, "lora_alpha": adapters.alpha, "target_modules": layers, "rank_pattern": {}}
    about = json.dumps({f"transformer.{key}": value for key, value in about.items()})
    if not dist.is_initialized() or dist.get_rank() == 0:
        with aside(path) as file:
            file.write(save(tensors, {"format": "pt", "lora_adapter_metadata": about}))  # where diffusers looks for it
