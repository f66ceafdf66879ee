"""tinytwinflow: one-step generation with one network (TwinFlow, arXiv 2512.05150), small enough to read.

import tinytwinflow as ttf

net = ttf.nets.MLP(dim=2)
loss = ttf.TwinFlowLoss(order=2, share=1 / 3)
out = loss(net, x)                          # out.total.backward()
x = ttf.sample(net, z, steps=1)
"""

from . import backbones, benchmarks, data, evaluation, files, method, nets, peers, runs, training
from .method.draws import Draws
from .method.exact import GaussianMixture, Twins
from .method.losses import Losses, TwinFlowLoss
from .method.samplers import sample, time_grid
from .method.twin import gap, generate, twin_velocities

__version__ = "0.1.0"
__all__ = [
    "Draws", "GaussianMixture", "Losses", "TwinFlowLoss", "Twins",
    "gap", "generate", "sample", "time_grid", "twin_velocities",
    "backbones", "benchmarks", "data", "evaluation", "files", "method", "nets", "peers", "runs", "training",
]  # fmt: skip
