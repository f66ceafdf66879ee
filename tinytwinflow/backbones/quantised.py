"""Quantised backbones: frozen weights of 4 or 8 bits, as diffusers loads them, under adapters that learn.

nf4 is of bitsandbytes, int8 and float8 are of torchao. All linear layers are quantised but for the MLP that embeds the
time: what is new in a `Velocity` begins as a copy of it, and learns.
"""

import importlib.util

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..files import damage_named, read_json

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
QUANTIZE = ("none", *PACKAGES)
TORCHAO = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share a scale, and scales that share one


def kept_in(folder, quantize, frozen):
    """What the weights of a diffusers folder are kept in once loaded, "none" if as they are, and whether in the folder.

    quantize: one of QUANTIZE. frozen: whether no weights learn and each process holds all of them. Raises ValueError if
    they are quantised and not frozen, or in another way than is known here, or are to be quantised twice.
    """
    there = read_json(folder / "config.json", "diffusers model").get("quantization_config")
    kind = quantize
    if there:
        with damage_named(folder / "config.json", "no quantization_config of diffusers"):
            kind = _kind_of(dict(there))
        if kind is None:
            ways = "bitsandbytes in 4 bits, or torchao's " + " or ".join(TORCHAO.values())
            raise ValueError(f"{folder}: its weights are quantised in a way not known here, which are {ways}")
    if kind != "none" and not frozen:
        where = f"{folder}: its weights are quantised (quantization_config)" if there else f"quantize={kind}"
        raise ValueError(f"{where}, and such do not learn and stay whole: --set lora_rank=64 parallel=ddp")
    if there and quantize != "none":
        raise ValueError(f"{folder}: its weights are quantised already, as {kind}: --set quantize=none")
    return kind, bool(there)


def _kind_of(about):
    """What a quantization_config is, in our words; None if it is something else."""
    if about["quant_method"] == "bitsandbytes":
        return "nf4" if about.get("load_in_4bit") or about.get("_load_in_4bit") else None
    if about["quant_method"] == "torchao":
        return {name: kind for kind, name in TORCHAO.items()}.get(about["quant_type"]["default"]["_type"])
    return None


def quantisation(kind, embedder, dtype):
    """The quantization_config that `from_pretrained` of diffusers is given for a kind.

    embedder: path of what is not quantised. dtype: of the rest and of products.
    """
    import diffusers

    if kind == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how |= {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": [embedder]}
        return diffusers.BitsAndBytesConfig(**how)
    from torchao import quantization

    return diffusers.TorchAoConfig(getattr(quantization, TORCHAO[kind])(), modules_to_not_convert=[embedder])


def check_package(kind):
    """Raise ValueError if the package of a kind is not installed."""
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"weights in {kind} need {PACKAGES[kind]}: pip install 'tinytwinflow[quantized]'")


def keep_unpacked(model):
    """Keep bitsandbytes, on a CPU, from packing weights anew at the first call without gradient, after which they give
    none.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def in_floats(module):
    """Make the quantised linear layers of a module ordinary ones, in place: what is copied of it is to learn."""
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, nn.Linear) and _is_quantised(layer.weight):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            dtype = getattr(layer.weight, "quant_state", layer.weight).dtype if layer.bias is None else layer.bias.dtype
            plain.weight, plain.bias = nn.Parameter(_floats(layer.weight, dtype)), layer.bias
            module.set_submodule(name, plain)


def _is_quantised(weight):
    return hasattr(weight, "quant_state") or is_traceable_wrapper_subclass(weight)


def _floats(weight, dtype):
    """The numbers that a quantised weight stands for, in floats."""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.dequantize().to(dtype)


def is_finite(value):
    """Whether all numbers of a tensor are, quantised ones and their scales, too."""
    if is_traceable_wrapper_subclass(value):
        return all(is_finite(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())


def refuse_copies(net):
    """Raise ValueError if a network has weights of torchao, which DDP cannot compare between its processes."""
    if any(is_traceable_wrapper_subclass(weight) for weight in net.parameters()):
        raise ValueError("int8 and float8 weights train on one process, without torchrun; nf4 on several")


def bytes_of_weight(kind, rows, columns):
    """Bytes that a quantised matrix takes, its scales included.

    nf4: half a byte a number, a byte for 64 and 4 more for 256 of those, and two tables of 16 and 256 numbers and an
    offset, in float32; int8 and float8: a byte a number and 4 a row, int8 one more for its zero.

    >>> [round(bytes_of_weight(kind, 3072, 3072) / 3072**2, 4) for kind in PACKAGES]
    [0.516, 1.0016, 1.0013]
    """
    if kind == "nf4":
        blocks = -(-rows * columns // NF4_BLOCK)
        return -(-rows * columns // 2) + blocks + 4 * (-(-blocks // NF4_GROUP) + 16 + 256 + 1)
    return rows * columns + rows * (5 if kind == "int8" else 4)
