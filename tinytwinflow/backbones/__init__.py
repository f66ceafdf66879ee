"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: family, image_families, families, velocity, quantised, velocity_files, lora, lora_files,
first_adapters, states, prompts, captions, painting.
May import: training, data, nets, method, files, ranges, bars.
"""

from . import (
    captions,
    families,
    family,
    first_adapters,
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
    "captions", "families", "family", "first_adapters", "image_families", "lora", "lora_files", "painting", "prompts",
    "quantised", "states", "velocity", "velocity_files",
]  # fmt: skip
