"""The method: the equations of the paper, on any velocity field net(x, t, r, cond).

Rooms, in reading order: path, conditions, twin, distances, draws, losses, samplers, reference, exact.
May import: ranges.
"""

from . import conditions, distances, draws, exact, losses, path, reference, samplers, twin

__all__ = ["conditions", "distances", "draws", "exact", "losses", "path", "reference", "samplers", "twin"]
