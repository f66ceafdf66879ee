"""Flow transformers of videos and of sound: tiny ones, and how their pipelines call them.

Latents are (B, C, T, H, W), and of sound (B, C, T).
"""

import math

import diffusers
import torch
from tiny_first import sinusoids

WAN, LTX, HUNYUAN = "WanTransformer3DModel", "LTXVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"
SANA, STABLE = "SanaVideoTransformer3DModel", "StableAudio3DiTModel"

TINY = {
    WAN: dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, text_dim=12, ffn_dim=32,
        num_layers=2, rope_max_seq_len=16,
    ),
    LTX: dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, num_layers=2,
    ),
    HUNYUAN: dict(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, rope_axes_dim=(4, 4, 4),
        num_layers=2, num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10, image_embed_dim=8,
        task_type="t2v",
    ),
    SANA: dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12, num_layers=2, rope_max_seq_len=16,
    ),
    STABLE: dict(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=12, global_cond_dim=12,
        local_add_cond_dim=5, num_memory_tokens=2,
    ),
}  # fmt: skip
READ = (HUNYUAN,)  # what is in its tensors is read, so it makes no call without memory
LATENTS = {WAN: (4, 2, 6, 4), LTX: (4, 3, 2, 4), HUNYUAN: (4, 3, 2, 4), SANA: (4, 2, 6, 4), STABLE: (4, 7)}
PUBLISHED = {
    WAN: "condition_embedder_2.time_embedder.linear_",
    LTX: "time_embed_2.emb.timestep_embedder.linear_",
    HUNYUAN: "time_embed_2.timestep_embedder.linear_",
    SANA: "time_embed_2.emb.timestep_embedder.linear_",
    STABLE: "to_timestep_embed_2.",
}


def octaves(time):
    """128 cosines, then 128 sines, of 1/2 up to 10000 turns in the time 1, evenly in their logarithm."""
    turns = torch.exp(torch.linspace(0, 1, 128) * math.log(20000) + math.log(0.5))
    angle = time[:, None] * turns * 2 * math.pi
    return torch.cat([angle.cos(), angle.sin()], dim=1)


FIRST = {kind: lambda t: sinusoids(1000 * t) for kind in TINY} | {STABLE: octaves}
SECOND = {kind: lambda t, r: sinusoids(1000 * r) for kind in TINY} | {STABLE: lambda t, r: octaves(r)}


def words(n, width, generator, length=5):
    """Random embeddings of prompts and their mask; the first is shorter."""
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, 3:] = 0
    return torch.randn(n, length, width, generator=generator), mask


def wan_cond(config, n, generator):
    return {"prompt_embeds": words(n, config["text_dim"], generator)[0]}


def caption_cond(config, n, generator):
    return dict(zip(("prompt_embeds", "prompt_mask"), words(n, config["caption_channels"], generator)))


def hunyuan_cond(config, n, generator):
    """Of a prompt without words in quotation marks, such as the first, no glyph counts."""
    cond = dict(zip(("prompt_embeds", "prompt_mask"), words(n, config["text_embed_dim"], generator)))
    glyphs, mask = words(n, config["text_embed_2_dim"], generator, length=4)
    mask[0] = 0
    return {**cond, "glyph_embeds": glyphs, "glyph_mask": mask}


def stable_cond(config, n, generator):
    cond = dict(zip(("prompt_embeds", "prompt_mask"), words(n, config["cond_token_dim"], generator)))
    return {**cond, "duration_embeds": torch.randn(n, config["global_cond_dim"], generator=generator)}


COND = {WAN: wan_cond, LTX: caption_cond, HUNYUAN: hunyuan_cond, SANA: caption_cond, STABLE: stable_cond}


def wan(model, x, t, c):
    return model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=c["prompt_embeds"], return_dict=False)[0]


def ltx(model, x, t, c, rate=25):
    """At the pipeline's default of 25 frames a second, of an autoencoder that makes 8 x 32 x 32 pixels one."""
    pipeline, size = diffusers.LTXPipeline, dict(zip(("num_frames", "height", "width"), x.shape[2:]))
    y = model(
        hidden_states=pipeline._pack_latents(x), encoder_hidden_states=c["prompt_embeds"], timestep=1000 * t, **size,
        encoder_attention_mask=c["prompt_mask"], rope_interpolation_scale=(8 / rate, 32, 32), return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y, **size)


def hunyuan(model, x, t, c):
    source, mask = diffusers.HunyuanVideo15Pipeline.prepare_cond_latents_and_mask(None, x, x.dtype, x.device)
    return model(
        hidden_states=torch.cat([x, source, mask], dim=1), timestep=1000 * t,
        image_embeds=torch.zeros(len(x), 729, model.config.image_embed_dim),
        encoder_hidden_states=c["prompt_embeds"], encoder_attention_mask=c["prompt_mask"].to(x.dtype),
        encoder_hidden_states_2=c["glyph_embeds"], encoder_attention_mask_2=c["glyph_mask"].to(x.dtype),
        return_dict=False,
    )[0]  # fmt: skip


def sana(model, x, t, c):
    text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_mask"]}
    return model(x, timestep=1000 * t, return_dict=False, **text)[0]


def stable(model, x, t, c):
    """Its scheduler has one train timestep, so the time is sigma; the duration is a word of its own besides."""
    text, mask = diffusers.StableAudio3Pipeline.prepare_cross_attention(
        None, c["prompt_embeds"], c["prompt_mask"], c["duration_embeds"]
    )
    text = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    return model(x, t, global_hidden_states=c["duration_embeds"], return_dict=False, **text)[0]


HAND = {WAN: wan, LTX: ltx, HUNYUAN: hunyuan, SANA: sana, STABLE: stable}
