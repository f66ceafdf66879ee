"""What a training step and a sample of a large backbone really cost on this machine, its weights random."""

from functools import partial

import torch

from . import large
from .bench import peak_memory, seconds
from .calls import BACKBONES, condition, structure
from .parts import normal
from .recipes import loss_of, settings
from .samplers import sample
from .scale import prepare
from .train import WEIGHTS, train

CHANGES = {  # of recipe text; see plan.TRAININGS
    "adapters": (),
    "in backward": ("lora_rank=0", "optimizer=adafactor"),
    "float32": ("lora_rank=0", "weights=float32", "precision=bf16"),
}
SMALL = {"num_layers": 1, "num_attention_heads": 2}  # on a CPU


def with_random_weights(net, dtype, device):
    """Give a network without weights some: matrices of small numbers, vectors of ones."""
    net._apply(lambda p: torch.empty(p.shape, dtype=dtype, device=device) if p.is_meta else p.to(device))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return net


def bench(name, training="adapters", batch_size=1, device="cpu"):
    """Train a backbone of its real configuration for some steps, sample from it, and print what it takes.

    On a CPU one layer of two heads stands for it, on latents of 16 x 16. -> dict of the figures. Raises ValueError for
    an unknown backbone or training.
    """
    if training not in CHANGES:
        raise ValueError(f"training must be one of {', '.join(CHANGES)}, got {training!r}")
    config, on_gpu = {"seed": 0, **settings("text", CHANGES[training])}, torch.device(device).type == "cuda"
    net = structure(name, **({} if on_gpu else small(name)))
    channels, height, width = BACKBONES[name][2]
    shape = (channels, height, width) if on_gpu else (channels, 16, 16)
    net = with_random_weights(net, WEIGHTS[config["weights"]], device)
    if config["lora_rank"]:
        large.adapt(net, config["lora_rank"])
    state = large.state_of(net, config, partial(prepare, recompute=True))
    tokens, draw = BACKBONES[name][3], torch.Generator(device).manual_seed(0)
    cond = condition(net, batch_size, tokens, torch.ones, device)
    x = normal(torch.empty(batch_size, *shape, device=device), draw)
    null = {key: value[:1] for key, value in cond.items()}
    options = {key: config[key] for key in ("ema", "teacher_ema", "precision")}
    records = train(state, loss_of(config), lambda step: (x, cond), 10**6, null=null, **options)
    next(records)
    steps = 8 if on_gpu else 2
    times = [seconds(partial(next, records), device) for _ in range(steps)]
    memory = peak_memory(lambda: [next(records) for _ in range(steps)], device)
    sampling = {}
    for calls in (1, 2, 100):
        sampling[calls] = seconds(partial(sample, state.average, x, calls, cond=cond), device)
    what = name if on_gpu else f"one layer of two heads (on a CPU in place of {name})"
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{what}, {training}: {count / 1e6:,.1f} M parameters learn, latents {' x '.join(map(str, shape))}, ", end="")
    print(f"batch {batch_size}, {device}, torch {torch.__version__}")
    print(f"training step: mean {sum(times) / steps:.3f} s of {steps}, longest {max(times):.3f} s, ", end="")
    print(f"peak memory {memory / 2**30:.1f} GiB{'' if on_gpu else ' of the whole process'}")
    print("sampling: " + ", ".join(f"{calls} NFE {value:.3f} s" for calls, value in sampling.items()))
    return {"step": times, "memory": memory, "sampling": sampling, "parameters": count}


def small(name):
    """Settings that make a backbone small without changing its kind."""
    more = {
        "QwenImageTransformer2DModel": {},
        "FluxTransformer2DModel": {"num_single_layers": 1},
        "SD3Transformer2DModel": {"caption_projection_dim": 128},
        "SanaTransformer2DModel": {"num_cross_attention_heads": 1, "cross_attention_head_dim": 64,
                                   "cross_attention_dim": 64},
    }  # fmt: skip
    return {**SMALL, **more[BACKBONES[name][0]]}
