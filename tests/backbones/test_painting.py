"""Painting: each picture from a noise of its own, in the folders that two benchmarks look through."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_prompts import BACKBONES, FLUX, PROMPTS, QWEN, SANA, SD3, Z_IMAGE, parts_of, picture_of

from tinytwinflow import attach
from tinytwinflow.backbones.captions import read_prompts
from tinytwinflow.backbones.painting import draw_grid, paint, write_pictures
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.data.points import seeded

diffusers = pytest.importorskip("diffusers")
HEADS = dict(attention_head_dim=16, num_attention_heads=1)
BLOCKS = {
    SD3: dict(
        **HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=40,
        caption_projection_dim=16, pooled_projection_dim=16, sample_size=16, pos_embed_max_size=8,
    ),
    SANA: dict(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, caption_channels=16, sample_size=16,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
    ),
    FLUX: dict(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    QWEN: dict(
        **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    ),
    Z_IMAGE: dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    ),
}  # fmt: skip


def pipeline_of(kind, folder):
    """A whole tiny pipeline with random weights, whose scheduler takes Euler's steps."""
    torch.manual_seed(0)
    parts, _ = parts_of(kind, folder / "tokenizer")
    model = getattr(diffusers, BACKBONES[kind]).from_config(BLOCKS[kind])
    for part in (model, *parts.values()):
        for name, p in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
            if p.ndim > 1 and "embed_tokens" not in name:
                torch.nn.init.normal_(p, std=0.25)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, kind)(**{**parts, "transformer": model, "scheduler": euler})


def attached(kind, folder, std=0.3, mode="any"):
    """A tiny pipeline whose transformer has embedders of random weights."""
    pipeline = pipeline_of(kind, folder)
    net = Velocity(copy.deepcopy(pipeline.transformer))
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return attach(pipeline, net, mode)


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A pipeline that paints pictures of 16 x 16 pixels, and counts its calls."""
    pipeline = attached(SD3, tmp_path_factory.mktemp("painter"))
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    calls = pipeline.__dict__["calls"] = []
    return pipeline


def alone(pipeline, prompt, *key, seed=0, steps=1, size=16):
    """The picture of a key as a user would make it of the pipeline itself.  -> bytes (H, W, 3)"""
    how = {"num_inference_steps": steps, "guidance_scale": 1.0, "max_sequence_length": 5, "output_type": "np"}
    image = pipeline(prompt, height=size, width=size, generator=seeded(seed, 4, *key), **how).images[0]
    return (image * 255).round()


def same_picture(image, expected):
    """Equal but for the few bytes that the rounding of another batch moves by one."""
    assert image.mode == "RGB" and expected.std() > 1
    apart = np.abs(np.asarray(image).astype(float) - expected)
    return apart.max() <= 1 and apart.mean() < 0.05


def test_the_picture_of_a_key_is_the_same_in_any_batch(painter):
    """And other keys, prompts and seeds have others."""
    words = {0: "a cat", 5: "the sea"}
    pictures = paint(painter, words, [0, 3], seed=2, height=16, width=16, max_sequence_length=5)
    assert pictures.shape == (2, 2, 3, 16, 16) and pictures.dtype == torch.uint8
    for i, prompt in words.items():
        for k, picture in zip([0, 3], pictures[[*words].index(i)]):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            assert same_picture(image, alone(painter, prompt, i, k, seed=2))
            for other in [("a dog", i, k, 2), (prompt, i + 1, k, 2), (prompt, i, k + 1, 2), (prompt, i, k, 3)]:
                assert not same_picture(image, alone(painter, *other[:3], seed=other[3]))


def test_a_grid_has_a_row_a_prompt_and_a_column_a_number_of_calls(painter, tmp_path):
    draw_grid(painter, PROMPTS[:2], tmp_path / "a.png", (1, 2), height=16, width=16, max_sequence_length=5)
    grid = picture_of(tmp_path / "a.png")
    assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    for i, prompt in enumerate(PROMPTS[:2]):
        for column, steps in enumerate((1, 2)):
            corner = (2 + 18 * column, 2 + 18 * i)
            cell = grid.crop((*corner, corner[0] + 16, corner[1] + 16))
            assert same_picture(cell, alone(painter, prompt, i, 0, steps=steps))
    with pytest.raises(ValueError, match="at least one prompt"):
        draw_grid(painter, [], tmp_path / "b.png")


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "counting", "include": [{"class": "cat", "count": i}], "prompt": p} for i, p in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    return read_prompts(path)


def test_geneval_finds_its_folders(geneval, painter, tmp_path):
    """Looked through as the official evaluation does; each picture is of the prompt in the metadata beside it."""
    pipeline, out = painter, tmp_path / "out"
    write_pictures(pipeline, geneval, out, 16, "test", "geneval", tokens=5, batch_size=6)
    found = 0
    for folder in out.iterdir():
        assert folder.is_dir() and folder.name.isdigit(), "nothing else is there"
        record = json.loads((folder / "metadata.jsonl").read_text())
        assert record == geneval[int(folder.name)] and folder.name == f"{int(folder.name):05d}"
        expected = [alone(pipeline, record["prompt"], int(folder.name), k) for k in range(4)]
        assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "metadata.jsonl", "samples"]
        for path in (folder / "samples").iterdir():
            assert re.fullmatch(r"\d{5}\.png", path.name)
            assert same_picture(picture_of(path), expected[int(path.stem)])
            found += 1
        assert picture_of(folder / "grid.png").size == (32, 32)
    assert found == 12


def test_dpg_bench_finds_its_squares(painter, tmp_path):
    """Cut as the official script cuts: across, then down; the key is the file's name up to the first dot."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, prompt in zip(("partiprompts12", "COCOval7", "x-1"), PROMPTS):
        (prompts / f"{name}.txt").write_text(prompt)
    pipeline, out, records = painter, tmp_path / "out", read_prompts(prompts)
    write_pictures(pipeline, records, out, 16, "test", "dpg", tokens=5, batch_size=3)
    assert {path.name.split(".")[0] for path in out.iterdir()} == {"partiprompts12", "COCOval7", "x-1"}
    side = 16
    cuts = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    for path in out.iterdir():
        key = path.name.split(".")[0]
        index = [record["name"] for record in records].index(key)
        expected = [alone(pipeline, (prompts / f"{key}.txt").read_text(), index, k) for k in range(4)]
        assert picture_of(path).size == (32, 32)
        for cut, picture in zip(cuts, expected):
            assert same_picture(picture_of(path).crop(cut), picture)


@pytest.mark.parametrize("layout", ["plain", "geneval"])
def test_painting_goes_on_where_it_was_stopped(layout, geneval, painter, tmp_path):
    """What is whole stays, what a stop left half done is made anew, and all ends the same."""
    pipeline, out, calls = painter, tmp_path / "out", []
    how = dict(layout=layout, n=2, tokens=5, batch_size=2, seed=4)

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = pipeline.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write_pictures(pipeline, geneval, out, 16, "test", **how)
    handle.remove()
    assert [path.name for path in out.iterdir()] == ["00000"]
    first = (out / "00000").stat().st_mtime_ns
    (out / "00001.tmp").mkdir()
    (out / "00001.tmp" / "junk.png").write_text("half done")
    for change in ({"seed": 5}, {"steps": 2}, {"n": 1}, {"tokens": 6}):
        with pytest.raises(ValueError, match=f"was begun with {list(change)[0]} .*: choose another --out"):
            write_pictures(pipeline, geneval, out, 16, "test", **{**how, **change})
    with pytest.raises(ValueError, match="was begun with source test, not other"):
        write_pictures(pipeline, geneval, out, 16, "other", **how)
    with pytest.raises(ValueError, match="was begun with prompts"):
        write_pictures(pipeline, geneval[:2], out, 16, "test", **how)
    for _ in range(2):  # the second time there is nothing to do
        write_pictures(pipeline, geneval, out, 16, "test", **how)
    assert (out / "00000").stat().st_mtime_ns == first
    write_pictures(pipeline, geneval, tmp_path / "whole", 16, "test", **how)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert names == sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*"))
    files = [name for name in names if (out / name).is_file()]
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
    assert len([name for name in files if name.endswith(".png")]) == (6 if layout == "plain" else 9)


def test_plain_pictures_lie_beside_their_prompt(painter, tmp_path):
    pipeline, records = painter, [{"prompt": prompt} for prompt in PROMPTS[:2]]
    write_pictures(pipeline, records, tmp_path / "out", 16, "test", n=3, tokens=5, seed=2)
    for i, prompt in enumerate(PROMPTS[:2]):
        folder = tmp_path / "out" / f"{i:05d}"
        assert (folder / "prompt.txt").read_text() == prompt + "\n"
        for k in range(3):
            assert same_picture(picture_of(folder / f"{k:05d}.png"), alone(pipeline, prompt, i, k, seed=2))


def test_what_does_not_fit_a_layout_is_refused(geneval, painter, tmp_path):
    pipeline, plain, out = painter, [{"prompt": "a cat"}], tmp_path / "out"

    def refused(match, records, **how):
        with pytest.raises(ValueError, match=match) as error:
            write_pictures(pipeline, records, out, 16, "test", **{"tokens": 5, **how})
        assert len(str(error.value).splitlines()) == 1 and not list(out.glob("*"))

    refused("unknown layout 'grid': choose from plain, geneval, dpg", plain, layout="grid")
    refused("n must be at least 1, got 0", plain, n=0)
    refused("n must be 4 for layout dpg, got 1", plain, n=1, layout="dpg")
    refused("layout geneval takes GenEval's evaluation_metadata.jsonl", plain, layout="geneval")
    for names in (["a.b"], ["a", "a"], ["../a"]):
        records = [{"prompt": "a cat", "name": name} for name in names]
        refused("layout dpg takes a folder of NAME.txt", records, layout="dpg")
    refused("layout dpg takes a folder of NAME.txt", geneval, layout="dpg")
    refused("steps must be at least 1, got 0", plain, steps=0)
    refused("batch_size must be at least 1, got 0", plain, batch_size=0)
    out.mkdir(exist_ok=True)
    (out / "mine.png").write_text("mine")
    with pytest.raises(ValueError, match="out.json: not there or no JSON, so no record of how .*out was begun"):
        write_pictures(pipeline, plain, out, 16, "test")
    nan = pipeline.transformer.register_forward_hook(lambda module, args, out: (out[0] * torch.nan,))
    with pytest.raises(FloatingPointError, match="prompt 0: a picture holds NaN or infinity"):
        write_pictures(pipeline, plain, tmp_path / "nan", 16, "test", tokens=5)
    nan.remove()
    assert not list((tmp_path / "nan").iterdir())
