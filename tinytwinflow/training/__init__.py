"""Training: the loop, its state and its checkpoints, on one process or many.

Rooms, in reading order: ema, loop, in_backward, distributed, sharded.
May import: method, files.
"""

from . import distributed, ema, in_backward, loop, sharded

__all__ = ["distributed", "ema", "in_backward", "loop", "sharded"]
