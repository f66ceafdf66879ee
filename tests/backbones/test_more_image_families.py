"""More families of pictures: prompts encoded and pictures painted as their pipelines do it, and experts that learn."""

import copy

import diffusers
import pytest
import torch
import transformers
from test_prompts import PROMPTS, clip, hidden, letters
from test_velocity import given_cond, latents, model_of
from tiny_more_images import COGVIEW4, HIDREAM, HUNYUAN, LUMINA2, TINY

from tinytwinflow import attach, sample
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.painting import length_of_prompts, paint
from tinytwinflow.backbones.prompts import decode_latents, encode_images, encode_text, load_pipeline
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import load_velocity

close = torch.testing.assert_close
kinds = pytest.mark.parametrize("kind", [LUMINA2, COGVIEW4, HIDREAM, HUNYUAN])
BLOCKS = {  # as tiny, but for the widths of the encoders below and places for their prompts
    LUMINA2: {**TINY[LUMINA2], "axes_lens": (256, 16, 16), "cap_feat_dim": 16, "sample_size": 16},
    COGVIEW4: {**TINY[COGVIEW4], "num_layers": 1, "text_embed_dim": 16},
    HIDREAM: {
        **TINY[HIDREAM], "caption_channels": [16, 16], "text_emb_dim": 16, "max_resolution": (16, 16),
        "llama_layers": [0, 1],
    },
    HUNYUAN: {**TINY[HUNYUAN], "text_embed_dim": 16, "text_embed_2_dim": 16},
}  # fmt: skip
TOKENS = {LUMINA2: 240, COGVIEW4: 16, HIDREAM: 30, HUNYUAN: 200}
WORDS = ["two black dogs", "'the' \"sea\""]  # of two lengths, both fill CogView's 16 once padded; in quotes are glyphs
SIZE = dict(
    vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def vae_of(kind):
    """An autoencoder of which a latent stands for as many pixels a side as the family's pipeline takes it to be."""
    if kind == HUNYUAN:
        return diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=64, scaling_factor=1.5,
        )  # fmt: skip
    depth, shift = (4, None) if kind == COGVIEW4 else (2, 0.25)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(8,) * depth, norm_num_groups=4, layers_per_block=1, latent_channels=4,
        scaling_factor=1.5, shift_factor=shift,
    )  # fmt: skip


def encoders_of(kind, folder):
    """Tokenizers and text encoders."""
    t5 = transformers.T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    if kind == LUMINA2:
        text = transformers.Gemma2Model(transformers.Gemma2Config(**SIZE, head_dim=8))
        return dict(tokenizer=letters(4096), text_encoder=text)
    if kind == COGVIEW4:
        tokenizer, config = letters(4096), transformers.GlmConfig(**SIZE, head_dim=8)
        tokenizer.padding_side = "left"
        return dict(tokenizer=tokenizer, text_encoder=transformers.GlmModel(config))
    if kind == HUNYUAN:
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=4)
        config = transformers.Qwen2_5_VLConfig(
            text_config={**SIZE, "num_hidden_layers": 3, "rope_scaling": rope}, vision_config=vision
        )
        text = transformers.Qwen2_5_VLForConditionalGeneration(config)
        both = dict(tokenizer_2=transformers.ByT5Tokenizer(), text_encoder_2=transformers.T5EncoderModel(t5))
        return dict(tokenizer=letters(1024), text_encoder=text, **both)
    (one, text), (two, text_2) = (clip(folder, transformers.CLIPTextModelWithProjection) for _ in range(2))
    llama, fourth = transformers.LlamaConfig(**SIZE, attn_implementation="eager"), letters(512)
    fourth.eos_token = "<pad>"
    return dict(
        tokenizer=one, text_encoder=text, tokenizer_2=two, text_encoder_2=text_2, tokenizer_3=letters(512),
        text_encoder_3=transformers.T5EncoderModel(t5), tokenizer_4=fourth,
        text_encoder_4=transformers.LlamaForCausalLM(llama),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> a whole tiny pipeline with random weights whose scheduler takes Euler's steps, and its folder."""
    home, found = tmp_path_factory.mktemp("more"), {}

    def pipeline(kind):
        if kind not in found:
            torch.manual_seed(0)
            parts = {"vae": vae_of(kind), **encoders_of(kind, home / "clip")}
            parts["transformer"] = getattr(diffusers, kind).from_config(BLOCKS[kind])
            for part in parts.values():
                for name, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
                    if p.ndim > 1 and "embed_tokens" not in name:
                        torch.nn.init.normal_(p, std=0.25)
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
            own = getattr(diffusers, FAMILIES[kind].pipelines[0].name)(**parts)
            own.save_pretrained(home / kind)
            found[kind] = own, home / kind
        return found[kind]

    return pipeline


def called(pipeline, z, steps, **how):
    """What a pipeline makes of the words, one after the other, without guidance."""
    kind, side = type(pipeline.transformer).__name__, 16 * pipeline.vae_scale_factor
    pipeline.default_sample_size = 16  # HiDream scales what is asked for to pictures of this many latents
    pipeline.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": steps, "height": side, "width": side, **FAMILIES[kind].pipelines[0].plain, **how}
    how |= {} if kind == HUNYUAN else {"max_sequence_length": TOKENS[kind]}
    return torch.cat([pipeline(words, latents=x[None], **how).images for words, x in zip(WORDS, z)])


@kinds
def test_pictures_are_the_pipelines_own(kind, made):
    """In mode multi r = t, where emb_r must not matter."""
    (pipeline, folder), z = made(kind), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    net, own = load_velocity(folder), load_pipeline(folder, dtype=torch.float32)
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter)
    cond = encode_text(own, WORDS, TOKENS[kind])
    with torch.no_grad():
        pictures = decode_latents(sample(net, z, 2, "multi", cond=cond), own)
        first, second = decode_latents(sample(net, z[:1].expand(2, -1, -1, -1), 2, "multi", cond=cond), own)
    grid = {"timesteps": [1000.0, 500.0]} if kind == COGVIEW4 else {}
    wanted = called(pipeline, z, 2, sigmas=[1.0, 0.5], output_type="pt", **grid)
    close(((pictures + 1) / 2).clamp(0, 1), wanted, atol=2e-5, rtol=0)
    assert wanted.std() > 0.05 and (first - second).abs().max() > 2e-3, "the prompt matters"


@kinds
def test_an_attached_pipeline_makes_what_the_sampler_makes(kind, made):
    (pipeline, folder), z = made(kind), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    net, cond = load_velocity(folder), encode_text(pipeline, WORDS, TOKENS[kind])
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain, pipeline = called(pipeline, z, 1, output_type="latent"), copy.deepcopy(pipeline)
    attach(pipeline, copy.deepcopy(net))
    for steps in (1, 2):
        with torch.no_grad():
            wanted = sample(net, z, steps, cond=cond)
        close(called(pipeline, z, steps, output_type="latent"), wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - plain).std() > 1e-2 * plain.std()


@kinds
def test_paint_calls_the_pipeline(kind, made):
    pipeline = copy.deepcopy(made(kind)[0])
    attach(pipeline, load_velocity(made(kind)[1]))
    pipeline.default_sample_size, side = 16, 16 * pipeline.vae_scale_factor
    how = {"height": side, "width": side, **length_of_prompts(pipeline, None if kind == HUNYUAN else TOKENS[kind])}
    pictures = paint(pipeline, dict(enumerate(WORDS)), [0, 1], **how)
    assert pictures.shape[:3] == (2, 2, 3)
    assert (pictures[0, 0].int() - pictures[0, 1].int()).abs().max() > 1
    if kind == HUNYUAN:
        with pytest.raises(ValueError, match="HunyuanImagePipeline makes prompts of 256 tokens, not of 7"):
            length_of_prompts(pipeline, 7)


@kinds
def test_conditions_fit_the_backbone_and_are_the_same_whoever_is_beside_a_prompt(kind, made):
    pipeline, folder = made(kind)
    own, net = load_pipeline(folder, dtype=torch.float32), load_velocity(folder)
    cond = encode_text(own, WORDS, TOKENS[kind])
    net.check(torch.zeros(2, 4, 16, 16), cond)
    for i, words in enumerate(WORDS):
        for name, value in encode_text(own, [words], TOKENS[kind]).items():
            close(value[0], cond[name][i], atol=1e-5, rtol=1e-4)
    assert cond["prompt_embeds"].shape[1] == TOKENS[kind]
    assert (cond["prompt_embeds"][0] - cond["prompt_embeds"][1]).abs().max() > 1e-3


def test_lumina_is_told_how_to_paint_before_the_prompt(made):
    own = load_pipeline(made(LUMINA2)[1], dtype=torch.float32)
    cond = encode_text(own, PROMPTS[:1], 240)
    wanted, _ = hidden(own.tokenizer, own.text_encoder, own.system_prompt + " <Prompt Start> " + PROMPTS[0], -2)
    close(cond["prompt_embeds"][0][cond["prompt_mask"][0]], wanted, atol=1e-5, rtol=1e-4)
    assert not encode_text(own, [""], 240)["prompt_mask"].any(), "none of it, and these tokens have no beginning"


def test_cogview_pads_before_the_prompt_to_multiples_of_16(made):
    own = load_pipeline(made(COGVIEW4)[1], dtype=torch.float32)
    tokens = torch.tensor([[0] * 27 + own.tokenizer("a cat").input_ids])
    with torch.no_grad():
        wanted = own.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    close(encode_text(own, ["a cat"], 32)["prompt_embeds"], wanted)
    with pytest.raises(ValueError, match="^CogView4Pipeline makes lengths that are multiples of 16, got 20 tokens$"):
        encode_text(own, ["a cat"], 20)


def test_hidream_reads_a_prompt_four_times(made):
    own = load_pipeline(made(HIDREAM)[1], dtype=torch.float32)
    cond = encode_text(own, PROMPTS[:1], 30)
    _, t5 = hidden(own.tokenizer_3, own.text_encoder_3, PROMPTS[0], tokens=30)
    _, llama = hidden(own.tokenizer_4, own.text_encoder_4, PROMPTS[0], tokens=30)
    both = [hidden(tokenizer, encoder, PROMPTS[0], tokens=30, masked=False)[1].text_embeds for tokenizer, encoder in (
        (own.tokenizer, own.text_encoder), (own.tokenizer_2, own.text_encoder_2))]  # fmt: skip
    close(cond["prompt_embeds"], t5.last_hidden_state)
    close(cond["llama_embeds"], torch.stack(llama.hidden_states[1:], dim=1))
    close(cond["pooled"], torch.cat(both, dim=1))


def test_hunyuan_reads_what_is_in_quotes_letter_by_letter(made):
    own = load_pipeline(made(HUNYUAN)[1], dtype=torch.float32)
    cond = encode_text(own, ["no glyphs", "'the' \"sea\""], 200)
    assert cond["glyph_mask"].shape == (2, 128) and not cond["glyph_mask"][0].any()
    wanted, _ = hidden(own.tokenizer_2, own.text_encoder_2, 'Text "the". Text "sea". ')
    close(cond["glyph_embeds"][1][cond["glyph_mask"][1]], wanted, atol=1e-5, rtol=1e-4)
    wanted, _ = hidden(own.tokenizer, own.text_encoder, own.prompt_template_encode.format("no glyphs"), -3)
    close(cond["prompt_embeds"][0][cond["prompt_mask"][0]], wanted[34:], atol=1e-5, rtol=1e-4)
    with pytest.warns(UserWarning, match="'no glyphs' fills all 20 tokens: what is beyond is cut"):
        encode_text(own, ["no glyphs"], 20)


@kinds
def test_latents_are_scaled_as_the_pipeline_scales_them(kind, made):
    """Decoding is held by the pictures; encoding gives the latent that the autoencoder itself makes, scaled back."""
    own = load_pipeline(made(kind)[1], dtype=torch.float32)
    x, shift = torch.rand(2, 3, 32, 32) * 2 - 1, own.vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        wanted = (own.vae.encode(x).latent_dist.mode() - shift) * 1.5
    close(encode_images(x, own), wanted)


@pytest.mark.parametrize("size", [(8, 6), (6, 6)])
def test_the_experts_of_hidream_learn_whatever_mode_it_is_in(size):
    """The gradient is the slope of what is computed, though diffusers cuts experts off where it does not train."""
    torch.manual_seed(0)
    net = Velocity(model_of(HIDREAM)).double()
    x, t, cond = latents(net, 2)[:, :, : size[0], : size[1]].double(), torch.tensor([0.7, 0.4]), given_cond(net, 2)
    weights = [p for name, p in net.named_parameters() if "ff_i" in name]
    directions = [torch.randn_like(p) for p in weights]

    def answer(step):
        with torch.no_grad():
            for p, way in zip(weights, directions):
                p.add_(way, alpha=step)
            y = net(x, t, 0 * t, cond).sum()
            for p, way in zip(weights, directions):
                p.add_(way, alpha=-step)
        return y

    slope = (answer(1e-6) - answer(-1e-6)) / 2e-6
    for mode in (False, True):
        net.train(mode).zero_grad()
        y = net(x, t, 0 * t, cond)
        y.sum().backward()
        assert y.shape == x.shape and not net.model.training
        close(sum((p.grad * way).sum() for p, way in zip(weights, directions)), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind, config, message",
    [
        (HUNYUAN, {"use_meanflow": True}, "use_meanflow=True is another variant"),
        (HUNYUAN, {"guidance_embeds": True}, "guidance_embeds=True is another variant"),
        (HUNYUAN, {"in_channels": 8}, "makes 4 channels of 8: it is shown pictures too"),
        (COGVIEW4, {"in_channels": 8}, "makes 4 channels of 8: it is shown pictures too"),
    ],
)
def test_variants_of_another_meaning_are_refused(kind, config, message):
    """A second time of its own, the guidance that comes with it; a refiner; control by a picture."""
    with pytest.raises(ValueError, match=message):
        Velocity(model_of(kind, **config))
