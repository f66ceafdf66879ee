"""First adapters: a LoRA that was trained elsewhere, or here, as what training begins at.

Files are safetensors as diffusers' training scripts, PEFT and this library write them, and as others do, as far as
diffusers' own loader of the family's pipeline converts them.
"""

import json
import math
import re

from ..files import damage_named, fill, read_json
from . import lora
from .families import diffusers_class
from .lora_files import ADAPTERS_FILE, LAYERS, WHOLE, check_sum, read_file

NAMES = (ADAPTERS_FILE, "adapter_model.safetensors")  # in folders of diffusers and of PEFT
PEFT_ABOUT = "adapter_config.json"  # where PEFT says rank and alpha
PART = re.compile(r"(?:base_model\.model\.|transformer\.|unet\.)*(.+?)\.(?:(lora_[AB])(?:\.default)?\.weight|alpha)")


def begin_at(net, path):
    """Give the adapters of a network, student and average alike, the values of a file; the original is as it was.

    path: the file, or a folder of diffusers or PEFT with one. Its scale alpha / rank goes into B where it is not the
    network's. Where it holds the embedders of r and the twin, as this library writes them, they are taken, too.
    Raises ValueError if it is no such file, not finite, of another rank, or of other layers than those adapted.
    """
    path, tensors, about, own_about = read_file(path, NAMES)
    about = {name.removeprefix(LAYERS): value for name, value in about.items()}
    if not about and (path.parent / PEFT_ABOUT).is_file():
        about = read_json(path.parent / PEFT_ABOUT, "settings of PEFT")
    whole = {name: tensors.pop(name) for name in [*tensors] if name.startswith(WHOLE)}
    if whole:
        check_sum(net.model, own_about, path)
    if not tensors or not all(map(PART.fullmatch, tensors)):
        tensors = _converted(tensors, net.family, path)
    layers = _by_layer(tensors, path)
    _check_layers(net, layers, path)
    own, weights = lora.weights_of(net, lora.STUDENT), dict(whole)
    for layer, parts in layers.items():
        scale = _scale(layer, parts, about) * net.lora.rank / net.lora.alpha
        for part, value in (("lora_A", parts["lora_A"]), ("lora_B", parts["lora_B"] * scale)):
            weights[f"{LAYERS}{layer}.{part}.weight"] = value
    fill({name: p for name, p in own.items() if whole or not name.startswith(WHOLE)}, weights, path)
    lora.move_average(net, 0.0)


def _converted(tensors, family, path):
    """The tensors under the names of diffusers and PEFT, by the loader of the family's pipeline."""
    odd = next((name for name in tensors if "dora" in name or "magnitude" in name), None)
    if odd or not tensors or not family.pipelines:
        raise ValueError(f"{path}: holds {odd or next(iter(tensors), 'nothing')}, which is no part of a plain LoRA")
    pipeline = diffusers_class(family.pipelines[0].name, path)
    from diffusers.utils import convert_unet_state_dict_to_peft

    with damage_named(path, f"no LoRA that {pipeline.__name__} knows"):
        made = pipeline.lora_state_dict(dict(tensors), return_alphas=True)
        made, *alphas = made if isinstance(made, tuple) else (made,)
        made = convert_unet_state_dict_to_peft(made)
    return made | {name: value for one in alphas for name, value in (one or {}).items()}


def _by_layer(tensors, path):
    """Pairs of matrices, and alpha where it is there, by layer."""
    layers = {}
    for name, value in tensors.items():
        fits = PART.fullmatch(name)
        if not fits:
            raise ValueError(f"{path}: holds {name}, which is no part of a plain LoRA")
        layers.setdefault(fits[1], {})[fits[2] or "alpha"] = value
    for layer, parts in layers.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"{path}: {layer} has not both lora_A and lora_B")
    return layers


def _check_layers(net, layers, path):
    """Raise ValueError unless a file adapts the layers that the network has adapters on, with as many ranks."""
    adapted = [name.removeprefix(lora.prefix_of(net)) for name in net.lora.layers]
    strange = [name for name in layers if name not in adapted]
    there = dict(net.model.named_modules())
    for name in strange:
        if name not in there:
            raise ValueError(f"{path}: adapters of another model ({name} is no layer of {type(net.model).__name__})")
    lacks = [name for name in adapted if name not in layers]
    if strange or lacks:
        what = f"{strange[0]} is adapted there alone" if strange else f"{lacks[0]} is not adapted there"
        raise ValueError(f"{path}: {what}: --set lora_layers='{json.dumps(_endings(layers))}'")
    ranks = sorted({len(parts["lora_A"]) for parts in layers.values()})
    if ranks != [net.lora.rank]:
        one = f": --set lora_rank={ranks[0]}" if len(ranks) == 1 else ", and adapters here have one"
        raise ValueError(f"{path}: its rank is {' and '.join(map(str, ranks))}, not {net.lora.rank}{one}")


def _endings(layers):
    """The names of layers without what counts the blocks, as lora_layers takes them."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in layers})


def _scale(layer, parts, about):
    """The factor of B A of a layer: alpha / rank, by PEFT's rules; alpha is the rank where nothing is said."""
    rank = len(parts["lora_A"])
    patterns = about.get("alpha_pattern") or {}
    found = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
    alpha = float(parts.get("alpha", next(found, about.get("lora_alpha", rank))))
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)
