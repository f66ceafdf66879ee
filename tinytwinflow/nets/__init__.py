"""Networks. They know nothing of any loss; a loss knows nothing of them."""

from .mlp import MLP

__all__ = ["MLP"]
