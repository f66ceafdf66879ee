"""The twin on another base than the any-step one: any loss of the contract in `peers` that needs no helpers."""

from dataclasses import replace

import torch

from .conditions import take
from .draws import shuffled, split


def on_base(loss, net, x, cond, progress, **more):
    """The twin's parts on their share of the rows, the loss's base on the others.  -> the five numbers of `Losses`

    loss: a `TwinFlowLoss` with a base; more: teacher, null, generator and turns, as it is called with.
    """
    (n, _), divisors = split(len(x), (1 - loss.share, loss.share), more["turns"] or more["generator"])
    x, cond = shuffled(x, cond, more["generator"])
    base = adversarial = rectify = gap_size = torch.zeros((), device=x.device)
    if n:
        base = n / divisors[0] * loss.base(net, x[:n], cond=take(cond, slice(n)), progress=progress, **more).total
    total = base
    if n < len(x):
        twin = replace(loss, base=None, share=1.0)(net, x[n:], take(cond, slice(n, None)), **more)
        weight = (len(x) - n) / divisors[1]
        total = base + weight * twin.total
        adversarial, rectify, gap_size = weight * twin.adversarial, weight * twin.rectify, weight * twin.gap
    return total, base.detach(), adversarial, rectify, gap_size
