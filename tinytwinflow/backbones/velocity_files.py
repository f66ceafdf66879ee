"""Files of backbones: folders that diffusers reads and writes, and beside the weights what `Velocity` adds to them."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files import aside, damage_named, fill, opened_safetensors, read_json
from .families import class_in, diffusers_class, family_of
from .quantised import check_package, is_finite, keep_unpacked, kept_in, quantisation
from .velocity import Velocity

EXTRA, WEIGHTS_FILE = "twinflow.safetensors", "diffusion_pytorch_model.safetensors"
LEARN = ("F16", "BF16", "F32", "F64")  # kinds of number, as safetensors calls them, that weights are trained from


def load_velocity(path, dtype=torch.float32, quantize="none", frozen=False):
    """A Velocity from a diffusers transformer folder or a pipeline folder that holds one, and its extra embedders.

    These come from `twinflow.safetensors`, see `save_velocity`, or from among the weights, where the authors publish
    them; they stay at zero if they are in neither. AnyFlow's models are read as Wan's, see `Velocity`. frozen: its own
    weights will not learn, and so may be quantised, in the folder or by `quantize` as they are loaded, see `quantised`.
    Raises ValueError if the folder holds no such model, its weights do not fit it, are not finite or of a kind that
    does not learn, or the scheduler beside it is not of flow matching.
    """
    folder, kind, model = _found(path)
    kept, already = kept_in(folder, quantize, frozen)
    if kept != "none":
        check_package(kept)
    if not already:
        _refuse_strange_numbers(folder, closely=kept != "none")
    how = {"local_files_only": True, "torch_dtype": dtype, "output_loading_info": True}
    if kept != "none" and not already:
        how["quantization_config"] = quantisation(kept, family_of(kind, folder).embedder, dtype)
    with _unheard(), damage_named(folder, f"no {kind}"):
        model, about = model.from_pretrained(folder, **how)
    keep_unpacked(model)
    net = Velocity(model)
    strange = [name for name in about["unexpected_keys"] if not name.startswith(net.family.roots())]
    if about["missing_keys"] or strange:
        raise ValueError(f"{folder}: weights of another model ({[*about['missing_keys'], *strange][0]} does not fit)")
    for name, value in model.state_dict().items():
        if not is_finite(value):
            raise ValueError(f"{folder}: weight {name} holds NaN or infinity in {str(value.dtype)[6:]}")
    weights = _extra_weights(folder, net.family)
    if weights:
        with_twin = any(name.startswith(net.family.names()[1]) for name in weights)
        fill(_extra_tensors(net, with_twin), weights, folder)
    elif net.family.given:
        raise ValueError(f"{folder}: a model with gate_value has an embedder of r, and there is none")
    return net


def load_structure(path, dtype=torch.float32, quantize="none", frozen=False):
    """What `load_velocity` gives, its weights not read, for another process to fill, and not quantised. Raises
    ValueError as that does.
    """
    folder, kind, model = _found(path)
    kept_in(folder, quantize, frozen)
    with _unheard(), damage_named(folder, f"no {kind}"):
        structure = model.from_config(read_json(folder / "config.json", "diffusers model"))
    cast_as_loaded(structure, dtype)
    return Velocity(structure)


def cast_as_loaded(model, dtype):
    """Give a model the precision that diffusers loads it in: what it keeps in float32 stays so."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, value in model.state_dict(keep_vars=True).items():  # of all else the values are not in files
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept & set(name.split(".")) else dtype)


def save_velocity(net, path):
    """Write a folder that diffusers reads as the plain model, and beside it `twinflow.safetensors`, emb_r and emb_twin.

    Raises ValueError if there is something at `path`.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} already exists: choose another folder")
    writing = path.with_name(path.name + ".tmp")
    net.model.save_pretrained(writing)
    with aside(writing / EXTRA) as file:
        file.write(save(_extra_tensors(net)))
    os.replace(writing, path)


def holds_model(path):
    """Whether there is a whole model in `path`, a transformer folder or a pipeline folder."""
    return any((Path(path) / name).is_file() for name in ("config.json", "transformer/config.json"))


def kind_of_model(path):
    """The class of a model and its name on the hub, None if its folder tells none."""
    about = read_json(_folder(path) / "config.json", "diffusers model")
    name = str(about.get("_name_or_path", ""))
    return class_in(about, path), name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None


@contextmanager
def _unheard():
    """diffusers does not warn of extra embedders and their settings, which it does not use; errors we raise."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _folder(path):
    """The folder of the transformer in `path`."""
    return Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)


def _found(path):
    """The folder of the transformer in `path`, the name of its class, and the class."""
    folder = _folder(path)
    about = read_json(folder / "config.json", "diffusers model")
    kind = class_in(about, folder)
    family_of(kind, folder)
    for file in (folder.parent / "scheduler/scheduler_config.json", folder / "scheduler/scheduler_config.json"):
        if file.is_file():
            about = read_json(file, "diffusers scheduler")
            name, target = about.get("_class_name", "unnamed"), about.get("prediction_type")
            known = re.search("FlowMatch|FlowMap", name) or about.get("use_flow_sigmas")
            if not (known or target == "flow_prediction"):
                raise ValueError(f"{file}: {name} with prediction_type {target} is not of flow matching")
    return folder, kind, diffusers_class(kind, folder)


def _refuse_strange_numbers(folder, closely=False):
    """Raise ValueError that names the first tensor of a kind of number that does not learn: it would be cast. closely:
    or that is not finite, which quantising hides.
    """
    for path in _weight_files(folder):
        with opened_safetensors(path) as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            looked = [name for name, kind in kinds.items() if closely and kind in LEARN]
            odd = [name for name in looked if not file.get_tensor(name).isfinite().all()]
        for name, kind in kinds.items():
            if kind not in LEARN:
                raise ValueError(f"{path}: {name} is {kind}, and weights to learn from are {', '.join(LEARN)}")
        if odd:
            raise ValueError(f"{path}: weight {odd[0]} holds NaN or infinity")


def _extra_tensors(net, with_twin=True):
    """The tensors of emb_r, and of emb_twin, by their names in a file."""
    new = zip(net.family.names(), (net.r_embedder, net.twin_embedder) if with_twin else (net.r_embedder,))
    return {f"{name}.{key}": value for name, module in new for key, value in module.state_dict().items()}


def _weight_files(folder):
    """The safetensors files of a folder that are read: the model's, one or several, and that beside them."""
    index = folder / (WEIGHTS_FILE + ".index.json")
    with damage_named(index):
        parts = read_json(index, "diffusers model")["weight_map"].values() if index.is_file() else [WEIGHTS_FILE]
        return [folder / name for name in sorted({*parts, EXTRA}) if (folder / name).is_file()]


def _extra_weights(folder, family):
    """What a folder holds of the extra embedders, by name."""
    weights = {}
    for path in [folder / EXTRA] if (folder / EXTRA).is_file() else _weight_files(folder):
        with opened_safetensors(path) as file:
            weights |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(family.roots())}
    if family.given:
        weights = {key.replace(family.given, family.names()[0]): value for key, value in weights.items()}
    return weights
