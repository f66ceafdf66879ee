"""Training: the loop, what it knows and how that is kept, on one process or many.

Rooms, in reading order: ema, optimizers, state, loop, in_backward, distributed, sharded, checkpoints.
May import: method, files, ranges.
"""

from . import checkpoints, distributed, ema, in_backward, loop, optimizers, sharded, state
from .loop import train
from .state import State, new_state

__all__ = [
    "State", "new_state", "train",
    "checkpoints", "distributed", "ema", "in_backward", "loop", "optimizers", "sharded", "state",
]  # fmt: skip
