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
from test_velocity import given_cond, latents, model_of, net_of

from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.prompts import encode_images
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.method.samplers import sample

diffusers = pytest.importorskip("diffusers")
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


@pipelines
def test_two_steps_are_those_of_the_pipeline(kind, name, tmp_path, monkeypatch):
    """From a picture of pixels to edited latents: its autoencoder's middle, the units, the order of tokens."""
    assert name in [pipeline.name for pipeline in FAMILIES[kind].pipelines]
    torch.manual_seed(0)
    base = FLUX if kind.startswith("Flux") else QWEN
    parts, _ = parts_of(base, tmp_path / "tokenizer")
    parts = {key: part for key, part in parts.items() if key in ("vae", "tokenizer", "text_encoder")}
    model = getattr(diffusers, kind).from_config(BLOCKS[base]).eval()
    for p in [*model.parameters(), *parts["vae"].parameters()]:
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.25)
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    if base == FLUX:
        pipeline = diffusers.FluxKontextPipeline(**parts, transformer=model, text_encoder_2=None, tokenizer_2=None)
    else:
        pipeline = getattr(diffusers, name)(**parts, transformer=model, processor=None)
        module = sys.modules[type(pipeline).__module__]
        size = (24, 16, None) if name == "QwenImageEditPipeline" else (24, 16)
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: size)
    net = Velocity(model)
    cond = {
        key: torch.randn(1, *(5 if axis == "L" else model.config[axis] for axis in axes))
        for key, axes in FAMILIES[kind].cond.items() if not key.endswith("mask")
    }  # fmt: skip
    z, picture = torch.randn(1, 4, 12, 8), Image.effect_noise((24, 16), 90).convert("RGB")
    call = {"image": picture, "latents": pipeline._pack_latents(z, *z.shape), "height": 24, "width": 16}
    call |= {"prompt_embeds": cond["prompt_embeds"], "sigmas": [1.0, 0.5], "num_inference_steps": 2}
    if base == FLUX:
        call |= {"pooled_prompt_embeds": cond["pooled"], "max_area": 24 * 16, "_auto_resize": False}
        cond["guidance"] = torch.tensor([3.5])
    else:
        cond["prompt_mask"] = torch.ones(1, 5, dtype=torch.bool)
        call |= {"prompt_embeds_mask": cond["prompt_mask"], "true_cfg_scale": 1.0}
    wanted = pipeline._unpack_latents(pipeline(**call, output_type="latent").images, 24, 16, 2).view_as(z)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        cond["source"] = encode_images(pixels, pipeline)
        close(sample(net, z, 2, "multi", cond=cond), wanted, atol=2e-5, rtol=0)
