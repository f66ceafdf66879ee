"""Videos and sound: what only some of their families have, and conditions and latents as their pipelines make them."""

import copy

import pytest
import tiny_videos
import torch
from test_velocity import given_cond, latents, model_of, net_of
from tiny_videos import HUNYUAN, LTX, STABLE, WAN

from tinytwinflow.backbones.velocity import Velocity

diffusers = pytest.importorskip("diffusers")
close = torch.testing.assert_close


def test_each_video_has_its_own_frames_a_second():
    """Rates of a batch are those of its rows one by one; without, it is the pipeline's default; they matter."""
    net, t = net_of(LTX), torch.tensor([0.9, 0.3])
    x, cond = latents(net, 2), given_cond(net, 2)
    with torch.no_grad():
        plain, y = net(x, t, t, cond), net(x, t, t, {**cond, "frame_rate": torch.tensor([24.0, 12.5])})
        assert torch.equal(net(x, t, t, {**cond, "frame_rate": torch.full((2,), 25.0)}), plain)
        for i, rate in enumerate((24, 12.5)):
            one = {name: value[i : i + 1] for name, value in cond.items()}
            close(y[i : i + 1], tiny_videos.ltx(model_of(LTX), x[i : i + 1], t[i : i + 1], one, rate))
    assert (y - plain).abs().amax((1, 2, 3, 4)).min() > 5e-4, "50 times the tolerance"
    with pytest.raises(ValueError, match=r"frame_rate must be floating-point of shape \(2,\), got torch.float32 of"):
        net(x, t, t, {**cond, "frame_rate": torch.full((1,), 25.0)})


def test_one_time_a_token_is_one_time_a_row():
    """How the pipeline calls Wan 2.2's model of 5B, whose tokens all have the time of their video."""
    net, t = net_of(WAN), torch.tensor([0.9, 0.3])
    x, cond = latents(net, 2), given_cond(net, 2)
    tokens = 1000 * t[:, None].expand(-1, 2 * 3 * 2)
    with torch.no_grad():
        y = model_of(WAN)(x, tokens, cond["prompt_embeds"], return_dict=False)[0]
    close(net(x, t, t, cond), y)


@pytest.mark.parametrize(
    "kind, config, message",
    [
        (WAN, {"in_channels": 9}, "makes 4 channels of 9: it is shown pictures too"),
        (WAN, {"image_dim": 8}, "image_dim=8 is another variant"),
        (WAN, {"added_kv_proj_dim": 24}, "added_kv_proj_dim=24 is another variant"),
        (HUNYUAN, {"task_type": "i2v"}, "with task_type='i2v' is shown a picture: not supported"),
        (HUNYUAN, {"use_meanflow": True}, "use_meanflow=True is another variant"),
        (HUNYUAN, {"in_channels": 15}, "makes 4 channels of 7: it is shown pictures too"),
        (tiny_videos.SANA, {"guidance_embeds": True}, "guidance_embeds=True is another variant"),
        (tiny_videos.SANA, {"out_channels": 8}, "makes 8 channels of 4: only a velocity is wanted"),
    ],
)
def test_variants_of_another_meaning_are_refused(kind, config, message):
    with pytest.raises(ValueError, match=message):
        Velocity(model_of(kind, **config))


def test_glyphs_and_the_duration_matter_and_masked_glyphs_do_not():
    net, t = net_of(HUNYUAN), torch.tensor([0.9, 0.3])
    x, cond = latents(net, 2), given_cond(net, 2)
    with torch.no_grad():
        y, other = net(x, t, t, cond), net(x, t, t, {**cond, "glyph_embeds": cond["glyph_embeds"] + torch.randn(10)})
    assert torch.equal(other[0], y[0]) and (other[1] - y[1]).abs().max() > 0.01
    net = net_of(STABLE)
    x, cond = latents(net, 2), given_cond(net, 2)
    with torch.no_grad():
        other = net(x, t, t, {**cond, "duration_embeds": -cond["duration_embeds"]})
        assert (other - net(x, t, t, cond)).abs().amax((1, 2)).min() > 0.1
        masks = cond["prompt_mask"].bool(), cond["prompt_mask"]
        assert torch.equal(*(net(x, t, t, {**cond, "prompt_mask": mask}) for mask in masks))


def test_the_experts_of_wan_are_a_velocity_each():
    """The pipeline's steps with two transformers are Euler's along one Velocity at times from boundary_ratio up, and
    along the other below."""
    torch.manual_seed(0)
    high, low = model_of(WAN), model_of(WAN)
    for parameter in low.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    pipeline = diffusers.WanPipeline(
        None, None, vae, diffusers.FlowMatchEulerDiscreteScheduler(), high, low, boundary_ratio=0.6
    )
    pipeline.set_progress_bar_config(disable=True)
    nets = [Velocity(copy.deepcopy(model)) for model in (high, low)]
    x = z = latents(nets[0], 1)
    text = given_cond(nets[0], 1)["prompt_embeds"]
    how = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "output_type": "latent"}
    found = pipeline(prompt_embeds=text, latents=z, num_inference_steps=4, **how).frames
    sigmas = pipeline.scheduler.sigmas
    assert (sigmas[:-1] >= 0.6).sum() not in (0, 4)
    with torch.no_grad():
        for t, r in zip(sigmas, sigmas[1:]):
            x = x - (t - r) * nets[int(t < 0.6)](x, t[None], t[None], {"prompt_embeds": text})
    close(found, x)
