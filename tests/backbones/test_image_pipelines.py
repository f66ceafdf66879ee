"""Pipelines of Flux.2, Chroma, AuraFlow, LongCat-Image and Ovis-Image: conditions and pictures are the pipelines' own.

As those of test_prompts and test_painting they are real, tiny and random, and their tokenizers know letters only.
"""

from functools import cache

import pytest
import tiny_images
import torch
from test_prompts import PROMPTS, letters

from tinytwinflow import sample
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.prompts import decode_latents, encode_images, encode_text, load_pipeline
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


@kinds
def test_a_painted_picture_is_the_pipelines_own(kind, made, loaded):
    """In mode multi, r = t, the same noise becomes the very picture that diffusers makes of it."""
    (pipeline, folder), own, (_, about) = made(kind), loaded(kind), ABOUT[kind]
    net, prompts, tokens = load_velocity(folder), ["two black dogs", "the sea"], TOKENS[kind]
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter)
    shape = (16, 4, 8) if kind in (FLUX2, KLEIN) else (4, 8, 16)
    cond, z = encode_text(own, prompts, tokens), torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        pictures = decode_latents(sample(net, z, steps=2, mode="multi", cond=cond), own)
        first, second = decode_latents(sample(net, z[:1].expand_as(z), steps=2, mode="multi", cond=cond), own)
    how = {"sigmas": [1.0, 0.5], "num_inference_steps": 2, "output_type": "pt", **about.plain}
    how |= {"max_sequence_length": tokens} if kind != LONGCAT else {}
    how |= dict(zip(("height", "width"), pictures.shape[2:]))
    z = z if kind in (FLUX2, KLEIN, AURA) else pipeline._pack_latents(z, 2, *shape)
    wanted = torch.cat([pipeline(prompt=prompts[i], latents=z[i : i + 1], **how).images for i in range(2)])
    close(((pictures + 1) / 2).clamp(0, 1), wanted, atol=2e-5, rtol=0)
    assert wanted.std() > 0.05 and (first - second).abs().max() > 2e-3, "the prompt matters, 100 times the tolerance"
