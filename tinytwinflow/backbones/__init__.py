"""Backbones: the flow transformers of diffusers.

Rooms, in reading order: families, velocity, lora, lora_files, states, prompts, captions.
May import: training, data, nets, method, files, ranges.
"""

from . import captions, families, lora, lora_files, prompts, states, velocity

__all__ = ["captions", "families", "lora", "lora_files", "prompts", "states", "velocity"]
