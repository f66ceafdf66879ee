"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: family, image_families, more_image_families, video_families, audio_families, families,
velocity, velocity_files, lora, lora_files, states, prompts, captions, texts, scheduler, pipelines, painting.
May import: training, data, nets, method, files, ranges, bars.
"""

from . import (
    audio_families,
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
    video_families,
)

__all__ = [
    "audio_families", "captions", "families", "family", "image_families", "lora", "lora_files", "more_image_families",
    "painting", "pipelines", "prompts", "states", "texts", "velocity", "velocity_files", "video_families",
]  # fmt: skip
