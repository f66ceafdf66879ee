"""Editing: with a picture to edit beside the noise a network is the function that the editing pipelines compute."""

import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_painting import BLOCKS
from test_prompts import FLUX, QWEN, parts_of
from test_velocity import by_hand as without_picture
from test_velocity import given_cond, latents, model_of, net_of

from tinytwinflow import attach
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.prompts import encode_images, encode_text
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.method.samplers import sample

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close
PIPELINES = {
    "FluxTransformer2DModel": ("FluxKontextPipeline",),
    "QwenImageTransformer2DModel": ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
}
kinds = pytest.mark.parametrize("kind", PIPELINES)
pipelines = pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, names in PIPELINES.items() for name in names if hasattr(diffusers, name)]
)


def edited(net, n, height=4, width=10, seed=2):
    """Conditions with a picture to edit, which has another size than x."""
    source = torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return {**given_cond(net, n), "source": source}


def by_hand(model, x, t, c):
    """The velocity as the editing pipelines compute it: the picture's tokens after those of x, then cut off."""
    pipeline, (n, _, h, w), (_, _, h2, w2) = diffusers.QwenImageEditPipeline, x.shape, c["source"].shape
    tokens = torch.cat([pipeline._pack_latents(picture, *picture.shape) for picture in (x, c["source"])], dim=1)
    if type(model).__name__ == "FluxTransformer2DModel":
        ids = diffusers.FluxKontextPipeline._prepare_latent_image_ids
        at, at_source = ids(n, h // 2, w // 2, "cpu", x.dtype), ids(n, h2 // 2, w2 // 2, "cpu", x.dtype)
        at_source[..., 0] = 1
        more = {"img_ids": torch.cat([at, at_source]), "txt_ids": torch.zeros(c["prompt_embeds"].shape[1], 3)}
        more |= {"pooled_projections": c["pooled"], "guidance": c["guidance"]}
    else:
        shapes = [[(1, h // 2, w // 2), (1, h2 // 2, w2 // 2)]] * n
        more = {"img_shapes": shapes, "encoder_hidden_states_mask": c["prompt_mask"], "guidance": None}
    y = model(hidden_states=tokens, timestep=t, encoder_hidden_states=c["prompt_embeds"], **more, return_dict=False)[0]
    return pipeline._unpack_latents(y[:, : h * w // 4], 8 * h, 8 * w, 8)[:, :, 0]


@kinds
@settings(max_examples=6, deadline=None)
@given(t=st.lists(st.floats(0.001, 1), min_size=1, max_size=3), height=st.sampled_from([2, 8]))
def test_at_r_equal_to_t_it_is_the_pretrained_velocity_of_an_edit(kind, t, height):
    net, t = net_of(kind), torch.tensor(t)
    x, cond = latents(net, len(t)), edited(net, len(t), height)
    with torch.no_grad():
        v = net(x, t, t, cond)
        assert torch.equal(v, by_hand(model_of(kind), x, t, cond))
        other = {**cond, "source": cond["source"].flip(-1)}
        assert (net(x, t, t, other) - v).abs().max() > 1e-2, "the picture matters, and where in it something is"


def test_a_picture_may_be_at_time_0_whatever_the_time_of_the_noise():
    """As Qwen-Image-Edit 2511 has it: half of its embeddings are of the picture, and stay as they are."""
    net, t = Velocity(model_of("QwenImageTransformer2DModel", zero_cond_t=True)), torch.tensor([0.8, 0.3])
    for new in (net.r_embedder, net.twin_embedder):
        torch.nn.init.normal_(new.linear_2.weight)
    x, cond, seen = latents(net, 2), edited(net, 2), []
    words = given_cond(net, 2)
    with torch.no_grad():
        v = by_hand(net.model, x, t, cond)
        assert torch.equal(net(x, t, t, cond), v)
        assert not torch.allclose(by_hand(model_of("QwenImageTransformer2DModel"), x, t, cond), v, atol=1e-2)
        assert torch.equal(net(x, t, t, words), without_picture(net.model, x, t, words))
        net.model.time_text_embed.timestep_embedder.register_forward_hook(lambda *call: seen.append(call[2]))
        net(x, t, t, cond), net(x, -t, 0 * t, cond)
    assert torch.equal(seen[0][2:], seen[1][2:]) and not torch.isclose(seen[0][:2], seen[1][:2]).all(1).any()


@kinds
def test_rows_do_not_see_each_others_pictures(kind):
    net, t, r = net_of(kind), torch.tensor([0.9, -0.5, 0.3]), torch.tensor([0.0, -0.2, 0.3])
    x, cond = latents(net, 3), edited(net, 3)
    with torch.no_grad():
        y = net(x, t, r, cond)
        cond["source"][1] += 1
        changed = (net(x, t, r, cond) - y).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, False]


@kinds
def test_of_an_edit_the_picture_is_told_apart_from_the_noise(kind):
    """x and source of one size are no two of a kind: changed places, another velocity."""
    net, t = net_of(kind), torch.tensor([0.5])
    x, cond = latents(net, 1), edited(net, 1, 8, 6)
    with torch.no_grad():
        assert not torch.allclose(net(cond["source"], t, t, {**cond, "source": x}), net(x, t, t, cond), atol=1e-2)


@kinds
def test_pictures_of_another_shape_are_refused_in_one_line(kind):
    net, t = net_of(kind), torch.tensor([0.5, 0.7])
    x, cond = latents(net, 2), edited(net, 2)
    source = cond["source"]
    for wrong in (source[:, :3], source[:1], source[..., :5], source[:, :, :3], source[0], source.long()):
        with pytest.raises(ValueError, match=r"^source must be floating-point of shape \(2, 4, ") as error:
            net(x, t, t, {**cond, "source": wrong})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="and perhaps source, got"):
        net(x, t, t, {**cond, "picture": source})


@kinds
def test_gradients_come_from_an_edit_and_weights_may_be_of_another_precision(kind):
    net = Velocity(model_of(kind))
    x, cond, t = latents(net, 2), edited(net, 2), torch.tensor([0.9, 0.4])
    cond["source"].requires_grad_()
    net(x, t, 0 * t, cond).square().mean().backward()
    assert net.r_embedder.linear_2.weight.grad.any() and cond["source"].grad.any()
    with torch.no_grad():
        y = copy.deepcopy(net).bfloat16()(x, t, t, cond)
    assert y.dtype == torch.float32 and y.isfinite().all()


def parts_with_eyes(parts):
    """The parts of Qwen-Image's editing pipelines, whose text encoder sees: its tokenizer knows the signs for that."""
    tokenizer, signs = (
        parts["tokenizer"],
        [f"<|{n}|>" for n in ("image_pad", "video_pad", "vision_start", "vision_end")],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": signs})
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=4,
                  spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[0])  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=parts["text_encoder"].config.text_config.to_dict(), vision_config=vision,
        **dict(zip(names, tokenizer.convert_tokens_to_ids(signs))),
    )  # fmt: skip
    how = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**how, min_pixels=64, max_pixels=4096), tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**how),
    )  # fmt: skip
    return {**parts, "processor": processor, "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config)}


def pipeline_of(kind, name, folder):
    """A tiny editing pipeline with random weights, whose scheduler takes Euler's steps."""
    torch.manual_seed(0)
    base = FLUX if kind.startswith("Flux") else QWEN
    parts, _ = parts_of(base, folder / "tokenizer")
    parts = parts if base == FLUX else parts_with_eyes(parts)
    parts["transformer"] = getattr(diffusers, kind).from_config(BLOCKS[base])
    for part in parts.values():
        for at, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
            if p.ndim > 1 and "embed_tokens" not in at:
                torch.nn.init.normal_(p, std=0.25)
    return getattr(diffusers, name)(**parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})


@pipelines
def test_an_edit_is_that_of_the_pipeline(kind, name, tmp_path, monkeypatch):
    """From words and pixels to edited latents: what the text encoder is shown, the autoencoder's middle, its units,
    the order of the tokens, in two steps."""
    assert name in [pipeline.name for pipeline in FAMILIES[kind].pipelines]
    pipeline, words = pipeline_of(kind, name, tmp_path), "two black dogs"
    z, picture = torch.randn(1, 4, 12, 8), Image.effect_noise((24, 16), 90).convert("RGB")
    call = {"latents": pipeline._pack_latents(z, *z.shape), "height": 24, "width": 16, "sigmas": [1.0, 0.5]}
    call |= FAMILIES[kind].pipelines[0].plain
    if name == "FluxKontextPipeline":
        call |= {"max_area": 24 * 16, "_auto_resize": False, "max_sequence_length": 30}
    else:  # in place of a million pixels for the autoencoder
        sizes, module = {1024**2: (24, 16), 384**2: (16, 16)}, sys.modules[type(pipeline).__module__]
        more = (None,) if name == "QwenImageEditPipeline" else ()
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (*sizes[area], *more))
    pixels, net = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1, Velocity(pipeline.transformer)
    cond = encode_text(pipeline, [words], 30 if "guidance" in net.cond else 600, [picture])
    cond["source"] = encode_images(pixels, pipeline)
    with torch.no_grad():
        ours = sample(net, z, 2, "multi", cond=cond)
    answer = pipeline(picture, words, **call, num_inference_steps=2, output_type="latent").images
    close(ours, pipeline._unpack_latents(answer, 24, 16, 2).view_as(z), atol=2e-5, rtol=0)
    torch.nn.init.normal_(net.r_embedder.linear_2.weight)
    with torch.no_grad():
        ours = {steps: sample(net, z, steps, cond=cond) for steps in (1, 2, 4)}
    attach(pipeline, net)
    for steps, wanted in ours.items():
        how = {**call, "sigmas": None, "num_inference_steps": steps}
        answer = pipeline(picture, words, **how, output_type="latent")
        close(pipeline._unpack_latents(answer.images, 24, 16, 2).view_as(z), wanted, atol=5e-5, rtol=0)
    if name != "FluxKontextPipeline":
        many = encode_text(pipeline, [words, "snow"], 600, [picture.rotate(180), picture])
        assert (many["prompt_embeds"][0] - cond["prompt_embeds"][0]).abs().max() > 1e-3, "it sees"
        with pytest.raises(ValueError, match=f"^{name} reads a prompt together with the picture to edit: give one"):
            encode_text(pipeline, [words], 600)
        with pytest.raises(ValueError, match=r"^a prompt and its picture are \d+ tokens, and 60 were asked for$"):
            encode_text(pipeline, [words], 60, [picture])
