"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: family, image_families, more_image_families, families, velocity, velocity_files, lora,
lora_files, states, prompts, captions, texts, scheduler, pipelines, painting.
May import: training, data, nets, method, files, ranges, bars.
"""

from . import (
    captions,
    families,
    family,
    image_families,
    lora,
    lora_files,
    more_image_families,
    painting,
    pipelines,
    prompts,
    states,
    texts,
    velocity,
    velocity_files,
)

__all__ = [
    "captions", "families", "family", "image_families", "lora", "lora_files", "more_image_families", "painting",
    "pipelines", "prompts", "states", "texts", "velocity", "velocity_files",
]  # fmt: skip
