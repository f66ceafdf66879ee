"""Videos and sound: what only some of their families have, and conditions and latents as their pipelines make them."""

import copy
from functools import cache

import pytest
import tiny_videos
import torch
from test_prompts import PROMPTS, letters
from test_velocity import given_cond, latents, model_of, net_of
from tiny_videos import HUNYUAN, LTX, SANA, STABLE, WAN

from tinytwinflow import attach, sample
from tinytwinflow.backbones import lora_files, states, video_families
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.painting import length_of_prompts
from tinytwinflow.backbones.prompts import encode_text, load_pipeline, picture_unit
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import load_velocity

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close
kinds = pytest.mark.parametrize("kind", [kind for kind in tiny_videos.TINY if hasattr(diffusers, kind)])
TOKENS = {WAN: 30, LTX: 30, HUNYUAN: 1000, SANA: 30, STABLE: 256}
TEXT = dict(
    vocab_size=128, hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=8192, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
T5 = dict(vocab_size=128, d_model=12, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
WAN_VAE = dict(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])


def parts_of(kind):
    """The parts of a tiny pipeline but for its backbone and scheduler; of autoencoders only sizes are asked here."""
    if kind == WAN:
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))
        return dict(vae=diffusers.AutoencoderKLWan(**WAN_VAE), tokenizer=letters(512), text_encoder=text)
    if kind == LTX:
        four, five = (8,) * 4, (1,) * 5
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=five,
            decoder_layers_per_block=five,
        )  # fmt: skip
        text = transformers.T5EncoderModel(transformers.T5Config(**T5))
        return dict(vae=vae, tokenizer=letters(512), text_encoder=text)
    if kind == HUNYUAN:
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        )  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = transformers.Qwen2_5_VLTextConfig(**{**TEXT, "hidden_size": 16}, rope_scaling=rope)
        return dict(
            vae=vae, tokenizer=letters(2048), text_encoder=transformers.Qwen2_5_VLTextModel(config),
            tokenizer_2=transformers.ByT5Tokenizer(), guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
            text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(**{**T5, "vocab_size": 400})),
        )  # fmt: skip
    if kind == SANA:
        text = transformers.Gemma2Model(transformers.Gemma2Config(**TEXT))
        return dict(vae=diffusers.AutoencoderKLWan(**WAN_VAE), tokenizer=letters(8192), text_encoder=text)
    vae = diffusers.AutoencoderSAME(
        patch_size=4, encoder_channels=8, encoder_c_mults=[1], encoder_strides=[2], encoder_transformer_depths=[1],
        latent_dim=4, dim_heads=4,
    )  # fmt: skip
    text = transformers.T5GemmaModuleConfig(**TEXT)
    config = transformers.T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)
    return dict(
        vae=vae, tokenizer=letters(256), text_encoder=transformers.T5GemmaEncoderModel(config),
        duration_embedder=diffusers.StableAudio3DurationEmbedder(output_dim=12),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: kind of a transformer -> a whole tiny pipeline with random weights, and the folder of its copy."""

    @cache
    def make(kind):
        torch.manual_seed(0)
        about = FAMILIES[kind].pipelines[0]
        wide = {"text_embed_dim": 16, "text_embed_2_dim": 12} if kind == HUNYUAN else {}
        parts = {**parts_of(kind), "transformer": model_of(kind, **wide)}
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(1 if kind == STABLE else 1000)
        for part in parts.values():
            for name, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
                if p.ndim > 1 and "embed_tokens" not in name:
                    torch.nn.init.normal_(p, std=0.25)
        pipeline, folder = getattr(diffusers, about.name)(**parts), tmp_path_factory.mktemp(kind)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder)
        return pipeline, folder

    return make


def called(pipeline, z, steps):
    """The latents that a pipeline makes of noise without guidance."""
    kind = type(pipeline.transformer).__name__
    about = FAMILIES[kind].pipelines[0]
    how = {"num_inference_steps": steps, "output_type": "latent", **about.plain}
    if kind == STABLE:
        return pipeline(WORDS, latents=z, **how).audios
    how |= {"frames" if kind == SANA else "num_frames": 17, "height": 64, "width": 128}
    how |= {} if kind == HUNYUAN else {"max_sequence_length": TOKENS[kind]}
    if kind == LTX:
        found = pipeline(WORDS, latents=pipeline._pack_latents(z), **how).frames
        return pipeline._unpack_latents(found, *z.shape[2:])
    return pipeline(WORDS, latents=z, **how).frames


WORDS = ['a sign that says "stop"', *PROMPTS[1:3]]


@kinds
def test_conditions_and_latents_are_those_of_the_pipeline(kind, made):
    """One row or several; Euler's steps along the Velocity of the folder, from the same noise, end where its do."""
    pipeline, folder = made(kind)
    if kind == HUNYUAN:
        assert video_families.PICTURE_WORDS == pipeline.vision_num_semantic_tokens
    net, own, tokens = load_velocity(folder), load_pipeline(folder, dtype=torch.float32), TOKENS[kind]
    cond = encode_text(own, WORDS, tokens)
    assert cond.keys() == net.cond.keys() and cond["prompt_embeds"].shape[:2] == (3, tokens)
    for name, value in encode_text(own, WORDS[2:], tokens).items():
        close(value[0], cond[name][2], atol=1e-5, rtol=1e-4)
    x = z = latents(net, 3)
    found = called(pipeline, z, 3)
    with torch.no_grad():
        for t, r in zip(pipeline.scheduler.sigmas, pipeline.scheduler.sigmas[1:]):
            x = x - (t - r) * net(x, t.expand(3), t.expand(3), cond)
        close(found, x, atol=2e-4, rtol=1e-4)
        turned = {name: value.roll(1, 0) for name, value in cond.items() if name != "duration_embeds"}
        one = torch.ones(3)
        apart = net(z, one, one, cond) - net(z, one, one, {**cond, **turned})
    assert apart.abs().max() > 0.01, "the prompt matters"


@kinds
def test_an_attached_pipeline_makes_what_the_sampler_makes(kind, made):
    pipeline = copy.deepcopy(made(kind)[0])
    net = Velocity(copy.deepcopy(pipeline.transformer))
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z, cond = latents(net, 3), encode_text(pipeline, WORDS, TOKENS[kind])
    plain = called(pipeline, z, 1)
    attach(pipeline, copy.deepcopy(net))
    for steps in (1,) if kind == STABLE else (1, 2, 4):  # Stable Audio proposes a grid of its own
        with torch.no_grad():
            wanted = sample(net, z, steps, "any", cond=cond)
        found = called(pipeline, z, steps)
        close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
        assert (found - plain).std() > 0.01 * plain.std()


@kinds
def test_images_are_not_embedded_for_what_makes_none(kind, made):
    with pytest.raises(ValueError, match=f"{FAMILIES[kind].pipelines[0].name} makes no pictures$"):
        picture_unit(made(kind)[1])
    with pytest.raises(ValueError, match="makes no pictures of prompts alone"):
        length_of_prompts(made(kind)[0])


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


def test_sizes_that_the_patches_do_not_divide_are_refused():
    net, t = net_of(WAN), torch.ones(1)
    for shape in ((1, 4, 2, 5, 4), (1, 4, 2, 6, 3)):
        with pytest.raises(ValueError, match=r"takes floats \(B, 4, T, H, W\) with multiples in H of 2, W of 2$"):
            net(torch.zeros(shape), t, t, given_cond(net, 1))
    assert net(torch.zeros(1, 4, 1, 2, 2), t, t, given_cond(net, 1)).shape == (1, 4, 1, 2, 2)


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
        (SANA, {"guidance_embeds": True}, "guidance_embeds=True is another variant"),
        (SANA, {"out_channels": 8}, "makes 8 channels of 4: only a velocity is wanted"),
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
    along the other below; attached, each is shown the second time and they jump."""
    torch.manual_seed(0)
    nets = [Velocity(model_of(WAN)) for _ in range(2)]
    for parameter in (*nets[1].model.parameters(), *nets[0].r_embedder.parameters(), *nets[1].r_embedder.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    plain = [model_of(WAN) for _ in nets]
    plain[1].load_state_dict(nets[1].model.state_dict())
    parts = (None, None, diffusers.AutoencoderKLWan(**WAN_VAE), diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline = diffusers.WanPipeline(*parts, *plain, boundary_ratio=0.6)
    pipeline.set_progress_bar_config(disable=True)
    z, text = latents(nets[0], 1), {"prompt_embeds": given_cond(nets[0], 1)["prompt_embeds"]}
    how = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "output_type": "latent"}

    def same_as_ours(jump):
        found, x = pipeline(**text, latents=z, num_inference_steps=4, **how).frames, z
        sigmas = pipeline.scheduler.sigmas.float()
        assert (sigmas[:-1] >= 0.6).sum() not in (0, 4)
        with torch.no_grad():
            for t, r in zip(sigmas, sigmas[1:]):
                x = x - (t - r) * nets[int(t < 0.6)](x, t[None], (r if jump else t)[None], text)
        close(found, x, atol=1e-4, rtol=1e-4)
        return found

    followed = same_as_ours(jump=False)
    for part, net in zip(("transformer", "transformer_2"), nets):
        attach(pipeline, copy.deepcopy(net), part=part)
    assert (same_as_ours(jump=True) - followed).std() > 0.01


def test_adapters_for_what_diffusers_puts_none_on_are_refused(made, tmp_path):
    pipeline = made(STABLE)[0]
    net = Velocity(copy.deepcopy(pipeline.transformer))
    states.adapt(net, 2)
    lora_files.write_adapters(lora_files.adapter_file(net), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="diffusers puts no adapters on a StableAudio3DiTModel: attach a whole model"):
        attach(pipeline, tmp_path / "a.safetensors")


def test_what_a_model_keeps_in_float32_stays_so(made):
    """Wan's MLP of the time and its tables, also when a Velocity in float32 comes into a pipeline in bfloat16."""
    pipeline = copy.deepcopy(made(WAN)[0])
    net = Velocity(copy.deepcopy(pipeline.transformer))
    pipeline.transformer.to(torch.bfloat16)
    attach(pipeline, net)
    kinds = {name: p.dtype for name, p in pipeline.transformer.named_parameters()}
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == kinds["scale_shift_table"] == torch.float32
    assert kinds["blocks.0.ffn.net.2.weight"] == torch.bfloat16
