"""Data: what is dealt out to training steps.

Rooms, in reading order: batches, toys, points, latents, images.
May import: method, files.
"""

from . import batches, images, latents, points, toys

__all__ = ["batches", "images", "latents", "points", "toys"]
