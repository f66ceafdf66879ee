"""The method: the equations of the paper, on any velocity field net(x, t, r, cond).

Rooms, in reading order: path, conditions, twin, distances, draws, bases, losses, samplers, reference, exact.
May import: ranges.
"""

from . import bases, conditions, distances, draws, exact, losses, path, reference, samplers, twin

__all__ = ["bases", "conditions", "distances", "draws", "exact", "losses", "path", "reference", "samplers", "twin"]
