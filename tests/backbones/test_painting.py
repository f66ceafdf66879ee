"""Painting against the pipelines: in mode multi the same noise becomes the very picture that diffusers makes of it.

So all that lies between words and pixels agrees with the family's own code: which layer of which text encoder, what
counts of it, the order of the conditions, the packing, the sign of the velocity, the units of the latents.
"""

import pytest
import torch
from test_prompts import BACKBONES, FLUX, QWEN, SANA, SD3, TOKENS, Z_IMAGE, kinds, parts_of

from tinytwinflow.backbones.painting import paint
from tinytwinflow.backbones.prompts import decode_latents, encode_text, load_pipeline
from tinytwinflow.backbones.velocity_files import load_velocity
from tinytwinflow.data.points import seeded

diffusers = pytest.importorskip("diffusers")
HEADS = dict(attention_head_dim=16, num_attention_heads=1)
BLOCKS = {
    SD3: dict(
        **HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=40,
        caption_projection_dim=16, pooled_projection_dim=16, sample_size=16, pos_embed_max_size=8,
    ),
    SANA: dict(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, caption_channels=16, sample_size=16,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
    ),
    FLUX: dict(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    QWEN: dict(
        **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    ),
    Z_IMAGE: dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    ),
}  # fmt: skip
NO_GUIDANCE = {  # that of Flux is a condition of the network, and stays
    SD3: {"guidance_scale": 1.0},
    SANA: {"guidance_scale": 1.0, "use_resolution_binning": False},
    FLUX: {},
    QWEN: {"true_cfg_scale": 1.0},
    Z_IMAGE: {"guidance_scale": 0.0},
}


def pipeline_of(kind, folder):
    """A whole tiny pipeline with random weights, whose scheduler takes Euler's steps."""
    torch.manual_seed(0)
    parts, _ = parts_of(kind, folder / "tokenizer")
    model = getattr(diffusers, BACKBONES[kind]).from_config(BLOCKS[kind])
    for part in (model, *parts.values()):
        for name, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
            if p.ndim > 1 and "embed_tokens" not in name:
                torch.nn.init.normal_(p, std=0.25)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, kind)(**{**parts, "transformer": model, "scheduler": euler})


@kinds
def test_a_painted_picture_is_the_pipelines_own(kind, tmp_path):
    pipeline, prompts, shape = pipeline_of(kind, tmp_path), ["two black dogs", "the sea"], (4, 16, 16)
    pipeline.save_pretrained(tmp_path / kind)
    net, own = load_velocity(tmp_path / kind), load_pipeline(tmp_path / kind, dtype=torch.float32)
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter)  # in mode multi r = t, where it must not matter
    cond = encode_text(own, prompts, TOKENS[kind])
    pictures = decode_latents(paint(net, cond, [(0, 3), (5, 1)], shape, steps=2, mode="multi", seed=7), own)
    wanted = []
    for prompt, key in zip(prompts, [(0, 3), (5, 1)]):
        z = torch.randn(1, *shape, generator=seeded(7, 4, *key))
        if kind in (FLUX, QWEN):
            z = pipeline._pack_latents(z, 1, *shape)
        size = {name: 16 * pipeline.vae_scale_factor for name in ("height", "width")}
        steps = {"sigmas": [1.0, 0.5], "num_inference_steps": 2, "max_sequence_length": TOKENS[kind]}
        wanted.append(pipeline(prompt, latents=z, output_type="pt", **size, **steps, **NO_GUIDANCE[kind]).images)
    wanted = torch.cat(wanted)
    torch.testing.assert_close(((pictures + 1) / 2).clamp(0, 1), wanted, atol=2e-5, rtol=0)
    first, second = decode_latents(paint(net, cond, [(0, 3), (0, 3)], shape, 2, "multi", 7), own)
    assert wanted.std() > 0.05 and (first - second).abs().max() > 2e-3, "the prompt matters, 100 times the tolerance"
