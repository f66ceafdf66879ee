"""Tiny image transformers, and how the diffusers pipelines call them.

Packing, places and masks are made by the pipelines' own functions.
"""

import diffusers
import torch
from tiny_first import sinusoids

HEADS = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2)
FLUX_LIKE = dict(**HEADS, in_channels=16, num_single_layers=1, joint_attention_dim=12, axes_dims_rope=(4, 6, 6))
TINY = {
    "Flux2Transformer2DModel": dict(
        **HEADS, in_channels=4, num_single_layers=1, joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4), mlp_ratio=1.0
    ),
    "ChromaTransformer2DModel": dict(
        **FLUX_LIKE, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    ),
    "AuraFlowTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64, sample_size=8,
    ),
    "LongCatImageTransformer2DModel": FLUX_LIKE,
    "OvisImageTransformer2DModel": {**FLUX_LIKE, "out_channels": None},
    "QwenImage21Transformer2DModel": dict(
        **{**HEADS, "num_layers": 2}, in_channels=6, out_channels=None, context_in_dim=12, mlp_ratio=1,
        axes_dims_rope=(4, 6, 6),
    ),
}  # fmt: skip
LATENTS = {
    "Flux2Transformer2DModel": (4, 4, 3),
    "ChromaTransformer2DModel": (4, 8, 6),
    "AuraFlowTransformer2DModel": (4, 8, 6),
    "LongCatImageTransformer2DModel": (4, 8, 6),
    "OvisImageTransformer2DModel": (4, 8, 6),
    "QwenImage21Transformer2DModel": (6, 4, 6),
}
PUBLISHED = {
    "Flux2Transformer2DModel": "time_guidance_embed_2.timestep_embedder.linear_",
    "ChromaTransformer2DModel": "distilled_guidance_layer_2.",
    "AuraFlowTransformer2DModel": "time_step_proj_2.linear_",
    "LongCatImageTransformer2DModel": "time_embed_2.timestep_embedder.linear_",
    "OvisImageTransformer2DModel": "timestep_embedder_2.linear_",
    "QwenImage21Transformer2DModel": "time_text_embed_2.timestep_embedder.linear_",
}


def chroma_vector(t):
    """For each of the 17 modulations of two blocks: the time, no guidance, and which modulation it is."""
    time, which = sinusoids(1000 * t, 4), sinusoids(1000 * torch.arange(17), 8)
    shown = torch.cat([time, sinusoids(0 * t, 4)], dim=1)
    return torch.cat([shown[:, None].expand(-1, 17, -1), which.expand(len(t), -1, -1)], dim=2)


FIRST = {kind: lambda t: sinusoids(1000 * t) for kind in TINY} | {"ChromaTransformer2DModel": chroma_vector}
SECOND = {kind: lambda t, r, first=first: first(r) for kind, first in FIRST.items()}

SEEN = ("ChromaTransformer2DModel",)  # its pipeline adds its mask to the logits, as 0 and 1: all words stay visible
READ = ("QwenImage21Transformer2DModel",)  # its forward reads the values of masks, and there are none without memory


def prompt(config, n, generator, key="joint_attention_dim", length=5):
    return {"prompt_embeds": torch.randn(n, length, config[key], generator=generator)}


def masked(config, n, generator, key="joint_attention_dim", length=5):
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, 3:] = 0
    return {**prompt(config, n, generator, key, length), "prompt_mask": mask}


def guided(config, n, generator):
    guidance = {"guidance": 1 + 4 * torch.rand(n, generator=generator)} if config["guidance_embeds"] else {}
    return {**prompt(config, n, generator), **guidance}


COND = {
    "Flux2Transformer2DModel": guided,
    "ChromaTransformer2DModel": masked,
    "AuraFlowTransformer2DModel": prompt,
    "LongCatImageTransformer2DModel": prompt,
    "OvisImageTransformer2DModel": prompt,
    "QwenImage21Transformer2DModel": lambda config, n, generator: masked(config, n, generator, "context_in_dim"),
}


def source(*shape):
    """A picture to edit."""
    return lambda n, generator: {"source": torch.randn(n, *shape, generator=generator)}


OPTIONAL = {"Flux2Transformer2DModel": source(4, 2, 5), "LongCatImageTransformer2DModel": source(4, 8, 6)}


def flux2(model, x, t, c):
    pipeline, ids = diffusers.Flux2Pipeline, diffusers.Flux2Pipeline._prepare_latent_ids(x)
    tokens, places = pipeline._pack_latents(x), ids
    if "source" in c:
        own = pipeline._prepare_image_ids([c["source"][:1]]).repeat(len(x), 1, 1)
        tokens, places = torch.cat([tokens, pipeline._pack_latents(c["source"])], 1), torch.cat([ids, own], 1)
    y = model(
        hidden_states=tokens, timestep=t, guidance=c.get("guidance"), encoder_hidden_states=c["prompt_embeds"],
        txt_ids=pipeline._prepare_text_ids(c["prompt_embeds"]), img_ids=places, return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents_with_ids(y[:, : ids.shape[1]], ids)


def chroma(model, x, t, c):
    pipeline, (n, channels, height, width) = diffusers.ChromaPipeline, x.shape
    tokens = pipeline._pack_latents(x, n, channels, height, width)
    mask = c["prompt_mask"].to(x.dtype)  # which the pipeline gives in the precision of its text encoder
    y = model(
        hidden_states=tokens, timestep=t, encoder_hidden_states=c["prompt_embeds"],
        txt_ids=torch.zeros(c["prompt_embeds"].shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", x.dtype),
        attention_mask=pipeline._prepare_attention_mask(None, n, tokens.shape[1], x.dtype, mask), return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y, 8 * height, 8 * width, 8)


def auraflow(model, x, t, c):
    return model(x, encoder_hidden_states=c["prompt_embeds"], timestep=t, return_dict=False)[0]


def longcat(model, x, t, c):
    """Prompts of its pipeline have 512 tokens, and pictures begin at the place behind them."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    pipeline, (n, channels, height, width) = diffusers.LongCatImagePipeline, x.shape
    length, size = c["prompt_embeds"].shape[1], {"height": height // 2, "width": width // 2}
    tokens = pipeline._pack_latents(x, n, channels, height, width)
    ids = prepare_pos_ids(modality_id=1, type="image", start=(length, length), **size)
    count = tokens.shape[1]
    if "source" in c:
        own = prepare_pos_ids(modality_id=2, type="image", start=(length, length), **size).double()
        packed = pipeline._pack_latents(c["source"], n, channels, height, width)
        tokens, ids = torch.cat([tokens, packed], dim=1), torch.cat([ids, own], dim=0)
    y = model(
        hidden_states=tokens, timestep=t, guidance=None, encoder_hidden_states=c["prompt_embeds"], img_ids=ids,
        txt_ids=prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=length), return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y[:, :count], 8 * height, 8 * width, 8)


def ovis(model, x, t, c):
    pipeline, (n, channels, height, width) = diffusers.OvisImagePipeline, x.shape
    text_ids = torch.zeros(c["prompt_embeds"].shape[1], 3)
    text_ids[:, 1] = text_ids[:, 2] = torch.arange(len(text_ids))
    y = model(
        hidden_states=pipeline._pack_latents(x, n, channels, height, width), timestep=t, txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", x.dtype),
        encoder_hidden_states=c["prompt_embeds"], return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(y, 8 * height, 8 * width, 8)


def qwen21(model, x, t, c):
    from diffusers.modular_pipelines.qwenimage21 import decoders, denoise, inputs

    tokens, (n, _, height, width) = inputs.pack_latents(x[:, :, None]), x.shape
    y = model(
        hidden_states=tokens, timestep=t, encoder_hidden_states=c["prompt_embeds"],
        encoder_hidden_states_mask=c["prompt_mask"], img_shapes=[[(1, height, width)]] * n,
        img_mask=denoise.joint_vision_mask(torch.zeros_like(c["prompt_mask"]).bool(), tokens.shape[1]),
        return_dict=False,
    )[0]  # fmt: skip
    return decoders.unpack_latents(y[:, -tokens.shape[1] :], 16 * height, 16 * width, 16)[:, :, 0]


HAND = {
    "Flux2Transformer2DModel": flux2,
    "ChromaTransformer2DModel": chroma,
    "AuraFlowTransformer2DModel": auraflow,
    "LongCatImageTransformer2DModel": longcat,
    "OvisImageTransformer2DModel": ovis,
    "QwenImage21Transformer2DModel": qwen21,
}
