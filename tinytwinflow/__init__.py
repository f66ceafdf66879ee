"""tinytwinflow: one-step generation with one network (TwinFlow, arXiv 2512.05150), small enough to read.

    import tinytwinflow as ttf

    model = ttf.fit(x)                      # the front door: an array, a DataLoader, a file, a folder, a set's name
    model.sample(1000)                      # in the units of x

    net = ttf.nets.MLP(dim=2)               # the workshop behind it
    loss = ttf.TwinFlowLoss()
    out = loss(net, x)                      # out.total.backward()
    x = ttf.sample(net, z, steps=1)

Each folder is one subject, the method first, and its `__init__` is the sign at its door: what it is for, its rooms in
reading order, what it may import. `files`, `ranges` and `bars`, files that a crash cannot spoil, what a setting may be
and how far something is, lie below them all.
"""

from . import backbones, bars, benchmarks, data, evaluation, files, method, nets, peers, ranges, runs, training
from .method.draws import Draws
from .method.exact import GaussianMixture, Twins
from .method.losses import Losses, TwinFlowLoss
from .method.samplers import sample, time_grid
from .method.twin import gap, generate, twin_velocities
from .model import Model, fit, load
from .runs.folder import attach

__version__ = "0.1.0"
__all__ = [
    "Draws", "GaussianMixture", "Losses", "Model", "TwinFlowLoss", "Twins",
    "attach", "fit", "gap", "generate", "load", "sample", "time_grid", "twin_velocities",
    "backbones", "bars", "benchmarks", "data", "evaluation", "files", "method", "nets", "peers", "ranges", "runs",
    "training",
]  # fmt: skip
