"""Pipelines: an ordinary pipeline of diffusers whose transformer is shown the second time, so that one step is a jump.

    pipeline = diffusers.DiffusionPipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")
    ttf.attach(pipeline, "adapters")  # what `python -m tinytwinflow export RUN --out adapters` wrote, or the run itself
    pipeline("a cat", num_inference_steps=1, true_cfg_scale=1.0).images[0]

Adapters are put in by diffusers' own loader, the embedders of r and of the twin become parts of the transformer, and
so move, cast and offload with it. All else is the pipeline as it was.
"""

import os

from torch import nn

from ..files import fill
from .lora_files import AdapterFile, check_adapters, read_adapters
from .velocity import Velocity
from .velocity_files import holds_model, load_velocity

ADAPTER = "twinflow"  # what diffusers calls the adapters


def attach_weights(pipeline, source, mode="any", part="transformer"):
    """Show a pipeline's transformer the second time, and give it what was trained.  -> the pipeline

    source: a folder or file of adapters (see `lora_files`), the folder of a whole model (also as the authors publish
    them, then the pipeline may lack its own), an AdapterFile, or a Velocity; else as `tinytwinflow.attach`.
    """
    kind, model = type(pipeline).__name__, getattr(pipeline, part, None)
    whole = isinstance(source, Velocity) or isinstance(source, str | os.PathLike) and holds_model(source)
    if getattr(pipeline, "scheduler", None) is None or not (whole or isinstance(model, nn.Module)):
        raise ValueError(f"{kind} has no {part} with a scheduler: attach takes a pipeline of a flow transformer")
    if isinstance(model, nn.Module) and any(_is_feed(hook) for hook in model._forward_pre_hooks.values()):
        raise ValueError(f"the {part} of this {kind} is attached already: load the pipeline anew")
    from .scheduler import JumpScheduler

    scheduler = pipeline.scheduler
    if not isinstance(scheduler, JumpScheduler):
        scheduler = JumpScheduler(mode=mode)
    elif scheduler.config.mode != mode:
        raise ValueError(f"the pipeline's scheduler is of mode {scheduler.config.mode}, not {mode}")
    if whole:
        net = source if isinstance(source, Velocity) else load_velocity(source, pipeline.dtype, frozen=True)
        if isinstance(model, nn.Module) and type(net.model) is not type(model):
            raise ValueError(f"{kind} has a {type(model).__name__}, no {type(net.model).__name__}")
        net.to(pipeline.device, pipeline.dtype)
    else:
        net = _with_adapters(model, source if isinstance(source, AdapterFile) else read_adapters(source))
    net.requires_grad_(False).eval()
    _take_in(net)
    _Feed(net, scheduler)
    pipeline.register_modules(**{part: net.model, "scheduler": scheduler})
    return pipeline


def _with_adapters(model, file):
    """A pipeline's model with the adapters and embedders of an `AdapterFile`, as a Velocity."""
    check_adapters(model, file)
    net = Velocity(model)
    net.r_embedder.float(), net.twin_embedder.float()  # what learns is kept in float32
    learnt = tuple(f"{name}." for name in file.about["also"])
    own = {name: value for name, value in net.state_dict().items() if name.startswith(learnt)}
    fill(own, file.whole, file.path)
    model.load_lora_adapter(file.tensors, metadata=file.lora, adapter_name=ADAPTER)
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


def _is_feed(hook):
    return isinstance(getattr(hook, "__self__", None), _Feed)


class _Feed:
    """Hooks on a model: for as long as a call lasts, its embedders are shown the times of the step that is due."""

    def __init__(self, net, scheduler):
        self.net, self.scheduler = net, scheduler
        # bound methods: in a deep copy of a pipeline the hooks are those of the copy
        net.model.register_forward_pre_hook(self.begin)
        net.model.register_forward_hook(self.end, always_call=True)

    def begin(self, model, args):
        self.net.now = self.scheduler.interval()

    def end(self, model, args, output):
        self.net.now = None
