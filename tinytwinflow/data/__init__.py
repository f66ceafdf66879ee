"""Data: what is dealt out to training steps.

Rooms, in reading order: batches, toys, points, readers, shards, latents, images.
May import: method, files.
"""

from . import batches, images, latents, points, readers, shards, toys
from .images import Images
from .points import Points

__all__ = ["Images", "Points", "batches", "images", "latents", "points", "readers", "shards", "toys"]
