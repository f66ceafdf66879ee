"""Nets: networks that are velocity fields. They know nothing of any loss; a loss knows nothing of them.

The contract of a network: a callable net(x, t, r, cond=None) that returns the average velocity from t to r in the
shape of x. x (B, *D) float; t, r (B,) in [-1, 1], negative for the twin; cond None, a tensor or a dict of tensors of B
rows; labels are 0 ... classes, the last of which says "no class". No base class, no registry. To be trained it is an
nn.Module. A list `blocks` of the layers that repeat, modules that are called, if it has one, lets them be recomputed,
sharded and compiled one at a time. One of your own, which `fit(x, net=Own())` takes:

>>> class Own(torch.nn.Module):
...     def __init__(self, dim=2):
...         super().__init__()
...         self.f = torch.nn.Sequential(torch.nn.Linear(dim + 3, 64), torch.nn.SiLU(), torch.nn.Linear(64, dim))
...     def forward(self, x, t, r, cond=None):
...         times = torch.stack([t.abs(), t - r, torch.signbit(t).float()], dim=1)
...         return self.f(torch.cat([x, times], dim=1))

Rooms, in reading order: times, mlp, dit, unet, predicts_data, shifted.
May import: method, files, ranges.
"""

from .dit import DiT, dit, load_published
from .mlp import MLP
from .predicts_data import PredictsData
from .shifted import Shifted
from .unet import UNet

__all__ = ["MLP", "DiT", "PredictsData", "Shifted", "UNet", "dit", "load_published"]
