"""A network that knows each condition twice: as it is, and shifted, c' = A c + b of the embedded label.

A second branch without negative time (APEX, arXiv 2604.12322): at the shifted condition the same network holds another
field.
"""

import torch
from torch import nn

from .times import check_labels


class Shift(nn.Module):
    """Embeds labels 0 ... n - 1 by e(c) and the labels c + n by A e(c) + b; a new one has A = 1 and b = 0.

    plain: e, an embedding of n labels.
    """

    def __init__(self, plain):
        super().__init__()
        self.plain, self.shift = plain, nn.Linear(plain.embedding_dim, plain.embedding_dim)
        nn.init.eye_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def forward(self, labels):
        n = self.plain.num_embeddings
        e = self.plain(labels % n)
        return torch.where((labels >= n)[:, None], self.shift(e), e)


class Shifted(nn.Module):
    """A velocity field that takes, beside its own conditions, {"cond": cond, "shift": (B,) of 0 and 1}.

    make: makes a network with `label`, an embedding, for so many classes. classes: those of the data; 0 for none, then
    all rows have one condition. Born, both branches are the same field. Raises ValueError for conditions that a network
    for so many classes does not take.
    """

    def __init__(self, make, classes=0):
        super().__init__()
        self.classes, n = classes, classes + 1  # with the one that stands for no class
        self.net = make(2 * n - 1)
        self.net.label = Shift(nn.Embedding.from_pretrained(self.net.label.weight[:n].clone(), freeze=False))

    @property
    def blocks(self):
        return self.net.blocks

    def forward(self, x, t, r, cond=None):
        shift = 0
        if isinstance(cond, dict):
            cond, shift = cond["cond"], cond["shift"]
        labels = check_labels(cond, len(x), self.classes)
        if labels is None:
            labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.net(x, t, r, labels + (self.classes + 1) * shift)
