"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: family, image_families, more_image_families, video_families, audio_families, families,
quantised, velocity, velocity_files, lora, lora_files, first_adapters, states, prompts, captions, texts, scheduler,
pipelines, painting.
May import: training, data, nets, method, files, ranges, bars.
"""

from . import (
    audio_families,
    captions,
    families,
    family,
    first_adapters,
    image_families,
    lora,
    lora_files,
    more_image_families,
    painting,
    pipelines,
    prompts,
    quantised,
    states,
    texts,
    velocity,
    velocity_files,
    video_families,
)

__all__ = [
    "audio_families", "captions", "families", "family", "first_adapters", "image_families", "lora", "lora_files",
    "more_image_families", "painting", "pipelines", "prompts", "quantised", "states", "texts", "velocity",
    "velocity_files", "video_families",
]  # fmt: skip
