"""Prompts and texts: what is written is what the pipelines' own encoders say, each row is read once an epoch whoever
reads it, and pictures lie where the scripts of two benchmarks look.

All five pipelines are real, tiny and random, made and saved by the test; their tokenizers know letters only.
"""

import inspect
import json
import os
import shutil
import string
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinytwinflow.backbones.captions import Pairs, read_prompts
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.prompts import decode_latents, encode_images, encode_text, load_pipeline
from tinytwinflow.backbones.texts import Texts, embed
from tinytwinflow.data import batches
from tinytwinflow.data.readers import to_unit

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
close = torch.testing.assert_close
BACKBONES = {family.pipelines[0].name: kind for kind, family in FAMILIES.items() if family.pipelines}
SD3, SANA, FLUX, QWEN, Z_IMAGE = list(BACKBONES)[:5]
TOKENS = {SD3: 5, SANA: 30, FLUX: 30, QWEN: 300, Z_IMAGE: 30}
PROMPTS = ["a cat", "two black dogs", "the sea, at night", "a red cube on a blue one", "snow", "7 owls", "x"]
kinds = pytest.mark.parametrize("kind", [kind for kind in TOKENS if hasattr(diffusers, kind)])


def picture_of(path):
    """A picture in a file, which is closed again."""
    with Image.open(path) as image:
        return image.copy()


def letters(length):
    """A tokenizer of single characters, padded on the right."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", *string.printable]
    one = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    one.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=one, pad_token="<pad>", unk_token="<unk>", padding_side="right", model_max_length=length,
        chat_template="{% for m in messages %}<{{ m['content'] }}>{% endfor %}",
    )  # fmt: skip


def clip(folder, kind):
    """A CLIP tokenizer that merges nothing, from files in its true format, and a tiny text encoder."""
    signs = string.ascii_letters + string.digits + string.punctuation
    words = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77), kind(config)


def parts_of(kind, folder):
    """The parts of a tiny pipeline, and what its backbone's settings say."""
    size = dict(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    flow = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    if kind == SANA:
        vae = diffusers.AutoencoderDC(
            latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            scaling_factor=0.4, decoder_norm_types="rms_norm", decoder_act_fns="silu",
        )  # fmt: skip
        text = transformers.Gemma2Model(transformers.Gemma2Config(**size, head_dim=8))
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        return dict(vae=vae, scheduler=scheduler, tokenizer=letters(4096), text_encoder=text), {}
    if kind == QWEN:
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 1.2, 0.8, 2.0],
        )  # fmt: skip
        text = {**size, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=4)
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        return dict(vae=vae, **flow, tokenizer=letters(1024), text_encoder=model), {}
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        scaling_factor=1.5, shift_factor=0.25,
    )  # fmt: skip
    if kind == Z_IMAGE:
        model = transformers.Qwen3Model(transformers.Qwen3Config(**size, head_dim=8))
        return dict(vae=vae, **flow, tokenizer=letters(1024), text_encoder=model), {}
    if kind == FLUX:
        tokenizer, text = clip(folder, transformers.CLIPTextModel)
        config = transformers.T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        both = dict(tokenizer_2=letters(512), text_encoder_2=transformers.T5EncoderModel(config))
        return dict(vae=vae, **flow, tokenizer=tokenizer, text_encoder=text, **both), {"guidance_embeds": True}
    (one, text), (two, text_2) = (clip(folder, transformers.CLIPTextModelWithProjection) for _ in range(2))
    encoders = dict(tokenizer=one, text_encoder=text, tokenizer_2=two, text_encoder_2=text_2)
    return dict(vae=vae, **flow, **encoders, tokenizer_3=None, text_encoder_3=None), {"joint_attention_dim": 40}


def write_pipeline(kind, home, **config):
    """A whole pipeline of a kind in a folder of home, but for its backbone's weights; config: more settings of that."""
    torch.manual_seed(0)
    parts, backbone = parts_of(kind, home / "tokenizer")
    for part in parts.values():
        for name, p in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
            if "embed" not in name and p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
    getattr(diffusers, kind)(transformer=None, **parts).save_pretrained(home / kind)
    (home / kind / "transformer").mkdir()
    (home / kind / "transformer" / "config.json").write_text(json.dumps({**backbone, **config}))
    return home / kind


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """A function: kind -> folder of a whole pipeline of that kind, its backbone's weights left out."""
    home = tmp_path_factory.mktemp("pipelines")

    return cache(lambda kind: write_pipeline(kind, home))


@pytest.fixture(scope="session")
def loaded(pipelines):
    return cache(lambda kind: load_pipeline(pipelines(kind), dtype=torch.float32))


@kinds
def test_conditions_have_the_names_and_rows_that_the_backbones_take(kind, loaded):
    """One length for all prompts; the same rows whoever is beside them; another prompt, another row."""
    pipeline, tokens = loaded(kind), TOKENS[kind]
    cond = encode_text(pipeline, PROMPTS[:3], tokens)
    names = set(FAMILIES[BACKBONES[kind]].cond) | ({"guidance"} if kind == FLUX else set())
    assert cond.keys() == names
    length = 77 + tokens if kind == SD3 else tokens
    assert cond["prompt_embeds"].shape[:2] == (3, length)
    for i in range(3):
        for name, value in encode_text(pipeline, PROMPTS[i : i + 1], tokens).items():
            close(value[0], cond[name][i], atol=1e-5, rtol=1e-4)
    assert (cond["prompt_embeds"][0] - cond["prompt_embeds"][1]).abs().max() > 1e-3
    if "prompt_mask" in names:
        filled = cond["prompt_mask"].sum(1)
        assert cond["prompt_mask"].dtype == torch.bool and filled.diff().tolist() == [9, 3]
        assert torch.equal(cond["prompt_mask"], torch.arange(tokens) < filled[:, None]), "from the left"
    if kind == FLUX:
        assert torch.equal(cond["guidance"], torch.full((3,), 3.5))


def hidden(tokenizer, encoder, text, layer=-1, tokens=None, masked=True):
    """A layer of a text encoder for one prompt, padded to a number of tokens or not at all, and all that it says."""
    whole = {} if tokens is None else dict(padding="max_length", max_length=tokens, truncation=True)
    ids = tokenizer(text, return_tensors="pt", **whole)
    with torch.no_grad():
        out = encoder(ids.input_ids, attention_mask=ids.attention_mask if masked else None, output_hidden_states=True)
    return out.hidden_states[layer][0], out


@pytest.mark.parametrize("kind", [SD3, FLUX])
def test_conditions_with_a_pooled_vector_are_what_the_text_encoders_say(kind, loaded):
    pipeline, prompt = loaded(kind), PROMPTS[1]
    cond = encode_text(pipeline, [prompt], TOKENS[kind])
    first, out = hidden(pipeline.tokenizer, pipeline.text_encoder, prompt, -2, 77, masked=False)
    if kind == SD3:
        second, out_2 = hidden(pipeline.tokenizer_2, pipeline.text_encoder_2, prompt, -2, 77, masked=False)
        close(cond["prompt_embeds"][0, :77, :32], torch.cat([first, second], -1))
        assert not cond["prompt_embeds"][0, :, 32:].any() and not cond["prompt_embeds"][0, 77:].any(), "there is no T5"
        close(cond["pooled"], torch.cat([out.text_embeds, out_2.text_embeds], -1))
    else:
        _, long = hidden(pipeline.tokenizer_2, pipeline.text_encoder_2, prompt, tokens=TOKENS[kind], masked=False)
        close(cond["prompt_embeds"], long.last_hidden_state)
        close(cond["pooled"], out.pooler_output)


@pytest.mark.parametrize("kind", [QWEN, Z_IMAGE])
def test_conditions_with_a_mask_are_what_the_text_encoder_says(kind, loaded):
    """The prompt within the family's template, of Qwen-Image without its first 34 tokens, and zeros after it."""
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    pipeline = loaded(kind)
    template = pipeline.prompt_template_encode if kind == QWEN else "<{}>"
    for prompt in (*PROMPTS[:2], ""):
        cond = encode_text(pipeline, [prompt], TOKENS[kind])
        embeds, mask = cond["prompt_embeds"][0], cond["prompt_mask"][0]
        layer = -1 if kind == QWEN else -2
        expected, _ = hidden(pipeline.tokenizer, pipeline.text_encoder, template.format(prompt), layer)
        close(embeds[mask], expected[34:] if kind == QWEN else expected, atol=1e-5, rtol=1e-4)
        assert not embeds[~mask].any()


def test_sana_is_given_its_instruction_but_not_with_the_empty_prompt(loaded):
    """Of the instruction, which is before the prompt and of a length that all have, the first and last place stay."""
    pipeline = loaded(SANA)
    call = inspect.signature(type(pipeline).__call__).parameters
    lead = "\n".join(call["complex_human_instruction"].default)
    for prompt in PROMPTS[:2]:
        cond = encode_text(pipeline, [prompt], TOKENS[SANA])
        out = hidden(pipeline.tokenizer, pipeline.text_encoder, lead + prompt)[1].last_hidden_state[0]
        expected = torch.cat([out[:1], out[-len(prompt) - 1 :]])
        close(cond["prompt_embeds"][0][cond["prompt_mask"][0]], expected, atol=1e-5, rtol=1e-4)
    assert not encode_text(pipeline, [""], TOKENS[SANA])["prompt_mask"].any(), "these tokens have no beginning"


@kinds
def test_no_second_prompt_is_encoded_for_guidance(kind, loaded):
    pipeline, calls = loaded(kind), []
    hook = pipeline.text_encoder.register_forward_hook(lambda *arguments: calls.append(1))
    encode_text(pipeline, PROMPTS[:2], TOKENS[kind])
    hook.remove()
    assert len(calls) == 1


def test_a_prompt_that_may_be_cut_is_warned_of(loaded):
    with pytest.warns(UserWarning, match="'a red cube on a blue one' fills all 12 tokens: what is beyond is cut"):
        cond = encode_text(loaded(Z_IMAGE), ["a cat", PROMPTS[3], "another that is too long"], 12)
    assert cond["prompt_mask"].sum(1).tolist() == [7, 12, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_text(loaded(Z_IMAGE), ["a cat"], 12)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        encode_text(loaded(SANA), ["a cat"], 0)


@kinds
def test_latents_are_scaled_as_the_pipeline_scales_them(kind, loaded):
    """Decoding: by hand, as the pipeline does; encoding undoes it: the latent that the autoencoder itself makes."""
    pipeline = loaded(kind)
    vae, config = pipeline.vae, pipeline.vae.config
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if kind == QWEN:
            mean, std = (torch.tensor(config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
            image, own = vae.decode(z[:, :, None] * std + mean).sample[:, :, 0], vae.encode(x[:, :, None]).latent_dist
            scaled = ((own.mode() - mean) / std)[:, :, 0]
        elif kind == SANA:
            image, scaled = vae.decode(z / 0.4).sample, vae.encode(x).latent * 0.4
        else:
            image, scaled = vae.decode(z / 1.5 + 0.25).sample, (vae.encode(x).latent_dist.mode() - 0.25) * 1.5
    close(decode_latents(z, pipeline), image)
    close(encode_images(x, pipeline), scaled)
    assert image.shape == x.shape and image.std() > 0.01


def test_pipelines_that_are_not_there_or_unknown_are_named(pipelines, tmp_path):
    def refused(match, folder):
        with pytest.raises(ValueError, match=match) as error:
            load_pipeline(folder)
        assert len(str(error.value).splitlines()) == 1

    refused("model_index.json: not there or no JSON, so no diffusers pipeline", tmp_path / "nowhere")
    broken = shutil.copytree(pipelines(SD3), tmp_path / "broken")
    (broken / "text_encoder" / "model.safetensors").unlink()
    refused("broken: no whole StableDiffusion3Pipeline", broken)
    (broken / "transformer" / "config.json").unlink()
    refused("transformer/config.json: not there", broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    shutil.copytree(pipelines(SD3) / "transformer", broken / "transformer", dirs_exist_ok=True)
    refused("StableDiffusionPipeline is none of the known pipelines: StableDiffusion3Pipeline, Sana", broken)
    assert {p.dtype for p in load_pipeline(pipelines(SD3)).text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_pipeline(pipelines(SD3)).vae.parameters()} == {torch.float32}


def test_prompts_are_read_from_lines_records_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n two dogs \n")
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": "a cat"}, {"prompt": "two dogs"}]
    (tmp_path / "b.txt").write_bytes("\ufeffun œuf\r\none\u2028line".encode())
    assert read_prompts(tmp_path / "b.txt") == [{"prompt": "un œuf"}, {"prompt": "one\u2028line"}]
    (tmp_path / "b.txt").write_bytes("un œuf".encode("utf-16"))
    with pytest.raises(ValueError, match="b.txt: no UTF-8 text"):
        read_prompts(tmp_path / "b.txt")
    lines = [{"prompt": "a cat", "tag": "counting"}, {"prompt": "two dogs"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(tmp_path / "a.jsonl") == lines
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "b7.txt").write_text("two dogs\n")
    (folder / "a10.txt").write_text("a cat")
    assert read_prompts(folder) == [{"prompt": "a cat", "name": "a10"}, {"prompt": "two dogs", "name": "b7"}]

    def refused(match, name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=match):
            read_prompts(tmp_path / name)

    refused("b.txt, line 2: no prompt", "b.txt", "a cat\n\na dog\n")
    refused("b.txt: holds no prompts", "b.txt", "")
    refused("b.jsonl, line 1: no JSON", "b.jsonl", "a cat\n")
    refused("b.jsonl, line 2: no prompt", "b.jsonl", '{"prompt": "a"}\n{"text": "a"}\n')
    refused("b.jsonl, line 1: no prompt", "b.jsonl", '"prompt"\n')
    refused("b.json: prompts are read from .txt, .jsonl or a folder of .txt$", "b.json", "[]")
    with pytest.raises(ValueError, match="c.json: no such .txt, .jsonl or folder of .txt$"):
        read_prompts(tmp_path / "c.json")
    (folder / "c.txt").write_text(" ")
    with pytest.raises(ValueError, match="c.txt: no prompt"):
        read_prompts(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images of random colours, wider than high, with captions beside them."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS):
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 5, 3), np.uint8), 4, 0), 4, 1)
        Image.fromarray(pixels).save(folder / f"{9 - i}.png")
        (folder / f"{9 - i}.txt").write_text(prompt + "\n")
    return folder


def test_pairs_are_images_beside_their_captions(pictures, tmp_path):
    pairs = Pairs(pictures, 16)
    assert pairs.prompts == PROMPTS[::-1] and len(pairs) == 7
    x, rows = pairs.read(torch.tensor([2, 5]), None)
    assert rows.tolist() == [2, 5]
    for image, name in zip(x, ("5.png", "8.png")):
        middle = np.asarray(picture_of(pictures / name))[:, 2:-2].copy()
        assert torch.equal(image, to_unit(torch.from_numpy(middle).permute(2, 0, 1)))

    def refused(match, size=16):
        with pytest.raises(ValueError, match=match):
            Pairs(odd, size)

    odd = shutil.copytree(pictures, tmp_path / "odd")
    refused("size must be at least 1, got 0", 0)
    (odd / "5.txt").write_text("\n")
    refused("5.txt: no prompt")
    (odd / "5.txt").unlink()
    refused("one image and one caption, NAME.txt, of each name, 5 has not")
    (odd / "5.txt").write_text("a cat")
    shutil.copy(odd / "4.png", odd / "4.jpg")
    refused("of each name, 4 has not")
    odd = tmp_path / "nowhere"
    refused("nowhere: holds no images")


@pytest.fixture(scope="session")
def texts(loaded, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "pairs"
    pairs = Pairs(pictures, 16)
    embed(pairs.prompts, loaded(SD3), out, pairs, tokens=5, batch_size=2, shard=3)
    return out


@pytest.fixture(scope="session")
def no_latents(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "alone"
    embed(PROMPTS, loaded(QWEN), out, tokens=300, batch_size=4, shard=4)
    return out


def test_a_folder_of_texts_holds_what_the_pipeline_makes(texts, no_latents, loaded, pictures):
    """Each prompt with its own image, in the order of the epoch; the null condition is that of the empty prompt."""
    files = ["null.safetensors", "texts-00000.safetensors", "texts-00001.safetensors", "texts-00002.safetensors"]
    assert sorted(path.name for path in texts.iterdir()) == [*files, "texts.json"]
    table, pairs, pipeline = Texts(texts, 7, seed=3), Pairs(pictures, 16), loaded(SD3)
    assert len(table) == 7 and table.shape == (4, 8, 8) and table.on_disk
    order = batches.rows_of_step(7, 7, 2, 3)
    assert order.tolist() != sorted(order.tolist())
    x, cond = table.batch(2)
    expected = encode_text(pipeline, [pairs.prompts[i] for i in order], 5)
    assert cond.keys() == expected.keys()
    for name, value in expected.items():
        close(cond[name], value, atol=1e-5, rtol=1e-4)
    close(x, encode_images(pairs.read(order, None)[0], pipeline), atol=2e-3, rtol=2e-3)
    for name, value in encode_text(pipeline, [""], 5).items():
        close(table.null[name], value)
    alone = Texts(no_latents, 3, shape=(4, 6, 10))
    x, cond = alone.batch(0)
    assert torch.equal(x, torch.zeros(3, 4, 6, 10)) and cond["prompt_mask"].dtype == torch.bool
    assert cond["prompt_embeds"].shape == (3, 300, 16)
    for name, value in encode_text(loaded(QWEN), [""], 300).items():
        close(alone.null[name], value)
    assert json.loads((texts / "texts.json").read_text())["tensors"]["latents"] == ["F16", [4, 8, 8]]


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 5))
def test_the_parts_of_a_batch_are_the_batch(texts, size, each, step, seed):
    """Joined in the order of the processes, whoever reads them and whatever was read before."""
    x, cond = Texts(texts, size * each, seed).batch(step)
    parts = [Texts(texts, size * each, seed, (rank, size)).batch(step) for rank in range(size)]
    assert torch.equal(torch.cat([part[0] for part in parts]), x) and all(len(part[0]) == each for part in parts)
    for name, value in cond.items():
        assert torch.equal(torch.cat([part[1][name] for part in parts]), value)


@settings(max_examples=15)
@given(st.integers(1, 20), st.integers(0, 3))
def test_every_epoch_reads_each_row_once(texts, batch_size, seed):
    table = Texts(texts, batch_size, seed)
    batches = [table.batch(step) for step in range(-(-14 // batch_size))]
    seen = torch.cat([torch.cat([x.flatten(1), cond["pooled"]], 1) for x, cond in batches])[:14]
    first, second = seen.split(7)
    assert len(first.unique(dim=0)) == 7 and torch.equal(first.unique(dim=0), second.unique(dim=0))
    assert not torch.equal(Texts(texts, 14, seed).batch(0)[0], Texts(texts, 14, seed + 1).batch(0)[0])


def changed(folder, name, change):
    """Rewrite a shard with its tensors changed."""
    tensors = safetensors.load_file(folder / name)
    change(tensors)
    safetensors.save_file(tensors, folder / name)


def test_only_the_rows_of_a_process_are_read(texts, tmp_path):
    """A number that is not finite is met by the process that has its row and by no other."""
    folder = shutil.copytree(texts, tmp_path / "nan")
    changed(folder, "texts-00001.safetensors", lambda tensors: tensors["pooled"][1, 3].fill_(torch.nan))
    place = batches.rows_of_step(7, 6, 0, 0).tolist().index(4)
    for rank in range(3):
        table = Texts(folder, 6, part=(rank, 3))
        if rank == place // 2:
            with pytest.raises(ValueError, match="texts-00001.safetensors: row 1 of pooled holds NaN or infinity"):
                table.batch(0)
        else:
            table.batch(0)
    with pytest.raises(ValueError, match="batch_size 7 must be a multiple of the 2 processes"):
        Texts(texts, 7, part=(0, 2)).batch(0)


def test_embedding_goes_on_where_it_was_stopped_and_ends_the_same(texts, loaded, pictures, tmp_path, monkeypatch):
    pairs, pipeline, out = Pairs(pictures, 16), loaded(SD3), tmp_path / "out"
    real, calls = type(pairs).read, []

    def stops(self, rows, generator):
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, rows, generator)

    how = dict(tokens=5, batch_size=2, shard=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pairs, "read", stops)
        embed(pairs.prompts, pipeline, out, pairs, **how)
    with pytest.raises(ValueError, match="texts.json: no such file"):
        Texts(out, 2)
    first = (out / "texts-00000.safetensors").stat().st_mtime_ns
    assert not (out / "texts-00001.safetensors").exists()
    for change in ({"tokens": 6}, {"batch_size": 3}, {"shard": 2}):
        with pytest.raises(ValueError, match=f"was begun with {list(change)[0]} .*: choose another --out"):
            embed(pairs.prompts, pipeline, out, pairs, **{**how, **change})
    with pytest.raises(ValueError, match="was begun with images"):
        embed(pairs.prompts, pipeline, out, **how)
    with pytest.raises(ValueError, match="was begun with prompts"):
        embed(pairs.prompts[::-1], pipeline, out, pairs, **how)
    embed(pairs.prompts, pipeline, out, pairs, **how)
    assert (out / "texts-00000.safetensors").stat().st_mtime_ns == first
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in texts.iterdir())
    for path in texts.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    with pytest.raises(ValueError, match="already holds texts"):
        embed(pairs.prompts, pipeline, out, pairs, **how)
    with pytest.raises(ValueError, match="no prompts to encode"):
        embed([], pipeline, tmp_path / "none")


def test_a_shard_that_is_not_whole_on_the_disk_is_not_there(loaded, tmp_path, monkeypatch):
    written, sync = [], os.fsync

    def full(number):
        written.append(number)
        if len(written) == 3:  # after what was begun with, and the null condition
            raise OSError("no space left on device")
        sync(number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("os.fsync", full)
        embed(PROMPTS, loaded(SD3), tmp_path / "out", tokens=5)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["null.safetensors"]


def test_what_is_not_finite_is_not_written(loaded, pipelines, tmp_path):
    pipeline = load_pipeline(pipelines(SD3), dtype=torch.float32)
    pipeline.text_encoder.text_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the empty prompt: pooled would hold NaN or infinity"):
        embed(PROMPTS, pipeline, tmp_path / "nan", tokens=5)
    assert not list((tmp_path / "nan").glob("*.safetensors*"))


def test_damaged_texts_are_named(texts, no_latents, tmp_path):
    def refused(match, folder, **options):
        with pytest.raises(ValueError, match=match) as error:
            Texts(folder, 7, **options).batch(0)
        assert len(str(error.value).splitlines()) == 1

    numbers = iter(range(99))

    def copy():
        return shutil.copytree(texts, tmp_path / str(next(numbers)))

    refused("texts.json: no such file; `python -m tinytwinflow embed` makes one", tmp_path / "nowhere")
    refused("holds no latents, so training on it must be data-free and be told their shape", no_latents)
    refused(r"holds latents of shape \(4, 8, 8\), not \(4, 4, 4\)", texts, shape=(4, 4, 4))
    for name in ("texts-00002.safetensors", "null.safetensors"):
        folder = copy()
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-3])
        refused(f"{name}: damaged, or no safetensors file", folder)
        (folder / name).write_bytes(b"")
        refused(f"{name}: damaged, or no safetensors file", folder)
        (folder / name).unlink()
        refused(f"{name}: no such file", folder)
    folder = copy()
    changed(folder, "texts-00001.safetensors", lambda tensors: tensors.update(pooled=tensors["pooled"][:2].clone()))
    refused(r"texts-00001.safetensors: pooled is .*\[2, 16\].* there, .*\[3, 16\].* in texts.json", folder)
    folder = copy()
    changed(folder, "texts-00001.safetensors", lambda tensors: tensors.pop("latents"))
    refused("texts-00001.safetensors: latents is None there", folder)
    folder = copy()
    changed(folder, "null.safetensors", lambda tensors: tensors.update(pooled=tensors["pooled"].half()))
    refused("null.safetensors: pooled is .*F16.* there, .*F32", folder)
    folder = copy()
    about = json.loads((folder / "texts.json").read_text())
    for broken in ({"shards": []}, {"shards": 3}, {"sizes": [3, 3]}, {"sizes": [3, 4, 0]}, {"tensors": None}):
        (folder / "texts.json").write_text(json.dumps({**about, **broken}))
        refused("texts.json: damaged", folder)
    (folder / "texts.json").write_text("{")
    refused("texts.json: damaged", folder)
    folder = copy()
    table = Texts(folder, 7)
    (folder / "texts-00001.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="texts-00001.safetensors: damaged"):
        table.batch(0)


def test_each_shard_is_looked_at_by_one_process(texts, tmp_path):
    folder = shutil.copytree(texts, tmp_path / "missing")
    (folder / "texts-00001.safetensors").unlink()
    Texts(folder, 4, part=(0, 2))
    with pytest.raises(ValueError, match="texts-00001.safetensors: no such file"):
        Texts(folder, 4, part=(1, 2))
