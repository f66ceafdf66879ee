"""The families that make videos of prompts; latents are (C, T, H, W).

Wan 2.2 has two experts of one class, `transformer` for times from the pipeline's boundary_ratio up and `transformer_2`
below: each is a Velocity of its own. Its model of 5B is called with one time a token; all are equal where no picture is
given, so one a row is the same. AnyFlow's models are Wan 2.1's with another sum of embeddings, see `Velocity`.
"""

import torch

from .family import Configuration, Family, Pipeline, image_axes

PICTURE_WORDS = 729  # that HunyuanVideo 1.5 is told of a picture; of none as many zeros, which it masks


def _wan(model, x, t, cond):
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": cond["prompt_embeds"]}


def _sana(model, x, t, cond):
    return {**_wan(model, x, t, cond), "encoder_attention_mask": cond["prompt_mask"]}


def _ltx(model, x, t, cond):
    # the published autoencoder makes 8 frames and 32 x 32 pixels one, and rotary positions are in seconds and pixels
    seconds = 8 / cond["frame_rate"].view(-1, 1, 1, 1, 1) if "frame_rate" in cond else 8 / 25
    size = dict(zip(("num_frames", "height", "width"), x.shape[2:]))
    return {**_sana(model, x.flatten(2).mT, t, cond), **size, "rope_interpolation_scale": (seconds, 32, 32)}


def _hunyuan(model, x, t, cond):
    # no picture is given: zeros for its latent, its mask and its words. The blocks that refine the words of the prompt
    # have a time embedder of their own, which is left as it is and sees the time rounded as in the pipeline
    picture = x.new_zeros(len(x), PICTURE_WORDS, model.config["image_embed_dim"])
    text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
    glyphs = {"encoder_hidden_states_2": cond["glyph_embeds"], "encoder_attention_mask_2": cond["glyph_mask"]}
    x = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1)
    return {"hidden_states": x, "timestep": (1000 * t).to(x.dtype), "image_embeds": picture, **text, **glyphs}


def _patch_axes(config):
    return {"C": config["in_channels"], **dict(zip("THW", config["patch_size"]))}


def _ltx_axes(config):
    return {"C": config["in_channels"], "T": 1, "H": 1, "W": 1}


def _hunyuan_axes(config):
    if config["task_type"] != "t2v":
        task = config["task_type"]
        raise ValueError(f"HunyuanVideo15Transformer3DModel with task_type={task!r} is shown a picture: not supported")
    return {**image_axes(config), "C": config["in_channels"] // 2, "T": config["patch_size_t"]}


def _anyflow(config):
    """Of AnyFlow's models the sum is (1 - g) emb(|t|) + g emb_r; emb_r is shown |r| or |t| - |r|."""
    gate, kind = config.get("gate_value"), config.get("deltatime_type")
    if gate is None and kind is None:
        return {}
    shown = {"r": lambda t, r: r.abs(), "t-r": lambda t, r: t.abs() - r.abs()}
    if kind not in shown or not isinstance(gate, int | float):
        raise ValueError(f"WanTransformer3DModel with deltatime_type={kind!r}, gate_value={gate!r}: not supported")
    terms = {"shares": lambda t, r: (1.0 - gate, torch.full_like(t, gate)), "second": shown[kind]}
    return {**terms, "given": "condition_embedder.delta_embedder"}


_CAPTION = {"prompt_embeds": ("L", "caption_channels"), "prompt_mask": ("L",)}
_TIME = ("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj")
_UNGUIDED, _PLAIN = {"do_classifier_free_guidance": False}, {"guidance_scale": 1.0}
_SMALL = {"num_layers": 1, "num_attention_heads": 2}

VIDEOS = {
    "WanTransformer3DModel": Family(
        "condition_embedder.time_embedder", "condition_embedder.timesteps_proj", _wan,
        {"prompt_embeds": ("L", "text_dim")}, ("blocks",), axes=_patch_axes, off=("image_dim", "added_kv_proj_dim"),
        variant=_anyflow,
        pipelines=(Pipeline("WanPipeline", 512, ("prompt_embeds", None), _UNGUIDED, frames=True, plain=_PLAIN),),
        published={
            "wan2.1-1.3b": Configuration({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
                                         (16, 21, 60, 104), 512),
            "wan2.1-14b": Configuration({}, (16, 21, 90, 160), 512),  # and each expert of wan2.2-a14b
            "wan2.2-5b": Configuration({"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336,
                                        "in_channels": 48, "out_channels": 48}, (48, 31, 44, 80), 512)},
        small={**_SMALL, "ffn_dim": 512},
    ),
    "LTXVideoTransformer3DModel": Family(
        *_TIME, _ltx, _CAPTION, output=lambda y, x: y.mT.reshape(x.shape), axes=_ltx_axes, optional={"frame_rate": ()},
        pipelines=(Pipeline("LTXPipeline", 128, ("prompt_embeds", "prompt_mask", None, None), _UNGUIDED, frames=True,
                            plain=_PLAIN),),
        published={"ltx-video-2b": Configuration({}, (128, 21, 16, 22), 128)},
        small={**_SMALL, "cross_attention_dim": 128},
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        "time_embed.timestep_embedder", "time_embed.time_proj", _hunyuan,
        {"prompt_embeds": ("L", "text_embed_dim"), "prompt_mask": ("L",),
         "glyph_embeds": ("G", "text_embed_2_dim"), "glyph_mask": ("G",)},
        axes=_hunyuan_axes, off=("use_meanflow",),
        # its guidance is a part of the pipeline, no argument: pipeline.guider = ClassifierFreeGuidance(1.0)
        pipelines=(Pipeline("HunyuanVideo15Pipeline", 1000, ("prompt_embeds", "prompt_mask", "glyph_embeds",
                                                             "glyph_mask"), frames=True),),
        small={**_SMALL, "num_refiner_layers": 1, "task_type": "t2v"},
    ),
    "SanaVideoTransformer3DModel": Family(
        *_TIME, _sana, _CAPTION, axes=_patch_axes, off=("guidance_embeds",),
        pipelines=(Pipeline("SanaVideoPipeline", 300, ("prompt_embeds", "prompt_mask", None, None), _UNGUIDED,
                            own=("complex_human_instruction",), frames=True,
                            plain={**_PLAIN, "use_resolution_binning": False}),),
        published={"sana-video-2b": Configuration({"mlp_ratio": 3.0}, (16, 21, 60, 104), 300)},
        small={**_SMALL, "num_cross_attention_heads": 2, "cross_attention_dim": 224},
    ),
}  # fmt: skip
