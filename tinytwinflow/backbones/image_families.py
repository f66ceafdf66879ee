"""The families that make images of prompts."""

import inspect

import torch

from .family import Configuration, Family, Pipeline, pack, packed_axes, packed_out, unpack


def _sd3(model, x, t, cond):
    text = {"encoder_hidden_states": cond["prompt_embeds"], "pooled_projections": cond["pooled"]}
    return {"hidden_states": x, "timestep": t, **text}


def _sana(model, x, t, cond):
    text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
    return {"hidden_states": x, "timestep": t, **text}


def _pictures(x, cond):
    """The picture in the making and, if there is one, that to edit."""
    return [x, cond["source"]] if "source" in cond else [x]


def _tokens(pictures):
    return torch.cat([pack(picture) for picture in pictures], dim=1)


def _first(tokens, x):
    """The answer for x, that for the picture to edit cut off."""
    return unpack(tokens[:, : x.shape[2] * x.shape[3] // 4], x)


def _flux(model, x, t, cond):
    pictures, ids = _pictures(x, cond), []
    for i, picture in enumerate(pictures):
        rows, columns = (torch.arange(size // 2, device=x.device) for size in picture.shape[2:])
        at = torch.meshgrid(torch.full_like(rows[:1], i), rows, columns, indexing="ij")
        ids.append(torch.stack(at, dim=-1).flatten(0, 2).float())
    ids = {"img_ids": torch.cat(ids), "txt_ids": torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device)}
    return {**_sd3(model, _tokens(pictures), t, cond), **ids, "guidance": cond.get("guidance")}


def _qwen(model, x, t, cond):
    # a mask keeps attention from its fastest kernel even if it is all true, but to see whether it is would stop and
    # wait for the GPU at each call, and prompts of a batch are seldom of one length
    prompt, mask = cond["prompt_embeds"], cond["prompt_mask"].bool()
    pictures = _pictures(x, cond)
    shapes = [(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    image = {"hidden_states": _tokens(pictures), "img_shapes": [shapes] * len(x)}
    text = {"encoder_hidden_states": prompt, "encoder_hidden_states_mask": mask}
    if "max_txt_seq_len" not in inspect.signature(model.pos_embed.forward).parameters:
        # before 0.37 diffusers took this mask and did not use it
        whole = torch.cat([mask, mask.new_ones(len(x), image["hidden_states"].shape[1])], dim=1)
        text["txt_seq_lens"] = [prompt.shape[1]] * len(x)
        text["attention_kwargs"] = {"attention_mask": whole[:, None, None]}
    return {**image, **text, "timestep": t}


def _places(mask):
    """Where a mask (L,) is true.  -> list"""
    return mask.nonzero()[:, 0].tolist()


def _z_image(model, x, t, cond):
    prompt = cond["prompt_embeds"]
    # the model takes texts of their own lengths, so these must be known: one wait for the GPU a call
    masks = torch.ones(prompt.shape[:2], device="cpu") if prompt.is_meta else cond["prompt_mask"].cpu()
    texts = [row[: len(on)] if on == [*range(len(on))] else row[on] for row, on in zip(prompt, map(_places, masks))]
    return {"x": list(x[:, :, None]), "t": t, "cap_feats": texts}


_TEXT = {"prompt_embeds": ("L", "joint_attention_dim")}
_POOLED, _MASK = {"pooled": ("pooled_projection_dim",)}, {"prompt_mask": ("L",)}
_PACKED = {"output": _first, "axes": packed_axes, "out": packed_out}
_SOURCE = {"source": (lambda config: config["in_channels"] // 4, "H2", "W2")}
_TIME = ("time_text_embed.timestep_embedder", "time_text_embed.time_proj")
_UNGUIDED, _PLAIN = {"do_classifier_free_guidance": False}, {"guidance_scale": 1.0}
_SMALL = {"num_layers": 1, "num_attention_heads": 2}

IMAGES = {
    "SD3Transformer2DModel": Family(
        *_TIME, _sd3, {**_TEXT, **_POOLED},
        pipelines=(Pipeline("StableDiffusion3Pipeline", 256, ("prompt_embeds", None, "pooled", None),
                            {**_UNGUIDED, "prompt_2": None, "prompt_3": None}, plain=_PLAIN),),
        published={"sd3.5-large": Configuration(
            {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
             "qk_norm": "rms_norm"}, (16, 128, 128), 333)},
        small={**_SMALL, "caption_projection_dim": 128},
    ),
    "SanaTransformer2DModel": Family(
        "time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", _sana,
        {"prompt_embeds": ("L", "caption_channels"), **_MASK},
        unit=lambda config: 1000.0 * config.get("timestep_scale", 1.0), off=("guidance_embeds",),
        pipelines=(Pipeline("SanaPipeline", 300, ("prompt_embeds", "prompt_mask", None, None), _UNGUIDED,
                            own=("complex_human_instruction",), plain={**_PLAIN, "use_resolution_binning": False}),),
        published={"sana-1.6b": Configuration({}, (32, 32, 32), 300)},
        small={**_SMALL, "num_cross_attention_heads": 1, "cross_attention_head_dim": 64, "cross_attention_dim": 64},
    ),
    "FluxTransformer2DModel": Family(
        *_TIME, _flux, {**_TEXT, **_POOLED}, ("transformer_blocks", "single_transformer_blocks"), **_PACKED,
        optional=_SOURCE,
        pipelines=tuple(Pipeline(name, 512, ("prompt_embeds", "pooled", None))
                        for name in ("FluxPipeline", "FluxKontextPipeline")),
        published={"flux": Configuration({}, (16, 128, 128), 512)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "QwenImageTransformer2DModel": Family(
        *_TIME, _qwen, {**_TEXT, **_MASK}, **_PACKED, unit=lambda config: 1.0, optional=_SOURCE,
        off=("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
        # the last two read the picture among the words
        pipelines=tuple(Pipeline(name, tokens, ("prompt_embeds", "prompt_mask"), frames=True,
                                 plain={"true_cfg_scale": 1.0}) for name, tokens in (
            ("QwenImagePipeline", 512), ("QwenImageEditPipeline", 2048), ("QwenImageEditPlusPipeline", 1024))),
        published={"qwen-image": Configuration({}, (16, 128, 128), 512)},
        small=_SMALL,
    ),
    "ZImageTransformer2DModel": Family(
        "t_embedder", None, _z_image, {"prompt_embeds": ("L", "cap_feat_dim"), **_MASK},
        ("noise_refiner", "context_refiner", "layers"), lambda y, x: -torch.stack(y).squeeze(2),
        clock=lambda t: 1 - t, unit=lambda config: config["t_scale"], second=lambda t, r: t - r,
        off=("siglip_feat_dim",),
        pipelines=(Pipeline("ZImagePipeline", 512, ("prompt_embeds", None), _UNGUIDED, plain={"guidance_scale": 0.0}),),
        published={"z-image": Configuration({}, (16, 128, 128), 512)},
        small={"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2},
    ),
}  # fmt: skip
