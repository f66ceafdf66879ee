"""The optimisers: AdamW for all weights, or Muon for the inner matrices and AdamW for the rest."""

import torch
from torch import nn


def inner_matrices(net):
    """The names of the weight matrices inside a network's repeated layers, those that Muon is for.

    They lie in a list of modules (`nn.ModuleList`), as the blocks of a transformer and the layers of an MLP do. Where
    the entries of a list are single layers the first reads the inputs, which are no hidden units, and is left out.
    """
    names = set()
    for name, part in net.named_modules():
        if isinstance(part, nn.ModuleList):
            inner = list(part.named_children())
            for number, layer in inner[1:] if inner and isinstance(inner[0][1], nn.Linear) else inner:
                names |= {f"{name}.{number}.{key}".lstrip(".") for key, p in layer.named_parameters() if p.ndim == 2}
    return names


def adamw(groups, lr, betas=(0.9, 0.99)):
    """AdamW without weight decay (Table 6), for lists of weights, all of them in a few kernels."""
    device = next(p.device for group in groups for p in group)
    how = {"fused": True} if device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW([{"params": group} for group in groups], lr=lr, betas=betas, weight_decay=0.0, **how)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for all other weights, as one optimiser with two kinds of groups.

    Muon (torch.optim.Muon) makes the step of a matrix nearly orthogonal, so that all directions move alike; its length
    is that of an AdamW step of the same rate ("match_rms_adamw"), yet it bears a rate several times as high.
    """

    def __init__(self, matrices, others, lr, muon_lr, betas=(0.9, 0.99)):
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts = (*([adamw([others], lr, betas)] if others else []), muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure=None):
        for part, group in zip(self.parts, self.param_groups):
            part.param_groups, part.state = [group], self.state
            part.step()


def optimizer_of(networks, lr, muon_lr=None, betas=(0.9, 0.99)):
    """The optimiser of what learns in some networks: AdamW, or with a muon_lr Muon for their inner matrices.

    Where no network has such matrices it is AdamW. Each group notes its highest rate as "initial_lr"; AdamW's is first.
    Raises ValueError if nothing learns.
    """
    learns = [[(name, p) for name, p in net.named_parameters() if p.requires_grad] for net in networks]
    if not any(learns):
        raise ValueError("no weight of the network learns: requires_grad is False on all")
    inner = [set() if muon_lr is None else inner_matrices(net) for net in networks]
    matrices = [p for names, some in zip(inner, learns) for name, p in some if name in names]
    if matrices:
        others = [p for names, some in zip(inner, learns) for name, p in some if name not in names]
        optimizer = MuonAdamW(matrices, others, lr, muon_lr, betas)
    else:
        optimizer = adamw([[p for _, p in some] for some in learns], lr, betas)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
