"""What is dealt out to training steps."""

import functools

import torch

from ..method.draws import seeded


@functools.lru_cache(maxsize=2)
def _shuffled(n, seed, epoch):
    return torch.randperm(n, generator=seeded(seed, 0, epoch))


def rows_of_step(n, batch_size, step, seed):
    """Which of n rows make up the batch of a step: shuffled once an epoch, batches run on over its end."""
    index = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = index.div(n, rounding_mode="floor")
    return torch.cat([_shuffled(n, seed, epoch)[index[epochs == epoch] % n] for epoch in epochs.unique().tolist()])


def mine(rows, part):
    """The rows that fall to one process, part = (rank, size): an equal run of them.

    Raises ValueError if they do not divide.
    """
    rank, size = part
    if len(rows) % size:
        raise ValueError(f"batch_size {len(rows)} must be a multiple of the {size} processes")
    return rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]
