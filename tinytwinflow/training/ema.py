"""The moving average of a network's weights: the teacher F^- in training, the model that samples."""

import copy

import torch


def average_of(net):
    """A frozen copy of a network, to be moved by `update`; in evaluation mode, so that no call of it changes it."""
    return copy.deepcopy(net).requires_grad_(False).eval()


@torch.no_grad()
def update(average, net, decay):
    """Move the average towards the network: average <- decay * average + (1 - decay) * net.

    decay in [0, 1). Buffers are copied. Raises ValueError for another decay.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), net.buffers()):
        a.copy_(b)


def warmed_up(decay, step):
    """The decay to use at a step: it grows to `decay`, so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))
