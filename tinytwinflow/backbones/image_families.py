"""The families that make images of prompts."""

import inspect
import sys

import torch
from torch import nn

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


def _grid(x, side, picture=0, start=0):
    """The places (picture, row, column) of the patches of an image, from `start` on.  -> (H/side W/side, 3) float"""
    rows, columns = (torch.arange(size // side, device=x.device) + start for size in x.shape[2:])
    at = torch.stack(torch.meshgrid(torch.full_like(rows[:1], picture), rows, columns, indexing="ij"), dim=-1)
    return at.flatten(0, 2).float()


def _flux(model, x, t, cond):
    pictures = _pictures(x, cond)
    ids = {"img_ids": torch.cat([_grid(picture, 2, i) for i, picture in enumerate(pictures)])}
    ids["txt_ids"] = torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device)
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


def _flux2(model, x, t, cond):
    prompt, pictures, pad = cond["prompt_embeds"], _pictures(x, cond), nn.functional.pad
    words = torch.arange(prompt.shape[1], device=x.device)
    return {
        "hidden_states": torch.cat([picture.flatten(2).mT for picture in pictures], dim=1),
        "img_ids": torch.cat([pad(_grid(picture, 1, 10 * i), (0, 1)) for i, picture in enumerate(pictures)]),
        "encoder_hidden_states": prompt, "txt_ids": pad(words[:, None].float(), (3, 0)),
        "timestep": t, "guidance": cond.get("guidance"),
    }  # fmt: skip


def _chroma(model, x, t, cond):
    prompt, image = cond["prompt_embeds"], pack(x)
    # a mask of numbers is added to the attention's logits, so that masked words stay visible: as in its pipeline
    mask = nn.functional.pad(cond["prompt_mask"].to(x.dtype), (0, image.shape[1]), value=1.0)
    ids = {"img_ids": _grid(x, 2), "txt_ids": torch.zeros(prompt.shape[1], 3, device=x.device)}
    return {"hidden_states": image, "encoder_hidden_states": prompt, "attention_mask": mask, "timestep": t, **ids}


def _aura_flow(model, x, t, cond):
    side = int(model.config["pos_embed_max_size"] ** 0.5) * model.config["patch_size"]
    if max(x.shape[2:]) > side:  # the model would take places from the other side
        raise ValueError(f"x is of shape {tuple(x.shape)}, this model has places for H and W up to {side}")
    return {"hidden_states": x, "encoder_hidden_states": cond["prompt_embeds"], "timestep": t}


def _ovis(model, x, t, cond):
    words = torch.arange(cond["prompt_embeds"].shape[1], device=x.device)
    ids = {"img_ids": _grid(x, 2), "txt_ids": torch.stack([0 * words, words, words], dim=1).float()}
    return {"hidden_states": pack(x), "encoder_hidden_states": cond["prompt_embeds"], "timestep": t, **ids}


def _longcat(model, x, t, cond):
    pictures, length = _pictures(x, cond), cond["prompt_embeds"].shape[1]
    at = torch.cat([_grid(picture, 2, 1 + i, length) for i, picture in enumerate(pictures)])
    return {**_ovis(model, x, t, cond), "hidden_states": _tokens(pictures), "img_ids": at}


def _qwen21(model, x, t, cond):
    prompt, (height, width) = cond["prompt_embeds"], x.shape[2:]
    # a slot behind the words stands for four tokens of the image
    slots = torch.arange(prompt.shape[1] + height * width // 4, device=x.device) >= prompt.shape[1]
    text = {"encoder_hidden_states": prompt, "encoder_hidden_states_mask": cond["prompt_mask"].bool()}
    image = {"hidden_states": x.flatten(2).mT, "img_shapes": [[(1, height, width)]] * len(x)}
    return {**image, **text, "img_mask": slots.expand(len(x), -1), "timestep": t}


def _sinusoids(time):
    """Those of Qwen-Image 2.1, which keeps its frequencies in a buffer: a model that is cast has them rounded."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(time, 256, flip_sin_to_cos=True, downscale_freq_shift=0)


def _of_area(pixels):
    """Pictures resized to about so many pixels, as Qwen-Image's editing pipelines show them to their text encoder."""

    def sees(pipeline, picture):
        dimensions = sys.modules[type(pipeline).__module__].calculate_dimensions
        width, height = dimensions(pixels, picture.width / picture.height)[:2]
        return pipeline.image_processor.resize(picture, height, width)

    return sees


_TEXT = {"prompt_embeds": ("L", "joint_attention_dim")}
_POOLED, _MASK = {"pooled": ("pooled_projection_dim",)}, {"prompt_mask": ("L",)}
_PACKED = {"output": _first, "axes": packed_axes, "out": packed_out}
_SOURCE = {"source": (lambda config: config["in_channels"] // 4, "H2", "W2")}
_TIME = ("time_text_embed.timestep_embedder", "time_text_embed.time_proj")
_UNGUIDED, _PLAIN = {"do_classifier_free_guidance": False}, {"guidance_scale": 1.0}
_SMALL = {"num_layers": 1, "num_attention_heads": 2}
_BOTH = ("transformer_blocks", "single_transformer_blocks")

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
        *_TIME, _flux, {**_TEXT, **_POOLED}, _BOTH, **_PACKED, optional=_SOURCE,
        pipelines=tuple(Pipeline(name, 512, ("prompt_embeds", "pooled", None), edits=name == "FluxKontextPipeline")
                        for name in ("FluxPipeline", "FluxKontextPipeline")),
        published={"flux": Configuration({}, (16, 128, 128), 512)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "QwenImageTransformer2DModel": Family(
        *_TIME, _qwen, {**_TEXT, **_MASK}, **_PACKED, unit=lambda config: 1.0, optional=_SOURCE,
        off=("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"),
        rows=lambda config, n: n // 2 if config.get("zero_cond_t") else n,  # of 2511's edits a picture is at time 0
        pipelines=tuple(Pipeline(name, tokens, ("prompt_embeds", "prompt_mask"), frames=True,
                                 plain={"true_cfg_scale": 1.0}, sees=sees, edits=bool(sees)) for name, tokens, sees in (
            ("QwenImagePipeline", 512, None), ("QwenImageEditPipeline", 2048, _of_area(1024**2)),
            ("QwenImageEditPlusPipeline", 1024, _of_area(384**2)))),
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
    "Flux2Transformer2DModel": Family(
        "time_guidance_embed.timestep_embedder", "time_guidance_embed.time_proj", _flux2, _TEXT, _BOTH,
        lambda y, x: y[:, : x.shape[2] * x.shape[3]].mT.unflatten(2, x.shape[2:]),
        optional={"source": ("in_channels", "H2", "W2")},
        pipelines=(Pipeline("Flux2Pipeline", 512, ("prompt_embeds", None), edits=None),
                   Pipeline("Flux2KleinPipeline", 512, ("prompt_embeds", None), plain=_PLAIN, edits=None)),
        published={"flux.2": Configuration({}, (128, 64, 64), 512),
                   "flux.2-klein-4b": Configuration(
                       {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                        "joint_attention_dim": 7680, "guidance_embeds": False}, (128, 64, 64), 512)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "ChromaTransformer2DModel": Family(
        "distilled_guidance_layer", "time_text_embed", _chroma, {**_TEXT, **_MASK}, _BOTH, **_PACKED,
        pipelines=(Pipeline("ChromaPipeline", 512, ("prompt_embeds", None, "prompt_mask", None, None, None), _UNGUIDED,
                            plain=_PLAIN),),
        published={"chroma": Configuration({}, (16, 128, 128), 512)},
        small={**_SMALL, "num_single_layers": 1, "approximator_hidden_dim": 64, "approximator_layers": 1},
    ),
    "AuraFlowTransformer2DModel": Family(
        "time_step_proj", "time_step_embed", _aura_flow, _TEXT,
        ("joint_transformer_blocks", "single_transformer_blocks"), unit=lambda config: 1.0,
        pipelines=(Pipeline("AuraFlowPipeline", 256, ("prompt_embeds", None, None, None), _UNGUIDED, plain=_PLAIN),),
        published={"auraflow-0.3": Configuration({"pos_embed_max_size": 9216}, (4, 128, 128), 256)},
        small={"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2,
               "caption_projection_dim": 512},
    ),
    "LongCatImageTransformer2DModel": Family(
        "time_embed.timestep_embedder", "time_embed.time_proj", _longcat, _TEXT, _BOTH, **_PACKED, optional=_SOURCE,
        pipelines=(Pipeline("LongCatImagePipeline", 512, ("prompt_embeds", None),
                            plain={**_PLAIN, "enable_prompt_rewrite": False}),),
        published={"longcat-image": Configuration({"num_layers": 10, "num_single_layers": 20}, (16, 128, 128), 512)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "OvisImageTransformer2DModel": Family(
        "timestep_embedder", "time_proj", _ovis, _TEXT, _BOTH, **_PACKED,
        pipelines=(Pipeline("OvisImagePipeline", 256, ("prompt_embeds", None, None, None), _UNGUIDED, plain=_PLAIN),),
        published={"ovis-image-7b": Configuration({}, (16, 128, 128), 256)},
        small={**_SMALL, "num_single_layers": 1},
    ),
    "QwenImage21Transformer2DModel": Family(  # not published here: it reads its masks, so its bytes cannot be counted
        _TIME[0], _sinusoids, _qwen21, {"prompt_embeds": ("L", "context_in_dim"), **_MASK},
        output=lambda y, x: y[:, -x.shape[2] * x.shape[3] :].mT.unflatten(2, x.shape[2:]),
        axes=lambda config: {"C": config["in_channels"], "H": 2, "W": 2},
        rows=lambda config, n: n - config["causal_condition"], small=_SMALL,
    ),
}  # fmt: skip
