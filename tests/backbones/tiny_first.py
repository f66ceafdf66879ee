"""The first five families, tiny, and how their pipelines call them: the oracles of test_velocity."""

import inspect
import math

import diffusers
import pytest
import torch

SD3, SANA, FLUX, QWEN, Z_IMAGE = (
    f"{name}Transformer2DModel" for name in ("SD3", "Sana", "Flux", "QwenImage", "ZImage")
)
TINY = {
    SD3: dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ),
    SANA: dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, caption_channels=12,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
        timestep_scale=0.5,
    ),
    FLUX: dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    QWEN: dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ),
    Z_IMAGE: dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    ),
}  # fmt: skip
LATENTS = dict.fromkeys(TINY, (4, 8, 6))
PUBLISHED = {  # how the names of the second embedder begin in the authors' files
    SD3: "time_text_embed_2.timestep_embedder.linear_",
    SANA: "time_embed_2.emb.timestep_embedder.linear_",
    FLUX: "time_text_embed_2.timestep_embedder.linear_",
    QWEN: "time_text_embed_2.timestep_embedder.linear_",
    Z_IMAGE: "t_embedder_2.mlp.",
}


def sinusoids(time, dim=256):
    """dim / 2 cosines, then as many sines, of frequencies 10000^(-2 k / dim)."""
    half = dim // 2
    angle = time[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# what the MLP is shown of the time |t|, and what emb_r is shown; times, where the MLP makes sinusoids of them
FIRST = {
    SD3: lambda t: sinusoids(1000 * t),
    SANA: lambda t: sinusoids(500 * t),
    FLUX: lambda t: sinusoids(1000 * t),
    QWEN: lambda t: sinusoids(1000 * t),
    Z_IMAGE: lambda t: 1000 * (1 - t),
}
SECOND = {
    SD3: lambda t, r: sinusoids(1000 * r),
    SANA: lambda t, r: sinusoids(500 * r),
    FLUX: lambda t, r: sinusoids(1000 * r),
    QWEN: lambda t, r: sinusoids(1000 * r),
    Z_IMAGE: lambda t, r: 1000 * (t - r),
}


def prompt(width):
    """Five words, and three in the first row, whose mask says so."""

    def make(config, n, draw):
        mask = torch.ones(n, 5, dtype=torch.long)
        mask[0, 3:] = 0
        return {"prompt_embeds": torch.randn(n, 5, config[width], generator=draw), "prompt_mask": mask}

    return make


def pooled(config, n, draw):
    words = {"prompt_embeds": torch.randn(n, 5, config["joint_attention_dim"], generator=draw)}
    return {**words, "pooled": torch.randn(n, config["pooled_projection_dim"], generator=draw)}


def guided(config, n, draw):
    return {**pooled(config, n, draw), "guidance": 1 + 4 * torch.rand(n, generator=draw)}


COND = {
    SD3: pooled,
    SANA: prompt("caption_channels"),
    FLUX: guided,
    QWEN: prompt("joint_attention_dim"),
    Z_IMAGE: prompt("cap_feat_dim"),
}


def _sd3(model, x, t, c):
    text = {"encoder_hidden_states": c["prompt_embeds"], "pooled_projections": c["pooled"]}
    return model(hidden_states=x, timestep=1000 * t, return_dict=False, **text)[0]


def _sana(model, x, t, c):
    text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_mask"]}
    return model(x, timestep=1000 * t * model.config.timestep_scale, return_dict=False, **text)[0]


def _flux(model, x, t, c):
    pipeline, (n, channels, height, width) = diffusers.FluxPipeline, x.shape
    y = model(
        hidden_states=pipeline._pack_latents(x, n, channels, height, width), timestep=t, guidance=c.get("guidance"),
        pooled_projections=c["pooled"], encoder_hidden_states=c["prompt_embeds"],
        txt_ids=torch.zeros(c["prompt_embeds"].shape[1], 3), return_dict=False,
        img_ids=pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32),
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y, 8 * height, 8 * width, 8)


def _qwen(model, x, t, c):
    if "max_txt_seq_len" not in inspect.signature(model.pos_embed.forward).parameters:
        pytest.skip("pipelines of this diffusers have a bug: they leave the mask out")
    pipeline, (n, channels, height, width) = diffusers.QwenImagePipeline, x.shape
    y = model(
        hidden_states=pipeline._pack_latents(x, n, channels, height, width), timestep=t, return_dict=False,
        encoder_hidden_states_mask=c["prompt_mask"], encoder_hidden_states=c["prompt_embeds"],
        img_shapes=[[(1, height // 2, width // 2)]] * n,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y, 8 * height, 8 * width, 8)[:, :, 0]


def _z_image(model, x, t, c):
    texts = [prompt[: mask.sum()] for prompt, mask in zip(c["prompt_embeds"], c["prompt_mask"])]
    y = model(list(x.unsqueeze(2).unbind(0)), 1 - t, texts, return_dict=False)[0]
    return -torch.stack([one.float() for one in y]).squeeze(2)


HAND = {SD3: _sd3, SANA: _sana, FLUX: _flux, QWEN: _qwen, Z_IMAGE: _z_image}
