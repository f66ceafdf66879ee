"""Pipelines: an ordinary pipeline of diffusers whose transformer is shown the second time, so that one step is a jump.

    pipeline = diffusers.DiffusionPipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")
    ttf.attach(pipeline, "adapters")  # what `python -m tinytwinflow export RUN --out adapters` wrote, or the run itself
    pipeline("a cat", num_inference_steps=1, true_cfg_scale=1.0).images[0]

Adapters are put in by diffusers' own loader, the embedders of r and of the twin become parts of the transformer, and
so move, cast and offload with it. All else is the pipeline as it was.
"""

import os

import torch
from torch import nn

from ..files import fill
from .families import family_of
from .lora_files import AdapterFile, check_adapters, read_adapters
from .velocity import Velocity
from .velocity_files import cast_as_loaded, holds_model, load_velocity

ADAPTER = "twinflow"  # what diffusers calls the adapters


def attach_weights(pipeline, source, mode="any", part="transformer"):
    """Show a pipeline's transformer the second time, and give it what was trained.  -> the pipeline

    source: a folder or file of adapters (see `lora_files`), the folder of a whole model (also as the authors publish
    them, then the pipeline may lack its own), an AdapterFile, or a Velocity, which becomes the pipeline's own: frozen,
    in its precision, on its device. Else as `tinytwinflow.attach`.
    """
    if not isinstance(source, Velocity | AdapterFile | str | os.PathLike):
        raise ValueError(f"attach takes a run, adapters or the folder of a model, got {type(source).__name__}")
    kind, model = type(pipeline).__name__, getattr(pipeline, part, None)
    whole = isinstance(source, Velocity) or isinstance(source, str | os.PathLike) and holds_model(source)
    if getattr(pipeline, "scheduler", None) is None or not (whole or isinstance(model, nn.Module)):
        raise ValueError(f"{kind} has no {part} with a scheduler: attach takes a pipeline of a flow transformer")
    if isinstance(model, nn.Module):
        _check_free(model, f"the {part} of this {kind}")
    from .scheduler import JumpScheduler

    scheduler = pipeline.scheduler
    if not isinstance(scheduler, JumpScheduler):
        scheduler = JumpScheduler(mode=mode)
    elif scheduler.config.mode != mode:
        raise ValueError(f"the pipeline's scheduler is of mode {scheduler.config.mode}, not {mode}")
    if whole:
        dtype = getattr(model, "dtype", None) or pipeline.dtype
        net = source if isinstance(source, Velocity) else load_velocity(source, dtype, frozen=True)
        if isinstance(model, nn.Module) and type(net.model) is not type(model):
            raise ValueError(f"{kind} has a {type(model).__name__}, no {type(net.model).__name__}")
        if isinstance(source, Velocity):
            cast_as_loaded(net.model, dtype)
        net.to(pipeline.device)
    else:
        net = _with_adapters(model, source if isinstance(source, AdapterFile) else read_adapters(source))
    net.requires_grad_(False).eval()
    _take_in(net)
    _Feed(net, scheduler, adapted=not whole)
    pipeline.register_modules(**{part: net.model, "scheduler": scheduler})
    return pipeline


def _check_free(model, what):
    """Raise ValueError if a model is of no known family, attached already, or offloaded, which must come after."""
    family_of(type(model).__name__, what)
    if any(isinstance(getattr(hook, "__self__", None), _Feed) for hook in model._forward_pre_hooks.values()):
        raise ValueError(f"{what} is attached already: load the pipeline anew")
    hooks = [
        name for module in model.modules() for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
    ]
    if any("group_offload" in name for name in hooks) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(f"{what} is offloaded: load the pipeline anew, attach, and switch offloading on after that")


def _with_adapters(model, file):
    """A pipeline's model with the adapters and embedders of an `AdapterFile`, as a Velocity; other adapters stay on."""
    check_adapters(model, file)
    if not hasattr(model, "load_lora_adapter"):
        raise ValueError(f"diffusers puts no adapters on a {type(model).__name__}: attach a whole model to it")
    others = model.active_adapters() if getattr(model, "peft_config", None) else []
    net = Velocity(model)
    try:
        net.r_embedder.float(), net.twin_embedder.float()  # what learns is kept in float32
        learnt = tuple(f"{name}." for name in file.about["also"])
        own = {name: value for name, value in net.state_dict().items() if name.startswith(learnt)}
        fill(own, file.whole, file.path)
        model.load_lora_adapter(file.tensors, metadata=file.lora, adapter_name=ADAPTER)
        if others:
            model.set_adapters([*others, ADAPTER])
    except BaseException:
        net.let_go()
        raise
    return net


def _take_in(net):
    """Make the embedders parts of the model, under the names that they have in files."""
    for path, embedder in zip(net.family.names(), (net.r_embedder, net.twin_embedder)):
        place, (*rooms, last) = net.model, path.split(".")
        for room in rooms:
            if not hasattr(place, room):
                place.add_module(room, nn.Module())
            place = getattr(place, room)
        place.add_module(last, embedder)


class _Feed:
    """Hooks on a model: for as long as a call lasts, its embedders are shown the times of the step that is due."""

    def __init__(self, net, scheduler, adapted):
        self.net, self.scheduler, self.adapted = net, scheduler, adapted
        # bound methods: in a deep copy of a pipeline the hooks are those of the copy
        net.model.register_forward_pre_hook(self.begin, with_kwargs=True)
        net.model.register_forward_hook(self.end, always_call=True)

    def begin(self, model, args, kwargs):
        if self.adapted and ADAPTER not in getattr(model, "peft_config", {}):
            raise ValueError(f"the adapters {ADAPTER!r} of this pipeline were unloaded: load it anew")
        times = kwargs.get("timestep")
        if torch.is_tensor(times) and times.ndim > 1 and times.min() != times.max():
            raise ValueError("this pipeline shows its model several times at once, as for a first frame that is given")
        self.net.now = self.scheduler.interval()

    def end(self, model, args, output):
        self.net.now = None
