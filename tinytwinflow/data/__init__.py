"""Data: what is dealt out to training steps.

Rooms, in reading order: batches, toys, given, points, readers, clipart, shards, latents, images.
May import: method, files, ranges, bars.
"""

from . import batches, given, images, latents, points, readers, shards, toys
from .images import Images
from .points import Points

__all__ = ["Images", "Points", "batches", "given", "images", "latents", "points", "readers", "shards", "toys"]
