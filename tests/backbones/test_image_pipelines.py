"""Pipelines of Flux.2, Chroma, AuraFlow, LongCat-Image and Ovis-Image: conditions and pictures are the pipelines' own.

As those of test_prompts and test_painting they are real, tiny and random, and their tokenizers know letters only.
"""

import copy
from functools import cache

import pytest
import tiny_images
import torch
from test_prompts import PROMPTS, letters

from tinytwinflow import attach, sample
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.painting import length_of_prompts, paint
from tinytwinflow.backbones.prompts import (
    decode_latents,
    encode_images,
    encode_text,
    load_decoder,
    load_pipeline,
    picture_unit,
    pixels_of_latent,
)
from tinytwinflow.backbones.velocity_files import load_velocity

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close
FLUX2, KLEIN, CHROMA, AURA, LONGCAT, OVIS = (
    f"{name}Pipeline" for name in ("Flux2", "Flux2Klein", "Chroma", "AuraFlow", "LongCatImage", "OvisImage")
)
ABOUT = {about.name: (kind, about) for kind, family in FAMILIES.items() for about in family.pipelines}
TOKENS = {FLUX2: 350, KLEIN: 30, CHROMA: 30, AURA: 30, LONGCAT: 512, OVIS: 170}  # with what stands before the prompt
kinds = pytest.mark.parametrize("kind", [kind for kind in TOKENS if hasattr(diffusers, kind)])
TEXT = dict(
    vocab_size=128, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
    norm_num_groups=4, layers_per_block=1, latent_channels=4,
)  # fmt: skip
T5 = dict(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def flux2(text_encoder):
    vae = diffusers.AutoencoderKLFlux2(**VAE)
    vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2.0)
    return dict(vae=vae, tokenizer=letters(512), text_encoder=text_encoder)


def mistral():
    """Layers 10, 20 and 30 are what the pipeline takes."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, num_hidden_layers=31),
        vision_config=transformers.PixtralVisionConfig(**vision),
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen_vl():
    text = {**TEXT, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=4)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def parts_of(kind):
    """The parts of a tiny pipeline but for its backbone."""
    if kind == FLUX2:
        return flux2(mistral())
    if kind == KLEIN:
        return flux2(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, num_hidden_layers=28)))
    units = {"scaling_factor": 1.5, "shift_factor": None if kind == AURA else 0.25}
    parts = dict(vae=diffusers.AutoencoderKL(**VAE, **units), tokenizer=letters(1024))
    if kind == CHROMA:
        return {**parts, "text_encoder": transformers.T5EncoderModel(transformers.T5Config(**T5))}
    if kind == AURA:
        parts["tokenizer"].model_input_names = ["input_ids", "attention_mask"]
        return {**parts, "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))}
    if kind == LONGCAT:
        return {**parts, "text_encoder": qwen_vl(), "text_processor": None}
    return {**parts, "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**TEXT, num_hidden_layers=2))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: kind -> a whole tiny pipeline with random weights, and the folder where it is saved."""

    @cache
    def make(kind):
        torch.manual_seed(0)
        backbone, _ = ABOUT[kind]
        wide = {"joint_attention_dim": 48, "in_channels": 16} if kind in (FLUX2, KLEIN) else {"joint_attention_dim": 16}
        wide |= {"guidance_embeds": False} if kind == KLEIN else {}
        model = getattr(diffusers, backbone).from_config({**tiny_images.TINY[backbone], **wide})
        parts = {**parts_of(kind), "transformer": model, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
        for part in parts.values():
            for name, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
                if p.ndim > 1 and "embed_tokens" not in name:
                    torch.nn.init.normal_(p, std=0.25)
        pipeline, folder = getattr(diffusers, kind)(**parts), tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folder)
        return pipeline, folder

    return make


@pytest.fixture(scope="module")
def loaded(made):
    return cache(lambda kind: load_pipeline(made(kind)[1], dtype=torch.float32))


@kinds
def test_conditions_have_the_names_and_rows_that_the_backbones_take(kind, loaded):
    """The same rows whoever is beside them, another prompt, another row; of no second prompt, for guidance."""
    pipeline, tokens, calls = loaded(kind), TOKENS[kind], []
    hook = pipeline.text_encoder.register_forward_hook(lambda *arguments: calls.append(1))
    cond = encode_text(pipeline, PROMPTS[:3], tokens)
    hook.remove()
    assert len(calls) == 1
    names = {*FAMILIES[ABOUT[kind][0]].cond, *(["guidance"] if kind == FLUX2 else [])}
    assert cond.keys() == names and cond["prompt_embeds"].shape[:2] == (3, tokens)
    for i in range(3):
        for name, value in encode_text(pipeline, PROMPTS[i : i + 1], tokens).items():
            close(value[0], cond[name][i], atol=1e-5, rtol=1e-4)
    assert (cond["prompt_embeds"][0] - cond["prompt_embeds"][1]).abs().max() > 1e-3
    if kind == CHROMA:
        filled = torch.tensor([len(prompt) + 1 for prompt in PROMPTS[:3]])  # one token of padding is seen
        assert torch.equal(cond["prompt_mask"], torch.arange(tokens) < filled[:, None])
    if kind == FLUX2:
        assert torch.equal(cond["guidance"], torch.full((3,), 4.0))


@pytest.mark.skipif(not hasattr(diffusers, LONGCAT), reason=f"this diffusers has no {LONGCAT}")
def test_a_length_that_the_pipeline_does_not_take_is_refused(loaded):
    with pytest.raises(ValueError, match=f"^{LONGCAT} makes prompts of 512 tokens, not of 30$"):
        encode_text(loaded(LONGCAT), ["a cat"], 30)


@kinds
def test_the_autoencoder_alone_decodes_and_says_what_sides_are_multiples_of(kind, made, loaded):
    """All of these halve the sides, and two by two pixels of a latent are a token."""
    x = torch.randn(1, 16 if kind in (FLUX2, KLEIN) else 4, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_latents(x, load_decoder(made(kind)[1])), decode_latents(x, loaded(kind)))
    assert picture_unit(made(kind)[1]) == 4
    assert pixels_of_latent(loaded(kind)) == (4 if kind in (FLUX2, KLEIN) else 2), (
        "of Flux.2 a latent is a patch of four"
    )


@kinds
def test_latents_are_scaled_as_the_pipeline_scales_them(kind, loaded):
    """Encoding as the pipelines do for a picture to edit or, where they have none, the inverse of what they decode."""
    pipeline = loaded(kind)
    vae, x = pipeline.vae, torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        if kind in (FLUX2, KLEIN):
            wanted = pipeline._encode_vae_image(x, None)
        else:
            wanted = (vae.encode(x).latent_dist.mode() - (vae.config.shift_factor or 0)) * 1.5
    latent = encode_images(x, pipeline)
    close(latent, wanted)
    close(decode_latents(latent, pipeline), vae.decode(vae.encode(x).latent_dist.mode()).sample.detach())


def pictures(pipeline, z, tokens, steps, **how):
    """What a pipeline makes of two prompts, one by one.  -> (2, 3, H, W) in [0, 1]"""
    kind, size = type(pipeline).__name__, [side * (4 if z.shape[1] == 16 else 2) for side in z.shape[2:]]
    how |= {"max_sequence_length": tokens} if kind != LONGCAT else {}
    how |= {"num_inference_steps": steps, "output_type": "pt", "height": size[0], "width": size[1]}
    z = z if kind in (FLUX2, KLEIN, AURA) else pipeline._pack_latents(z, *z.shape)
    both = zip(PROMPTS[1:3], z.split(1))
    return torch.cat([pipeline(prompt=p, latents=noise, **how, **ABOUT[kind][1].plain).images for p, noise in both])


@pytest.fixture
def ready(made, loaded):
    """A function: kind -> the pipeline, a network of its backbone with an embedder of r, conditions and noise."""

    def make(kind):
        (pipeline, folder), shape = made(kind), (16, 4, 8) if "Flux2" in kind else (4, 8, 16)
        net, z = load_velocity(folder), torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
        for parameter in net.r_embedder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return copy.deepcopy(pipeline), net, encode_text(loaded(kind), PROMPTS[1:3], TOKENS[kind]), z

    return make


def sampled(net, own, z, cond, steps, mode):
    with torch.no_grad():
        return ((decode_latents(sample(net, z, steps=steps, mode=mode, cond=cond), own) + 1) / 2).clamp(0, 1)


@kinds
def test_a_painted_picture_is_the_pipelines_own(kind, ready, loaded):
    """In mode multi, r = t, the same noise becomes the very picture that diffusers makes of it."""
    pipeline, net, cond, z = ready(kind)
    wanted = pictures(pipeline, z, TOKENS[kind], 2, sigmas=[1.0, 0.5])
    close(sampled(net, loaded(kind), z, cond, 2, "multi"), wanted, atol=2e-5, rtol=0)
    first, second = sampled(net, loaded(kind), z[:1].expand_as(z), cond, 2, "multi")
    assert wanted.std() > 0.05 and (first - second).abs().max() > 1e-3, "the prompt matters, 50 times the tolerance"


@kinds
def test_an_attached_pipeline_makes_what_the_sampler_makes(kind, ready, loaded):
    pipeline, net, cond, z = ready(kind)
    wanted = [sampled(net, loaded(kind), z, cond, steps, "any") for steps in (1, 2)]
    attach(pipeline, net)
    for steps, picture in enumerate(wanted, 1):
        close(pictures(pipeline, z, TOKENS[kind], steps), picture, atol=2e-5, rtol=0)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


# the pipeline of LongCat draws noise of 16 channels, whatever its model has
@pytest.mark.parametrize("kind", [kind for kind in TOKENS if kind != LONGCAT])
def test_paint_calls_the_pipeline_for_prompts_at_once(kind, ready):
    """What a prompt becomes among others, and with other numbers beside its own, is what it becomes alone."""
    pipeline, net, _, z = ready(kind)
    attach(pipeline, net)
    side = 4 * 4 * (2 if kind in (FLUX2, KLEIN) else 1)
    how = {"height": side, "width": side, **length_of_prompts(pipeline, TOKENS[kind])}
    many = paint(pipeline, dict(enumerate(PROMPTS[1:3])), [0, 2], **how)
    assert many.shape == (2, 2, 3, side, side)
    one = paint(pipeline, {1: PROMPTS[2]}, [2], **how)
    assert (many[1, 1].int() - one[0, 0].int()).abs().max() <= 1 < (many[1, 0].int() - one[0, 0].int()).abs().max()
