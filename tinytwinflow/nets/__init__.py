"""Networks. They know nothing of any loss; a loss knows nothing of them."""

from .dit import DiT, dit, load_published
from .mlp import MLP
from .unet import UNet

__all__ = ["MLP", "DiT", "UNet", "dit", "load_published"]
