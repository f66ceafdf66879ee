"""Texts in buckets of sizes: images are cut as their ratio asks, a batch is of one bucket, and none is dealt out more
than its share. And what is drawn of prompts while training is what the averaged network makes of them."""

import json
import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinytwinflow.backbones import states
from tinytwinflow.backbones.captions import Pairs, bucket_sides
from tinytwinflow.backbones.prompts import encode_images, encode_text, load_pipeline, picture_unit
from tinytwinflow.backbones.texts import Texts, embed, read_conditions
from tinytwinflow.cli.commands import main
from tinytwinflow.data.batches import group_of_step
from tinytwinflow.method.samplers import sample
from tinytwinflow.runs.drawing import pixels_of
from tinytwinflow.runs.folder import backbone_of

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
from test_prompts import FLUX, QWEN, SANA, SD3, picture_of, write_pipeline  # noqa: E402
from test_states import numbers, stopped  # noqa: E402
from test_velocity import model_of  # noqa: E402

close = torch.testing.assert_close


@given(st.integers(1, 64), st.integers(7, 60), st.sampled_from([1, 3, 5, 7]))
def test_buckets_are_of_multiples_and_of_as_many_pixels(unit, times, count):
    """Each side the nearest multiple to that of a picture of just size^2 pixels; whatever there is stands upright and
    lies; a square is always there, in front."""
    size = unit * times
    sides = bucket_sides(size, count, unit)
    assert sides[0] == (size, size) and len(set(sides)) == count
    for (width, height), ratio in zip(sides, (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)):
        assert width % unit == height % unit == 0
        assert abs(width - size * math.sqrt(ratio)) <= unit / 2 and abs(height - size / math.sqrt(ratio)) <= unit / 2
        assert (height, width) in sides


def test_sizes_that_give_no_buckets_are_refused():
    for match, how in (
        ("size must be at least 1, got 0", (0,)),
        ("size must be a multiple of 16 for this pipeline, got 500", (500, 1, 16)),
        ("buckets must be one of 1, 3, 5, 7, got 2$", (512, 2, 16)),
        ("buckets must be one of 1, 3, 5, 7, got 9$", (512, 9, 16)),
        ("size 32 is too small for 7 buckets of sides that are multiples of 16", (32, 7, 16)),
    ):
        with pytest.raises(ValueError, match=match):
            bucket_sides(*how)


def slope(width, height):
    """A picture whose red says how far to the right a pixel's middle is, and whose green how far down, 0 to 255."""
    red, green = (255 * (np.arange(n) + 0.5) / n for n in (width, height))
    return np.stack([*np.broadcast_arrays(red, green[:, None]), np.zeros((height, width))], 2).round().astype(np.uint8)


SIZES = [(64, 64), (70, 60), (90, 64), (64, 90), (130, 70), (70, 130), (200, 64), (80, 60)]  # upright


@pytest.fixture(scope="session")
def slopes(tmp_path_factory):
    """A folder of such pictures with captions; of two the camera was turned, which their EXIF orientation says."""
    folder = tmp_path_factory.mktemp("slopes")
    for i, size in enumerate(SIZES):
        pixels, exif = slope(*size), Image.Exif()
        if i in (2, 5):
            pixels, exif[0x0112] = np.rot90(pixels), 6  # to be turned by a quarter clockwise
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i}.png", exif=exif)
        (folder / f"{i}.txt").write_text(f"slope {i}")
    return folder


def test_an_image_goes_to_the_nearest_ratio_and_shows_its_middle_unstretched(slopes):
    """The bucket's side that is short of the image is filled to the edges, of the other as much is cut on both sides,
    and a pixel is as wide as high: read from the colours."""
    sides = bucket_sides(48, 3, 4)
    assert sides == [(48, 48), (56, 40), (40, 56)]
    pairs, seen = Pairs(slopes, 48, sides), []
    for side, rows in pairs.buckets.items():
        x, _ = pairs.read(rows, None)
        assert x.shape[1:] == (3, side[1], side[0])
        for image, row in zip((x + 1) * 127.5, rows.tolist()):
            width, height = SIZES[row]
            off = [abs(math.log(wide / high * height / width)) for wide, high in (side, *sides)]
            assert off[0] == min(off)
            scale = min(width / side[0], height / side[1])  # pixels of the image in one of the bucket
            across = 0.5 + (torch.arange(side[0]) + 0.5 - side[0] / 2) * scale / width
            down = 0.5 + (torch.arange(side[1]) + 0.5 - side[1] / 2) * scale / height
            inside = (slice(2, -2), slice(2, -2))  # at the edges there is less to take a mean of
            close(image[0][inside], (255 * across).expand(side[1], -1)[inside], atol=1.6, rtol=0)
            close(image[1][inside], (255 * down)[:, None].expand(-1, side[0])[inside], atol=1.6, rtol=0)
        seen += [(row, side) for row in rows.tolist()]
    assert sorted(row for row, _ in seen) == list(range(len(SIZES)))
    lengths = [len(rows) for rows in pairs.buckets.values()]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3
    with pytest.raises(ValueError, match=r"0.png: 64 x 64 pixels, smaller than 80 x 80$"):
        Pairs(slopes, 80, bucket_sides(80, 1, 4))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function: kind -> folder of a tiny pipeline whose backbone says what its patches need."""
    home = tmp_path_factory.mktemp("whole")

    @cache
    def make(kind):
        channels = 16 if kind in (FLUX, QWEN) else 4
        return write_pipeline(kind, home, patch_size=1 if kind in (SANA, FLUX) else 2, in_channels=channels)

    return make


@pytest.mark.parametrize("kind, unit", [(SD3, 4), (SANA, 2), (FLUX, 4), (QWEN, 4)])
def test_the_sides_of_pictures_are_of_whole_patches(folder_of, kind, unit):
    """These autoencoders halve the sides; SANA's patches are of one latent pixel, those of others of two."""
    assert picture_unit(folder_of(kind)) == unit


@pytest.fixture(scope="session")
def in_buckets(folder_of, slopes, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "out"
    pairs = Pairs(slopes, 48, bucket_sides(48, 3, 4))
    embed(pairs.prompts, load_pipeline(folder_of(SD3), dtype=torch.float32), out, pairs, 5, batch_size=2, shard=2)
    return out


def test_a_shard_holds_one_bucket_and_each_prompt_keeps_its_image(in_buckets, folder_of, slopes):
    pipeline, pairs = load_pipeline(folder_of(SD3), dtype=torch.float32), Pairs(slopes, 48, bucket_sides(48, 3, 4))
    table = Texts(in_buckets, 3)
    assert len(table) == len(SIZES) and table.shape == table.shapes[0] == (4, 20, 28) and table.counts == (4, 2, 2)
    assert dict(zip(table.shapes, table.counts)) == {(4, h // 2, w // 2): len(r) for (w, h), r in pairs.buckets.items()}
    begin = 0
    for rows in pairs.buckets.values():
        x, cond = table.read(np.arange(begin, begin + len(rows)))
        close(x, encode_images(pairs.read(rows, None)[0], pipeline), atol=4e-3, rtol=4e-3)
        for name, value in encode_text(pipeline, [f"slope {i}" for i in rows.tolist()], 5).items():
            close(cond[name], value, atol=1e-5, rtol=1e-4)
        begin += len(rows)


def test_the_command_embeds_buckets_says_how_many_and_goes_on(folder_of, slopes, tmp_path, capsys):
    """A stop costs no shard that is whole, and all ends the same; other sizes or buckets are refused in one line."""
    out, more = tmp_path / "out", ["--pipeline", folder_of(SD3), "--tokens", 5]

    def run(*words):
        code = main([str(word) for word in ("embed", slopes, "--out", out, *more, *words)])
        return code, capsys.readouterr()

    assert run("--buckets", 3)[1].err == "tinytwinflow: --buckets are of images: --size S encodes them too\n"
    assert "size must be a multiple of 4 for this pipeline, got 47" in run("--size", 47)[1].err
    read, calls = Pairs.read, []

    def stops(self, rows, generator):
        calls.append(rows.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, rows, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pairs, "read", stops)
        assert run("--size", 48, "--buckets", 3)[0] == 130
    assert calls == [[2, 4, 6, 7], [0, 1], [3, 5]]
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert sorted(there) == ["null.safetensors", "texts-00000.safetensors", "texts-00001.safetensors"]
    for words in (["--size", 44, "--buckets", 3], ["--size", 48], ["--size", 48, "--buckets", 5], []):
        code, said = run(*words)
        assert code == 2 and "was begun with images" in said.err.splitlines()[-1]
    code, said = run("--size", 48, "--buckets", 3)
    lines = [f"{n} images of {w} x {h} pixels" for n, (w, h) in ((4, (56, 40)), (2, (48, 48)), (2, (40, 56)))]
    assert code == 0 and said.out.splitlines() == [*lines, f"8 prompts and images: {out}"]
    assert "already holds texts" in run("--size", 48, "--buckets", 3)[1].err
    assert all((out / name).stat().st_mtime_ns == made for name, made in there.items())
    assert run("--size", 48, "--buckets", 3, "--out", tmp_path / "whole")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [*sorted(there), "texts-00002.safetensors", "texts.json"]
    assert all(path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes() for path in out.iterdir())


counts = st.lists(st.integers(1, 12), min_size=1, max_size=7)


@given(counts)
def test_groups_take_turns_in_proportion(counts):
    """Of each round exactly as many as rows; at any step their share of it but for half a turn, where there are two
    groups; and a turn is the number of turns before it."""
    n, had = sum(counts), [0] * len(counts)
    for step in range(3 * n):
        group, turn = group_of_step(counts, step)
        assert turn == had[group]
        had[group] += 1
        for rows, turns in zip(counts, had):
            assert abs(turns - (step + 1) * rows / n) <= 0.5 + max(0, len(counts) / 2 - 1) * rows / n + 1e-9
        if (step + 1) % n == 0:
            assert had == [(step + 1) // n * rows for rows in counts]


def written(folder, counts, shard=3):
    """A folder of texts in buckets of so many rows, each of its own shape, in shards; each row holds its number."""
    folder.mkdir()
    index = {"shards": [], "sizes": [], "null": "null.safetensors", "buckets": []}
    number = 0
    for i, rows in enumerate(counts):
        index["buckets"].append([[1, 2, 2 + i], rows])
        for some in torch.arange(rows).split(shard):
            index["shards"].append(f"texts-{len(index['shards'])}.safetensors")
            index["sizes"].append(len(some))
            own = torch.arange(number, number + len(some)).float()
            latents = own.view(-1, 1, 1, 1).expand(-1, 1, 2, 2 + i).contiguous()
            safetensors.save_file({"pooled": own[:, None], "latents": latents}, folder / index["shards"][-1])
            number += len(some)
    safetensors.save_file({"pooled": torch.full((1, 1), -1.0)}, folder / "null.safetensors")
    index["tensors"] = {"pooled": ["F32", [1]], "latents": ["F32", [1, 2, 2]]}
    (folder / "texts.json").write_text(json.dumps(index))
    return folder


@settings(max_examples=12)
@given(counts.map(lambda rows: sorted(rows, reverse=True)[:3]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3))
def test_a_batch_is_of_one_bucket_and_images_come_equally_often(tmp_path_factory, counts, each, size, seed):
    """As often as all others in a round of as many steps as images, at any step but once more or less than others of
    its bucket, in an order that is the seed's; a process has its run of the batch's rows."""
    folder = written(tmp_path_factory.mktemp("bucket") / "texts", counts)
    batch_size, ends = size * each, np.cumsum(counts)
    table, seen = Texts(folder, batch_size, seed), np.zeros(sum(counts), int)
    parts = [Texts(folder, batch_size, seed, (rank, size)) for rank in range(size)]
    for step in range(sum(counts)):
        x, cond = table.batch(step)
        rows = cond["pooled"][:, 0].int().numpy()
        (bucket,) = {*np.searchsorted(ends, rows, side="right").tolist()}
        assert x.shape == (batch_size, 1, 2, 2 + bucket) and (x == cond["pooled"].view(-1, 1, 1, 1)).all()
        assert torch.equal(torch.cat([part.batch(step)[0] for part in parts]), x)
        np.add.at(seen, rows, 1)
        assert max(np.ptp(part) for part in np.split(seen, ends[:-1])) <= 1
    assert (seen == batch_size).all()
    again = [Texts(folder, batch_size, other).batch(0)[1]["pooled"] for other in range(40)]
    assert counts[0] == 1 or any(not torch.equal(again[0], other) for other in again)


def test_buckets_that_do_not_fit_the_shards_are_refused(tmp_path):
    for number, wrong in enumerate(
        (
            [[[1, 2, 2], 4], [[1, 2, 3], 1]],  # not all rows
            [[[1, 2, 2], 3], [[1, 2, 3], 3]],  # the end of one within a shard
            [[[1, 2, 3], 4], [[1, 2, 2], 2]],  # another shape in front than that of the tensors
            [[[1, 2, 2], "x"]],
            4,
        )
    ):
        folder = written(tmp_path / str(number), [4, 2], shard=4)
        about = json.loads((folder / "texts.json").read_text())
        (folder / "texts.json").write_text(json.dumps({**about, "buckets": wrong}))
        with pytest.raises(ValueError, match="texts.json: damaged") as error:
            Texts(folder, 2)
        assert len(str(error.value).splitlines()) == 1
    folder = written(tmp_path / "shape", [4, 2], shard=4)
    about = json.loads((folder / "texts.json").read_text())
    about["buckets"][1][0] = [1, 2, 4]
    (folder / "texts.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"texts-1.safetensors: latents is .*\[2, 1, 2, 3\].* there, .*\[2, 1, 2, 4\]"):
        Texts(folder, 2)


KIND, VALIDATED = "SD3Transformer2DModel", 3


@pytest.fixture(scope="module")
def world(tmp_path_factory, folder_of):
    """A tiny model; texts in two buckets for it; prompts to draw; and the pipeline whose autoencoder decodes them."""
    root = tmp_path_factory.mktemp("world")
    model_of(KIND, std=0.1).save_pretrained(root / "model")
    draw = torch.Generator().manual_seed(0)

    def words(n):
        return {name: torch.randn(n, *tail, generator=draw) for name, tail in ((EMBEDS, (5, 12)), ("pooled", (10,)))}

    for name, shapes in (("texts", [(4, 4, 4), (4, 2, 6)]), ("prompts", [None])):
        (root / name).mkdir()
        index = {"shards": [], "sizes": [], "null": "null.safetensors", "buckets": []}
        for i, shape in enumerate(shapes):
            tensors = words(4 - i if shape else VALIDATED)
            if shape:
                tensors["latents"] = torch.randn(4 - i, *shape, generator=draw)
                index["buckets"].append([shape, 4 - i])
            safetensors.save_file(tensors, root / name / f"{i}.safetensors")
            index["shards"].append(f"{i}.safetensors")
            index["sizes"].append(len(tensors["pooled"]))
            if i == 0:
                index["tensors"] = {key: ["F32", list(value.shape[1:])] for key, value in tensors.items()}
        null = {key: torch.zeros(1, *value.shape[1:]) for key, value in words(1).items()}
        safetensors.save_file(null, root / name / "null.safetensors")
        (root / name / "texts.json").write_text(json.dumps(index))
    (root / "pipeline").symlink_to(folder_of(SD3))
    return root


EMBEDS = "prompt_embeds"


def trained(world, out, *changes):
    """The exit code of a run that draws, as changed."""
    own = [f"model={world / 'model'}", f"validation={world / 'prompts'}", f"vae={world / 'pipeline'}"]
    own += ["steps=3", "batch_size=2", "lora_rank=2", "lr=0.1", "sample_every=1", "checkpoint_every=1", *changes]
    words = ["train", "text", "--data", world / "texts", "--out", out, "--set", *own]
    return main([str(word) for word in words])


def tiles(path, rows, columns=3):
    """The pictures of a grid, cut out, (rows, columns, H, W, 3)."""
    whole = np.asarray(picture_of(path))
    high, wide = (whole.shape[0] - 2) // rows - 2, (whole.shape[1] - 2) // columns - 2
    cut = [[slice(2 + i * (n + 2), 2 + i * (n + 2) + n) for i in range(m)] for m, n in ((rows, high), (columns, wide))]
    return np.stack([[whole[down, across] for across in cut[1]] for down in cut[0]]).astype(float)


def test_prompts_are_drawn_at_1_2_and_4_nfe_by_the_average_while_training(world, tmp_path, capsys, monkeypatch):
    """Row by row the file's prompts, from one noise, decoded by the pipeline's autoencoder as by hand; a resumed run
    draws the same bytes; one that draws nothing of it trains to the same weights."""
    quiet, hurt, plain = (tmp_path / name for name in ("quiet", "hurt", "plain"))
    assert trained(world, quiet) == 0
    with monkeypatch.context() as patch:
        stopped(patch, 2)
        assert trained(world, hurt) == 130
    assert main(["train", "text", "--out", str(hurt), "--resume", "--data", str(world / "texts")]) == 0
    assert trained(world, plain, "validation=", "vae=", "sample_every=100") == 0
    weights = [numbers(folder) for folder in (quiet, hurt, plain)]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())
    names = [path.name for path in sorted(quiet.glob("*.png"))]
    assert names == ["samples-000001.png", "samples-000002.png", "samples.png"] and not list(quiet.glob("*.tmp"))
    assert all((quiet / name).read_bytes() == (hurt / name).read_bytes() for name in names)
    assert (quiet / names[0]).read_bytes() != (quiet / names[1]).read_bytes()

    net, config, shape, _ = backbone_of(quiet)
    field, cond = states.view(net, config), read_conditions(world / "prompts")
    assert shape == (4, 4, 4) and len(cond["pooled"]) == VALIDATED
    z = torch.randn(VALIDATED, *shape, generator=torch.Generator().manual_seed(0))
    vae = diffusers.AutoencoderKL.from_pretrained(world / "pipeline" / "vae")
    drawn = tiles(quiet / "samples.png", VALIDATED)
    for column, steps in enumerate((1, 2, 4)):
        with torch.no_grad():
            image = vae.decode(sample(field, z, steps, cond=cond) / 1.5 + 0.25).sample
        expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert expected.std() > 5 and np.abs(drawn[:, column] - expected).max() <= 1
    assert np.abs(drawn[:, 0] - drawn[:, 2]).max() > 3 and np.abs(drawn[0] - drawn[1]).max() > 3
    four = np.asarray(picture_of(plain / "samples.png"))
    assert four.shape == (2 * 34 + 2, 3 * 34 + 2, 3), "two prompts of the first batch, latents eight times as large"


def test_what_cannot_be_drawn_is_refused_before_the_first_step(world, folder_of, tmp_path, capsys):
    many, other = (shutil.copytree(world / "prompts", tmp_path / name) for name in ("many", "other"))
    about = json.loads((many / "texts.json").read_text())
    (many / "texts.json").write_text(json.dumps({**about, "shards": 22 * about["shards"], "sizes": 22 * [VALIDATED]}))
    tensors = safetensors.load_file(other / "0.safetensors")
    safetensors.save_file({**tensors, "pooled": tensors["pooled"][:, 1:].contiguous()}, other / "0.safetensors")
    null = safetensors.load_file(other / "null.safetensors")
    safetensors.save_file({**null, "pooled": null["pooled"][:, 1:].contiguous()}, other / "null.safetensors")
    about["tensors"]["pooled"][1] = [9]
    (other / "texts.json").write_text(json.dumps(about))
    for change, what in (
        (f"validation={tmp_path / 'nowhere'}", "texts.json: no such file"),
        (f"validation={world / 'texts'}", "holds latents of shape (4, 4, 4), not prompts alone"),
        (f"validation={many}", "at most 64 prompts are drawn, it holds 66"),
        (f"validation={other}", "pooled must be floating-point of shape (3, 10)"),
        (f"vae={world / 'model'}", "model_index.json: not there"),
        (f"vae={folder_of(QWEN)}", ""),
    ):
        code, error = trained(world, tmp_path / "run", change), capsys.readouterr().err
        if not what:  # four channels as well: it may be meant
            assert code == 0
            continue
        assert code == 2 and what in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists(), error


@given(st.sampled_from([(5, 3, 4, 6), (5, 1, 4, 6), (5, 2, 4, 6), (5, 4, 3, 4, 6), (5, 4, 6)]))
def test_latents_of_any_axes_are_shown_as_colours(shape):
    """Eight pixels to one of a latent; one or two channels are grey, of a video the first frame is shown."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    shown = pixels_of(x)
    assert shown.shape == (5, 3, 32, 48)
    small = shown.unflatten(2, (4, 8)).unflatten(4, (6, 8))
    assert (small == small[:, :, :, :1, :, :1]).all()
    small = small[:, :, :, 0, :, 0]
    flat = x[:, None] if len(shape) == 3 else x[:, :, 0] if len(shape) == 5 else x
    grey = flat.shape[1] < 3
    close(small, flat.mean(1, keepdim=True).expand(-1, 3, -1, -1) if grey else flat[:, :3])


def test_decoding_leaves_all_random_streams_alone(folder_of):
    before = torch.get_rng_state()
    assert pixels_of(torch.zeros(2, 4, 3, 5), folder_of(SD3)).shape == (2, 3, 6, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_are_dropped_as_labels_are(world, tmp_path):
    """All but surely dropped, prompts train to the very weights that empty prompts do, and not at all to others'."""
    empty = shutil.copytree(world, tmp_path / "empty", symlinks=True)
    for path in (empty / "texts").glob("?.safetensors"):
        tensors, null = safetensors.load_file(path), safetensors.load_file(empty / "texts" / "null.safetensors")
        rows = {name: value.repeat_interleave(len(tensors["pooled"]), 0) for name, value in null.items()}
        safetensors.save_file({**tensors, **rows}, path)
    how = ("validation=", "vae=", "sample_every=100", "guidance=0")
    for name, root, dropped in (("all", world, 1 - 1e-7), ("none", world, 0.0), ("null", empty, 1 - 1e-7)):
        assert trained(root, tmp_path / name, f"label_dropout={dropped}", *how) == 0
    everything, nothing, null = (numbers(tmp_path / name) for name in ("all", "none", "null"))
    assert all(torch.equal(value, everything[name]) for name, value in null.items())
    assert any((value - nothing[name]).abs().max() > 1e-3 for name, value in null.items())
