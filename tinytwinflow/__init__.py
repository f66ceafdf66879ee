"""tinytwinflow: one-step generation with one network (TwinFlow, arXiv 2512.05150), small enough to read.

    import tinytwinflow as ttf

    net = ttf.nets.MLP(dim=2)
    loss = ttf.TwinFlowLoss(order=2, share=1 / 3)
    out = loss(net, x)                          # out.total.backward()
    x = ttf.sample(net, z, steps=1)

The rooms, in reading order; each imports only those before it: path, exact, twin, parts, distance, losses, samplers,
reference, files, nets, peers, ema, toys, data, latents, images, metrics, features, pictures, tables, train, config,
recipes, scale; for backbones families, pretrained, lora, lora_files, lean, large, prompts, texts; from settings to
results sharded, build, folder, runs, evaluate; for costs bench, memory, calls, plan, compare, bench_large; and the
command line, arguments.
"""

from . import (
    data,
    ema,
    exact,
    families,
    features,
    files,
    images,
    large,
    latents,
    lean,
    lora,
    losses,
    metrics,
    nets,
    parts,
    path,
    peers,
    pretrained,
    reference,
    samplers,
    scale,
    sharded,
    toys,
    train,
    twin,
)
from .exact import GaussianMixture, Twins
from .losses import Losses, TwinFlowLoss
from .parts import Draws
from .samplers import sample, time_grid
from .twin import gap, generate, twin_velocities

__version__ = "0.1.0"
__all__ = [
    "Draws", "GaussianMixture", "Losses", "TwinFlowLoss", "Twins",
    "gap", "generate", "sample", "time_grid", "twin_velocities",
    "data", "ema", "exact", "families", "features", "files", "images", "large", "latents", "lean", "lora", "losses",
    "metrics", "nets", "parts", "path", "peers", "pretrained", "reference", "samplers", "scale", "sharded", "toys",
    "train", "twin",
]  # fmt: skip
