"""The method: the equations of the paper, on any velocity field net(x, t, r, cond).

Rooms, in reading order: path, conditions, twin, draws, losses, samplers, reference, exact.
May import: ranges.
"""

from . import conditions, draws, exact, losses, path, reference, samplers, twin

__all__ = ["conditions", "draws", "exact", "losses", "path", "reference", "samplers", "twin"]
