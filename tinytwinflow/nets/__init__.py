"""Nets: networks that are velocity fields. They know nothing of any loss; a loss knows nothing of them.

Rooms, in reading order: times, mlp, dit, unet.
May import: method, files, ranges.
"""

from .dit import DiT, dit, load_published
from .mlp import MLP
from .unet import UNet

__all__ = ["MLP", "DiT", "UNet", "dit", "load_published"]
