"""More families of pictures: tiny models, their conditions, and the velocity as their pipelines compute it."""

import torch
from tiny_first import sinusoids

LUMINA2, COGVIEW4, HIDREAM, HUNYUAN = (
    f"{name}Transformer2DModel" for name in ("Lumina2", "CogView4", "HiDreamImage", "HunyuanImage")
)
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
TINY = {
    LUMINA2: dict(
        in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 8, 8), cap_feat_dim=12,
    ),
    COGVIEW4: dict(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=16, condition_dim=8,
        rope_axes_dim=(16, 16),
    ),
    HIDREAM: dict(
        **HEADS, patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, caption_channels=[12, 10],
        text_emb_dim=14, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[2, 0],
    ),
    HUNYUAN: dict(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(4, 4),
    ),
}  # fmt: skip
LATENTS = dict.fromkeys(TINY, (4, 8, 6))
PUBLISHED = {
    LUMINA2: "time_caption_embed_2.timestep_embedder.linear_",
    COGVIEW4: "time_condition_embed_2.timestep_embedder.linear_",
    HIDREAM: "t_embedder_2.timestep_embedder.linear_",
    HUNYUAN: "time_guidance_embed_2.timestep_embedder.linear_",
}
# what the MLP is shown of the time |t|, and what emb_r is shown
FIRST = {
    LUMINA2: lambda t: sinusoids(1 - t),
    COGVIEW4: lambda t: sinusoids(1000 * t, 16),
    HIDREAM: lambda t: sinusoids(1000 * t),
    HUNYUAN: lambda t: sinusoids(1000 * t),
}
SECOND = {
    LUMINA2: lambda t, r: sinusoids(r),
    COGVIEW4: lambda t, r: sinusoids(1000 * r, 16),
    HIDREAM: lambda t, r: sinusoids(1000 * r),
    HUNYUAN: lambda t, r: sinusoids(1000 * r),
}


def _mask(n, length, first):
    """Whole numbers; what counts of the first row is shorter."""
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, first:] = 0
    return mask


def _hidream_cond(config, n, generator):
    def noise(*shape):
        return torch.randn(n, *shape, generator=generator)

    return {"prompt_embeds": noise(5, 12), "llama_embeds": noise(3, 4, 10), "pooled": noise(14)}


def _hunyuan_cond(config, n, generator):
    """The last row has no glyphs, as prompts that quote nothing."""
    prompt, glyphs = (torch.randn(n, length, width, generator=generator) for length, width in ((5, 12), (3, 10)))
    masks = {"prompt_mask": _mask(n, 5, 3), "glyph_mask": _mask(n, 3, 2)}
    masks["glyph_mask"][-1] = 0
    return {"prompt_embeds": prompt, "glyph_embeds": glyphs, **masks}


COND = {
    LUMINA2: lambda config, n, generator: {
        "prompt_embeds": torch.randn(n, 5, 12, generator=generator), "prompt_mask": _mask(n, 5, 3),
    },
    COGVIEW4: lambda config, n, generator: {
        "prompt_embeds": torch.randn(n, 5, 12, generator=generator),
    },
    HIDREAM: _hidream_cond,
    HUNYUAN: _hunyuan_cond,
}  # fmt: skip


def _lumina2(model, x, t, c):
    """Its clock runs from 0 at noise to 1 at data, and it answers data - noise."""
    text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_mask"]}
    return -model(hidden_states=x, timestep=1 - t, **text, return_dict=False)[0]


def _cogview4(model, x, t, c):
    """It is told the sizes in pixels of the original picture and of this one, and where this was cut out of that."""
    size = torch.tensor([[8.0 * x.shape[2], 8.0 * x.shape[3]]]).repeat(len(x), 1)
    about = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
    text = {"encoder_hidden_states": c["prompt_embeds"]}
    return model(hidden_states=x, timestep=1000 * t, **text, **about, return_dict=False)[0]


def _hidream(model, x, t, c):
    """Its layers' Llama states come first in their list of (layers, rows, words, width); it answers data - noise."""
    text = {"encoder_hidden_states_t5": c["prompt_embeds"], "pooled_embeds": c["pooled"]}
    llama = torch.stack([*c["llama_embeds"].unbind(1)])
    return -model(hidden_states=x, timesteps=1000 * t, encoder_hidden_states_llama3=llama, **text, return_dict=False)[0]


def _hunyuan(model, x, t, c):
    text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_mask"]}
    glyphs = {"encoder_hidden_states_2": c["glyph_embeds"], "encoder_attention_mask_2": c["glyph_mask"]}
    return model(
        hidden_states=x, timestep=1000 * t, timestep_r=None, guidance=None, **text, **glyphs, return_dict=False
    )[0]


HAND = {LUMINA2: _lumina2, COGVIEW4: _cogview4, HIDREAM: _hidream, HUNYUAN: _hunyuan}
