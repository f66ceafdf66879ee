"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: family, image_families, families, velocity, quantised, velocity_files, lora, lora_files,
states, prompts, captions, painting.
May import: training, data, nets, method, files, ranges, bars.
"""

from . import (
    captions,
    families,
    family,
    image_families,
    lora,
    lora_files,
    painting,
    prompts,
    quantised,
    states,
    velocity,
    velocity_files,
)

__all__ = [
    "captions", "families", "family", "image_families", "lora", "lora_files", "painting", "prompts", "quantised",
    "states", "velocity", "velocity_files",
]  # fmt: skip
