"""Pretrained: a diffusers flow transformer as a velocity field, its own forward untouched.

A network of TwinFlow is shown two times, a pretrained one only knows t. Hooks on the small MLP that embeds the time
add what is new to its output (see `Velocity`); all else is the model as diffusers runs it. Of a new kind of
model a `Family` tells where that MLP is, how to call the model and how to read its answer.
"""

import copy
import json
import os
from pathlib import Path

import torch
from torch import nn

from ..files import aside, check_weights
from ..nets.times import check_times
from .families import family_of

EXTRA, WEIGHTS_FILE = "twinflow.safetensors", "diffusion_pytorch_model.safetensors"


class Velocity(nn.Module):
    """A diffusers flow transformer as a velocity field net(x, t, r, cond).

    Its embedding of the time becomes emb(|t|) + (t - r) emb_r(r) + [t < 0] emb_twin(|t|). emb_r and emb_twin are copies
    of emb whose last layer begins at zero, so at birth, and at r = t > 0 ever after, the first term is left: the
    pretrained velocity. Times stay in float32 up to their sinusoids, though the model would round them to its
    own precision; the sum is formed in float32.

    x (B, C, H, W) latents as the model's pipeline scales them, any H and W that its patches divide; t, r (B,) in
    [-1, 1]; cond a dict with what the family needs of prompt_embeds (B, L, D), prompt_mask (B, L) bool or whole
    numbers, pooled (B, P), guidance (B,).  -> (B, C, H, W) in the precision of x.
    Raises ValueError for a model of an unknown class or variant, and for inputs of other shapes.
    """

    def __init__(self, model):
        super().__init__()
        kind, config = type(model).__name__, getattr(model, "config", {})
        self.family = family_of(kind, kind)
        on = [name for name in self.family.off if config.get(name) not in (None, False)]
        if on:
            raise ValueError(f"{kind} with {on[0]}={config[on[0]]!r} is another variant of the model: not supported")
        out = config.get("out_channels") or config["in_channels"]
        if self.family.packed:
            self.channels, self.patch, out = config["in_channels"] // 4, 2, out * config["patch_size"] ** 2 // 4
        else:
            self.channels, self.patch = config["in_channels"], config.get("patch_size", 2)
        if out != self.channels:
            raise ValueError(f"{kind} makes {out} channels of {self.channels}: only a velocity is wanted, no sigma")
        self.cond = dict(self.family.cond, **({"guidance": None} if config.get("guidance_embeds") else {}))
        self.model = model
        embedder = model.get_submodule(self.family.embedder)
        if any(isinstance(getattr(hook, "__self__", None), Velocity) for hook in embedder._forward_hooks.values()):
            raise ValueError(f"this {kind} is already inside a Velocity: use that one or a deep copy of it")
        self.r_embedder, self.twin_embedder = (copy.deepcopy(embedder).requires_grad_() for _ in range(2))
        for new in (self.r_embedder, self.twin_embedder):
            last = [layer for layer in new.modules() if isinstance(layer, nn.Linear)][-1]
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.train(model.training)
        # bound methods: in a deep copy of this network the hooks are those of the copy
        embedder.register_forward_pre_hook(self._show)
        embedder.register_forward_hook(self._add)
        self._now = None  # the times t, r, as long as a call lasts

    def forward(self, x, t, r, cond=None):
        self.check(x, cond)
        check_times(x, t, r)
        dtype = next(self.model.get_submodule(self.family.embedder).parameters()).dtype
        cond = {name: cond[name].to(dtype) if self.cond[name] else cond[name] for name in cond}
        self._now = t.float(), r.float()
        try:
            inputs = self.family.inputs(self.model, x.to(dtype), self.family.clock(t.float().abs()), cond)
            y = self.model(**inputs, return_dict=False)[0]
        finally:
            self._now = None
        return self.family.output(y, x).to(x.dtype)

    def blocks(self):
        """All transformer blocks, in the order of use."""
        return [block for path in self.family.blocks for block in self.model.get_submodule(path)]

    def _sinusoids(self, time, dtype):
        time = time * self.family.unit(self.model.config)
        if self.family.sinusoids is None:
            return time
        return self.model.get_submodule(self.family.sinusoids)(time).to(dtype)

    def _show(self, embedder, args):
        """Before the embedder: the time in full precision in place of the one the model made."""
        if self._now is not None:
            return self._sinusoids(self.family.clock(self._now[0].abs()), args[0].dtype)

    def _add(self, embedder, args, emb):
        """After the embedder: the terms of r and of the twin."""
        if self._now is None:
            return None
        t, r = self._now
        dtype = next(self.r_embedder.parameters()).dtype
        emb_r = self.r_embedder(self._sinusoids(self.family.second(t, r), dtype))
        emb_twin = self.twin_embedder(self._sinusoids(self.family.clock(t.abs()), dtype))
        length, twin = (t - r)[:, None], torch.signbit(t)[:, None]
        return (emb.float() + length * emb_r.float() + twin * emb_twin.float()).to(emb.dtype)

    def check(self, x, cond):
        """Raise ValueError, in one line, for inputs that the model does not take."""
        fits = x.ndim == 4 and x.shape[1] == self.channels and not any(size % self.patch for size in x.shape[2:])
        if not fits or not x.is_floating_point():
            wanted = f"floats (B, {self.channels}, H, W) with H and W multiples of {self.patch}"
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, this model takes {wanted}")
        cond = {} if cond is None else cond
        if not isinstance(cond, dict) or cond.keys() != self.cond.keys():
            got = ", ".join(cond) or "none" if isinstance(cond, dict) else type(cond).__name__
            raise ValueError(f"cond must be a dict of {', '.join(self.cond)}, got {got}")
        prompt = cond["prompt_embeds"]
        for name, key in self.cond.items():
            shape = (len(x), *prompt.shape[1:2]) if name.startswith("prompt") else (len(x),)
            shape = (*shape, self.model.config[key]) if key else shape
            if cond[name].shape != shape or cond[name].is_floating_point() == (name == "prompt_mask"):
                kind = "whole numbers or bool" if name == "prompt_mask" else "floating-point"
                got = f"{cond[name].dtype} of shape {tuple(cond[name].shape)}"
                raise ValueError(f"{name} must be {kind} of shape {shape}, got {got}")


def load_velocity(path, dtype=torch.float32):
    """A Velocity from a diffusers transformer folder or a pipeline folder that holds one, and its extra embedders.

    These come from `twinflow.safetensors`, see `save`, or from among the weights, where the authors publish them;
    they stay at zero if they are in neither. Raises ValueError if the folder holds no such model, its weights do
    not fit it, or the scheduler beside it is not of flow matching.
    """
    diffusers, folder, family = _found(path)
    kind = _read(folder / "config.json")["_class_name"]
    logging, level = diffusers.utils.logging, diffusers.utils.logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would warn that the extra embedders are not used; errors we raise
    try:
        model, found = getattr(diffusers, kind).from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: no {kind} ({str(error).strip().splitlines()[0]})") from None
    finally:
        logging.set_verbosity(level)
    strange = [name for name in found["unexpected_keys"] if not name.startswith(family.roots())]
    if found["missing_keys"] or strange:
        raise ValueError(f"{folder}: weights of another model ({[*found['missing_keys'], *strange][0]} does not fit)")
    net, weights = Velocity(model), _extra(folder, family)
    if weights:
        _fill(net, weights, folder)
    return net


def load_structure(path, dtype=torch.float32):
    """What `load` gives, its weights not read, for another process to fill.  Raises ValueError as `load` does."""
    diffusers, folder, _ = _found(path)
    config = _read(folder / "config.json")
    return Velocity(getattr(diffusers, config["_class_name"]).from_config(config)).to(dtype)


def _found(path):
    """diffusers, the folder of the transformer in `path`, and its Family."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("pretrained models need diffusers: pip install 'tinytwinflow[large]'") from None
    folder = Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)
    kind = _read(folder / "config.json").get("_class_name")
    family = family_of(kind, folder)
    for scheduler in (folder.parent / "scheduler", folder / "scheduler"):
        if (scheduler / "scheduler_config.json").is_file():
            _refuse_no_flow(scheduler / "scheduler_config.json")
    if not hasattr(diffusers, kind):
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} has no {kind}: install a newer one")
    return diffusers, folder, family


def load_extra(net, path):
    """Fill the extra embedders from a folder with weights or a safetensors file, names as the authors publish them.

    emb_twin, which they have not, stays as it is where the file has none. Raises ValueError if emb_r is not there
    or does not fit.
    """
    weights = _extra(Path(path), net.family)
    if not weights:
        raise ValueError(f"{path}: holds no weights {net.family.names()[0]}.*")
    _fill(net, weights, path)


def save_velocity(net, path):
    """Write a folder that diffusers reads as the plain model, and beside it `twinflow.safetensors`, emb_r and emb_twin.

    Raises ValueError if there is something at `path`.
    """
    from safetensors.torch import save as as_bytes

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} already exists: choose another folder")
    writing = path.with_name(path.name + ".tmp")
    net.model.save_pretrained(writing)
    extra = zip(net.family.names(), (net.r_embedder, net.twin_embedder))
    weights = {f"{name}.{key}": value for name, new in extra for key, value in new.state_dict().items()}
    with aside(writing / EXTRA) as file:
        file.write(as_bytes(weights))
    os.replace(writing, path)


def _extra(path, family):
    """What a folder or file holds of the extra embedders, by name."""
    from safetensors import safe_open

    index = path / (WEIGHTS_FILE + ".index.json")
    if path.is_file():
        files = [path]
    elif (path / EXTRA).is_file():
        files = [path / EXTRA]
    else:
        parts = _read(index)["weight_map"].values() if index.is_file() else [WEIGHTS_FILE]
        files = [path / name for name in sorted(set(parts)) if (path / name).is_file()]
    weights = {}
    for name in files:
        try:
            with safe_open(name, "pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(family.roots())}
        except Exception:  # whatever a damaged file makes the reader raise
            raise ValueError(f"{name}: no safetensors file, or a damaged one") from None
    return weights


def _fill(net, weights, path):
    """Put weights into the extra embedders; all must fit, and those of emb_r must be there."""
    new = dict(zip(net.family.names(), (net.r_embedder, net.twin_embedder)))
    if not any(key.startswith(net.family.names()[1]) for key in weights):
        del new[net.family.names()[1]]
    check_weights({f"{n}.{key}": value for n, m in new.items() for key, value in m.state_dict().items()}, weights, path)
    for name, module in new.items():
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})


def _refuse_no_flow(file):
    config = _read(file)
    kind, target = config.get("_class_name", "unnamed"), config.get("prediction_type")
    if not ("FlowMatch" in kind or target == "flow_prediction" or config.get("use_flow_sigmas")):
        raise ValueError(f"{file}: {kind} with prediction_type {target} is not of flow matching")


def _read(file):
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: not there or no JSON, so no diffusers model ({error})") from None
