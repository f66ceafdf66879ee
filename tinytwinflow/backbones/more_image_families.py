"""More families that make images of prompts: with several text encoders, experts, or a clock that runs backwards."""

from types import MethodType

import torch

from .family import Configuration, Family, Pipeline


def _lumina2(model, x, t, cond):
    mask = cond["prompt_mask"]
    if mask.is_meta:  # which holds no lengths, and the model asks for them: let each text fill all
        mask = mask.clone()
        mask.sum = lambda dim: torch.full(mask.shape[:1], mask.shape[1], device="cpu")
    text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": mask}
    return {"hidden_states": x, "timestep": t, **text}


def _cogview4(model, x, t, cond):
    # in pixels, of which its autoencoder makes one latent of 8: the whole of a picture of this size
    size = torch.cat([x.new_full((len(x), 1), 8 * side) for side in x.shape[2:]], dim=1)
    about = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": cond["prompt_embeds"], **about}


def _shared_out(part, x):
    """What a layer of experts does with words that have no values, so no expert of their choice: all have as many."""
    if not x.is_meta:
        return type(part).forward(part, x)
    words = x.flatten(0, 1).repeat_interleave(part.num_activated_experts, dim=0)
    answers = [expert(some) for expert, some in zip(part.experts, words.tensor_split(len(part.experts)))]
    chosen = torch.cat(answers).unflatten(0, (-1, part.num_activated_experts))
    weights = (x.flatten(0, 1) @ part.gate.weight.T).softmax(-1)[:, : part.num_activated_experts, None]
    return (chosen * weights).sum(1).view_as(x) + part.shared_experts(x)


def _hidream(model, x, t, cond):
    # only in training do the experts pass on gradients, but there the model itself leaves its answer in patches
    model.train().training = False
    for part in model.modules() if x.is_meta else ():
        if hasattr(part, "experts"):
            part.forward = MethodType(_shared_out, part)
    # cut and padded by itself, but with sizes that are numbers: of its own it waits for the GPU, twice a row
    tokens, mask, _, ids = model.patchify(x)
    mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
    sides = [side // model.config.patch_size for side in x.shape[2:]]
    image = {"hidden_states": tokens, "hidden_states_masks": mask, "img_ids": ids, "img_sizes": [sides] * len(x)}
    text = {"encoder_hidden_states_t5": cond["prompt_embeds"], "pooled_embeds": cond["pooled"]}
    layers = {"encoder_hidden_states_llama3": cond["llama_embeds"].transpose(0, 1)}
    return {**image, "timesteps": t, **text, **layers}


def _hunyuan_image(model, x, t, cond):
    prompt, glyphs = cond["prompt_embeds"], cond["glyph_embeds"]
    time = (1000 * t).to(x.dtype)  # what refines the prompt is shown it too, in this precision as by the pipeline
    if x.is_meta:  # where masks cannot choose words: all, as if glyphs were words of the prompt once projected
        more = model.context_embedder_2(glyphs).mean(-1, keepdim=True).expand(-1, -1, prompt.shape[2])
        prompt = torch.cat([prompt, more], dim=1)
        text = {"encoder_hidden_states": prompt, "encoder_attention_mask": prompt.new_ones(prompt.shape[:2])}
        return {"hidden_states": x, "timestep": time, **text}
    text = {"encoder_hidden_states": prompt, "encoder_attention_mask": cond["prompt_mask"]}
    more = {"encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": cond["glyph_mask"]}
    return {"hidden_states": x, "timestep": time, **text, **more}


def _gemma_text(pipeline, prompts, tokens):
    """After an instruction, but not the empty prompt: so the pipeline has it for its guidance."""
    how = {"device": pipeline.device, "max_sequence_length": tokens}
    if any(prompts):
        embeds, mask = pipeline.encode_prompt(prompts, False, **how)[:2]
    else:
        embeds, mask = pipeline.encode_prompt(prompts, True, **how)[2:]
    return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}


def _glm_text(pipeline, prompts, tokens):
    """Of one length whoever is in the batch: the pipeline fills up before a prompt, to 16 or the longest of a batch."""
    if tokens % 16:
        raise ValueError(f"CogView4Pipeline makes lengths that are multiples of 16, got {tokens} tokens")
    longest = pipeline.tokenizer.pad_token * tokens
    embeds, _ = pipeline.encode_prompt(
        [*prompts, longest], device=pipeline.device, max_sequence_length=tokens, **_UNGUIDED
    )
    return {"prompt_embeds": embeds[:-1]}


def _four_texts(pipeline, prompts, tokens):
    """Its Llama's layers, which come before the rows there."""
    how = {**_UNGUIDED, "device": pipeline.device, "max_sequence_length": tokens}
    embeds, _, layers, _, pooled, _ = pipeline.encode_prompt(prompts, **how)
    return {"prompt_embeds": embeds, "llama_embeds": layers.transpose(0, 1), "pooled": pooled}


def _text_and_glyphs(pipeline, prompts, tokens):
    """Words, and what of them stands in quotes, letter by letter."""
    pipeline.tokenizer_max_length = tokens
    answer = pipeline.encode_prompt(prompts, device=pipeline.device, batch_size=len(prompts))
    text = dict(zip(("prompt_embeds", "prompt_mask", "glyph_embeds", "glyph_mask"), answer))
    return {**text, "prompt_mask": text["prompt_mask"].bool(), "glyph_mask": text["glyph_mask"].bool()}


_MASK = {"prompt_mask": ("L",)}
_UNGUIDED, _PLAIN = {"do_classifier_free_guidance": False}, {"guidance_scale": 1.0}
_SMALL = {"num_layers": 1, "num_attention_heads": 2}

MORE_IMAGES = {
    "Lumina2Transformer2DModel": Family(
        "time_caption_embed.timestep_embedder", "time_caption_embed.time_proj", _lumina2,
        {"prompt_embeds": ("L", "cap_feat_dim"), **_MASK}, ("context_refiner", "noise_refiner", "layers"),
        lambda y, x: -y, clock=lambda t: 1 - t, unit=lambda config: 1.0,
        pipelines=(Pipeline("Lumina2Pipeline", 256, (), plain=_PLAIN, encode=_gemma_text),),
        published={"lumina-image-2": Configuration({"cap_feat_dim": 2304}, (16, 128, 128), 256)},
        small={**_SMALL, "num_refiner_layers": 1, "num_kv_heads": 1, "hidden_size": 192},
    ),
    "CogView4Transformer2DModel": Family(
        "time_condition_embed.timestep_embedder", "time_condition_embed.time_proj", _cogview4,
        {"prompt_embeds": ("L", "text_embed_dim")},
        pipelines=(Pipeline("CogView4Pipeline", 128, (), plain=_PLAIN, encode=_glm_text),),
        published={"cogview4-6b": Configuration(
            {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}, (16, 128, 128), 128)},
        small=_SMALL,
    ),
    "HiDreamImageTransformer2DModel": Family(
        "t_embedder.timestep_embedder", "t_embedder.time_proj", _hidream,
        {"prompt_embeds": ("L", lambda config: config["caption_channels"][0]),
         "llama_embeds": (lambda config: max(config["llama_layers"]) + 1, "M",
                          lambda config: config["caption_channels"][1]),
         "pooled": ("text_emb_dim",)},
        ("double_stream_blocks", "single_stream_blocks"), lambda y, x: -y,
        pipelines=(Pipeline("HiDreamImagePipeline", 128, (), plain=_PLAIN, encode=_four_texts),),
        published={"hidream-i1": Configuration(
            {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": [64, 32, 32],
             "llama_layers": [*range(32), *[31] * 16]}, (16, 128, 128), 128)},
        small={**_SMALL, "num_single_layers": 1, "llama_layers": [0, 1]},
    ),
    "HunyuanImageTransformer2DModel": Family(
        "time_guidance_embed.timestep_embedder", "time_guidance_embed.time_proj", _hunyuan_image,
        {"prompt_embeds": ("L", "text_embed_dim"), **_MASK,
         "glyph_embeds": ("G", "text_embed_2_dim"), "glyph_mask": ("G",)},
        ("transformer_blocks", "single_transformer_blocks"),
        axes=lambda config: {"C": config["in_channels"], **dict(zip("HW", config["patch_size"]))},
        # its distilled model has a second time of its own; the guidance that it is shown as well comes with it
        off=("use_meanflow", "guidance_embeds"),
        # its guidance is a part of the pipeline, no argument of a call: pipeline.guider = None switches it off
        pipelines=(Pipeline("HunyuanImagePipeline", 256, (), encode=_text_and_glyphs),),
        published={"hunyuanimage-2.1": Configuration({"text_embed_2_dim": 1472}, (64, 64, 64), 256)},
        small={**_SMALL, "num_single_layers": 1, "num_refiner_layers": 1},
    ),
}  # fmt: skip
