"""A network that answers with the clean sample, as a velocity field.

What it has to know is then the data themselves, which lie on far fewer directions than noise does (arXiv 2601.22158);
any loss and any sampler takes the field.
"""

import torch
from torch import nn

from ..method.path import expand


class PredictsData(nn.Module):
    """F(x_t, t, r) = (x_t - X(x_t, t, r)) / max(|t|, floor), X the answer of a network.

    So X(x_t, t, t) is x^ = x_t - t v of App. C.1, and X(z, 1, 0) the one-step sample. Below the floor, where an error
    of X would be multiplied without bound, F is the shorter by |t| / floor.
    """

    def __init__(self, net, floor=0.05):
        super().__init__()
        self.net, self.floor, self.classes = net, floor, getattr(net, "classes", 0)

    @property
    def blocks(self):
        return self.net.blocks

    def forward(self, x, t, r, cond=None):
        return (x - self.net(x, t, r, cond)) / torch.clamp(expand(t, x).abs(), min=self.floor)
