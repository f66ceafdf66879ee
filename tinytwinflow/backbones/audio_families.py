"""The families that make sound of prompts; latents are (C, T)."""

import inspect

import torch
from torch import nn

from .family import Configuration, Family, Pipeline


def _stable_audio(model, x, t, cond):
    # how long the sound is to be is one more word of the prompt besides
    duration, mask = cond["duration_embeds"], nn.functional.pad(cond["prompt_mask"].long(), (0, 1), value=1)
    text = torch.cat([cond["prompt_embeds"], duration[:, None]], dim=1)
    text = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "global_hidden_states": duration}
    return {"hidden_states": x, "timestep": t, **text}


def _duration(pipeline, n):
    """As long as the pipeline's sounds are, unless it is told."""
    seconds = inspect.signature(type(pipeline).__call__).parameters["duration"].default
    return {"duration_embeds": pipeline.encode_duration(seconds, pipeline.device, 1, n)}


SOUNDS = {
    "StableAudio3DiTModel": Family(
        "to_timestep_embed", "timestep_features", _stable_audio,
        {"prompt_embeds": ("L", "cond_token_dim"), "prompt_mask": ("L",), "duration_embeds": ("global_cond_dim",)},
        axes=lambda config: {"C": config["io_channels"], "T": config["patch_size"]},
        out=lambda config: config["io_channels"], unit=lambda config: 1.0,
        pipelines=(Pipeline("StableAudio3Pipeline", 256, ("prompt_embeds", "prompt_mask"),
                            {"num_waveforms_per_prompt": 1}, plain={"guidance_scale": 1.0}, more=_duration),),
        published={"stable-audio-3-medium": Configuration({}, (256, 108), 256)},
        small={"depth": 1, "embed_dim": 128, "num_heads": 2},
    ),
}  # fmt: skip
