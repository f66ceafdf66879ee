"""Learning to edit, by the commands: triples of pictures are encoded, trained on with their own sources, with data and
without, and what was learnt edits inside the pipelines of diffusers."""

import math
import re
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from tinytwinflow import TwinFlowLoss, attach
from tinytwinflow.backbones import states
from tinytwinflow.backbones.captions import Pairs, bucket_sides
from tinytwinflow.backbones.prompts import decode_latents, encode_images, encode_text, load_pipeline
from tinytwinflow.backbones.texts import Texts, embed, read_conditions
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.cli.commands import main
from tinytwinflow.method.conditions import apart
from tinytwinflow.method.conditions import repeat as repeated
from tinytwinflow.method.samplers import sample
from tinytwinflow.runs.folder import backbone_of
from tinytwinflow.training.loop import train
from tinytwinflow.training.state import new_state

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
from test_editing import PIPELINES, pipeline_of  # noqa: E402
from test_texts import slope, tiles  # noqa: E402

close = torch.testing.assert_close
KIND_OF = {name: kind for kind, names in PIPELINES.items() for name in names if hasattr(diffusers, name)}
KONTEXT, QWEN = "FluxKontextPipeline", "QwenImageEditPipeline"
names = pytest.mark.parametrize("name", KIND_OF)
two = pytest.mark.parametrize("name", [KONTEXT, QWEN])
SIDES = [(16, 16), (20, 12), (16, 16), (20, 12), (16, 16)]
WORDS = ["add a hat", "make it night", "as a drawing", "remove the dog", "snow"]


def tokens_of(name):
    return 30 if name == KONTEXT else 400


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Qwen-Image's pipelines resize pictures to 16^2 pixels for the autoencoder and 8^2 for the text encoder."""
    for name in KIND_OF:
        module = sys.modules[getattr(diffusers, name).__module__]

        def calculate(area, ratio, more=(None,) if name == QWEN else ()):
            size = {1024**2: 16, 384**2: 8}[area]
            return tuple(4 * round(size * ratio**power / 4) for power in (0.5, -0.5)) + more

        if hasattr(module, "calculate_dimensions"):
            monkeypatch.setattr(module, "calculate_dimensions", calculate)


def noisy(seed, side):
    """A picture of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), np.uint8))


def write_triples(folder, targets=True):
    """Edits of known pictures, of just the sizes that they are encoded in."""
    (folder / "source").mkdir(parents=True)
    for i, (words, side) in enumerate(zip(WORDS, SIDES)):
        noisy(i, side).save(folder / "source" / f"{i}.png")
        (folder / f"{i}.txt").write_text(words)
        if targets:
            noisy(100 + i, side).save(folder / f"{i}.png")
    return folder


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A function: name -> folder with a tiny pipeline, `whole`, and what `embed` made for it: `texts`, edits in two
    sizes, and `free`, the squares among them without what they became."""
    root = tmp_path_factory.mktemp("edits")
    triples, squares = write_triples(root / "triples"), write_triples(root / "squares", targets=False)
    for i in (1, 3):
        (squares / f"{i}.txt").unlink(), (squares / "source" / f"{i}.png").unlink()

    @cache
    def made(name):
        folder = root / name
        pipeline_of(KIND_OF[name], name, root).save_pretrained(folder / "whole")
        for out, pairs in (("texts", Pairs(triples, 16, bucket_sides(16, 3, 4))), ("free", Pairs(squares, 16))):
            embed(pairs.prompts, exact(folder), folder / out, pairs, tokens_of(name), batch_size=2, shard=2)
        return folder

    return made


def exact(folder):
    """The whole pipeline in float32."""
    return load_pipeline(folder / "whole", dtype=torch.float32, whole=True)


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def call_of(pipeline, side):
    """The arguments of a call that edits a picture in its own size, and answers with latents."""
    how = {"height": side[1], "width": side[0], "output_type": "latent"}
    if isinstance(pipeline, diffusers.FluxKontextPipeline):
        return {**how, "max_area": math.prod(side), "_auto_resize": False, "max_sequence_length": 30}
    return {**how, "true_cfg_scale": 1.0}


@names
def test_what_is_embedded_is_what_the_pipeline_shows_its_transformer(name, home):
    """With the words and without: what guidance inside the pipeline shows the transformer of each row, whose picture
    stays in both, is what a row and what stands for none of it hold."""
    table, pipeline, calls = Texts(home(name) / "texts", 2), exact(home(name)), []
    assert table.shapes == ((4, 8, 8), (4, 6, 10)) and table.counts == (3, 2)
    pipeline.transformer.register_forward_pre_hook(lambda _, args, how: calls.append(how), with_kwargs=True)
    for place, i in enumerate([0, 2, 4, 1, 3]):
        x, cond = table.read(np.array([place]))
        close(x, encode_images(pixels(noisy(100 + i, SIDES[i])), pipeline), atol=2e-3, rtol=2e-3)
        cond, null = apart(cond, table.null)
        calls.clear()
        how = {**call_of(pipeline, SIDES[i]), "true_cfg_scale": 2.0, "negative_prompt": ""}
        pipeline(noisy(i, SIDES[i]), WORDS[i], **how, num_inference_steps=1)
        assert len(calls) == 2
        for call, own in zip(calls, (cond, null)):
            source, embeds = pipeline._pack_latents(own["source"], *own["source"].shape), own["prompt_embeds"]
            close(call["hidden_states"][:, source.shape[1] :], source.float(), atol=2e-3, rtol=2e-3)
            if name == KONTEXT:
                close(call["pooled_projections"], own["pooled"])
            else:
                assert not embeds[:, ~own["prompt_mask"][0]].any()
                embeds = embeds[:, own["prompt_mask"][0]]
            close(call["encoder_hidden_states"], embeds, atol=1e-5, rtol=1e-4)
        assert (cond["prompt_embeds"] - null["prompt_embeds"]).abs().max() > 1e-2
    assert table.null.keys() == ({"prompt_embeds", "pooled", "guidance"} if name == KONTEXT else set())


class Watched(torch.nn.Module):
    """A network that keeps which prompts and pictures it and its copies are shown together."""

    def __init__(self, keep):
        super().__init__()
        self.weight, self.keep = torch.nn.Parameter(torch.zeros(())), keep  # functions are not copied

    def forward(self, x, t, r, cond):
        assert not any(name.startswith("null_") for name in cond)
        self.keep(zip(cond["prompt_embeds"], cond["source"], x))
        return self.weight * x


@two
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dropped, guidance", [(0.5, 0.0), (0.0, 0.5)])
def test_without_its_words_each_row_keeps_its_own_picture(name, home, dropped, guidance, accumulate):
    """All that training shows a network is a row's picture with that row's words, or with what stands for none of them,
    beside x of the picture's size; both are seen where words are dropped or guidance is on, and of all rows."""
    table, seen = Texts(home(name) / "texts", 2), []
    net = Watched(lambda shown: seen.extend(shown))
    rows = [table.read(np.array(part)) for part in ([0, 1, 2], [3, 4])]
    loss, loop = TwinFlowLoss(guidance=guidance, share=0.5, order=1), {"accumulate": accumulate, "null": table.null}
    for _ in train(new_state(net), loss, table.batch, steps=25, label_dropout=dropped, **loop):
        pass
    kinds = set()
    for words, source, x in seen:
        assert x.shape == source.shape
        ((part, i),) = [(part, i) for part, (_, c) in enumerate(rows) for i in range(len(c["source"]))
                        if c["source"][i].shape == source.shape and torch.equal(c["source"][i], source)]  # fmt: skip
        own, null = (
            cond["prompt_embeds"][i] for cond in apart(rows[part][1], repeated(table.null, len(rows[part][0])))
        )
        assert torch.equal(words, own) != torch.equal(words, null)
        kinds.add((part, i, torch.equal(words, own)))
    assert len(kinds) == 10


def told(capsys):
    """The one line that a command has ended with."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinytwinflow: ")]
    return line


@two
@pytest.mark.parametrize("free", [False, True], ids=["with data", "data-free"])
def test_from_triples_to_one_step_in_the_pipeline_by_the_commands(name, free, home, tmp_path, capsys):
    """embed, train, export, attach: one step of the pipeline is that of our sampler for the same picture and words; and
    what is drawn while training is what the adapters' average makes of each row's own picture."""
    folder, made, out = home(name), tmp_path / "texts", tmp_path / "run"
    triples = folder.parent / ("squares" if free else "triples")
    how = ("--pipeline", folder / "whole", "--size", 16, "--buckets", 3, "--tokens", tokens_of(name))
    assert run("embed", triples, *how, "--out", made) == 0
    said = "3 prompts and sources" if free else "5 prompts and images and sources"
    assert capsys.readouterr().out.splitlines()[-1] == f"{said}: {made}"
    own = [f"model={folder / 'whole'}", f"vae={folder / 'whole'}", "weights=float32"]
    own += [] if free else [f"validation={folder / 'free'}"]  # else the first batch is drawn
    own += ["steps=4", "batch_size=2", "lora_rank=2", "lr=0.05", "label_dropout=0.3", "sample_every=2"]
    own += [f"data_free={str(free).lower()}", "precision=float32"]
    assert run("train", "text", "--data", made, "--out", out, "--set", *own) == 0
    assert run("export", out, "--out", tmp_path / "adapters") == 0
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert f"diffusers.{name}.from_pretrained" in card and "pipeline(image=picture, prompt=" in card

    net, config, _, _ = backbone_of(out)
    field, pipeline, (picture, side) = states.view(net, config), exact(folder), (noisy(7, (20, 12)), (20, 12))
    z = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    cond = encode_text(pipeline, [WORDS[0]], tokens_of(name), [picture])
    cond["source"] = encode_images(pixels(picture), pipeline)
    with torch.no_grad():
        ours = sample(field, z, 1, cond=cond)
        before = sample(Velocity(exact(folder).transformer), z, 1, cond=cond)
        other = sample(field, z, 1, cond={**cond, "source": cond["source"].flip(-1)})
    assert (ours - before).abs().max() > 1e-2 and (ours - other).abs().max() > 1e-3, "it learnt, and it looks"
    call = {"latents": pipeline._pack_latents(z, *z.shape), **call_of(pipeline, side), "num_inference_steps": 1}
    for source in (out, tmp_path / "adapters"):
        answer = attach(exact(folder), source)(picture, WORDS[0], **call).images
        close(pipeline._unpack_latents(answer, 24, 40, 4).view_as(z), ours, atol=2e-5, rtol=0)

    cond = apart(Texts(made, 2).batch(0)[1], None)[0] if free else read_conditions(folder / "free")
    n, squares = (2, None) if free else (3, [encode_images(pixels(noisy(i, (16, 16))), pipeline) for i in (0, 2, 4)])
    assert free or torch.allclose(cond["source"].float(), torch.cat(squares), atol=2e-3, rtol=2e-3)
    z, drawn = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)), tiles(out / "samples.png", n)
    for column, steps in enumerate((1, 2, 4)):
        with torch.no_grad():
            image = decode_latents(sample(field, z, steps, cond=cond), pipeline)
        expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert expected.std() > 5 and np.abs(drawn[:, column] - expected).max() <= 1.01


def test_triples_are_cut_as_their_targets_and_found_by_name(tmp_path):
    """A target says the size of its source, whatever that's own ratio; alone a source says its own. Names, not places
    in two lists, say what belongs together."""
    (tmp_path / "source").mkdir()
    sizes = {"a.k": ((90, 60), (60, 80)), "a": ((64, 64), (70, 64)), "b": ((60, 90), (64, 80))}
    for stem, (target, source) in sizes.items():
        Image.fromarray(slope(*target)).save(tmp_path / f"{stem}.png")
        path = tmp_path / "source" / f"{stem}.{'PNG' if stem == 'a' else 'png'}"  # a.PNG is before a.k.png, a.png after
        Image.fromarray(slope(*source)).save(path)
        (tmp_path / f"{stem}.txt").write_text(stem)
    sides = bucket_sides(48, 3, 4)
    triples = Pairs(tmp_path, 48, sides)
    for side, rows in triples.buckets.items():
        for row, picture in zip(rows.tolist(), triples.to_edit(rows)):
            width, height = sizes[triples.prompts[row]][1]
            assert picture.size == side == sides[("a", "a.k", "b").index(triples.prompts[row])]
            scale = min(width / side[0], height / side[1])
            across = 127.5 + 255 * (np.arange(side[0]) + 0.5 - side[0] / 2) * scale / width
            inside = np.asarray(picture)[3:-3, 3:-3, 0].astype(float)
            assert np.abs(inside - across[3:-3]).max() < 1.6
    for stem in sizes:
        (tmp_path / f"{stem}.png").unlink()
    alone = Pairs(tmp_path, 48, sides)
    assert len(alone) == 3 and not alone.paths
    seen = {alone.prompts[row]: side for side, rows in alone.buckets.items() for row in rows.tolist()}
    assert seen == {"a.k": (40, 56), "a": (48, 48), "b": (40, 56)}


SIZE = ("--size", 16, "--buckets", 3)


def test_what_is_no_edit_is_refused_in_one_line(home, tmp_path, capsys):
    folder = home(KONTEXT)
    parts = exact(folder).components
    parts = {key: value for key, value in parts.items() if key not in ("image_encoder", "feature_extractor")}
    diffusers.FluxPipeline(**parts).save_pretrained(tmp_path / "flux")
    number = iter(range(100))

    def refused(match, change=lambda triples: None, whole=folder / "whole", size=SIZE, copied="triples"):
        triples = shutil.copytree(folder.parent / copied, tmp_path / str(next(number)))
        change(triples)
        capsys.readouterr()
        out = tmp_path / f"out-{triples.name}"
        assert run("embed", triples, "--pipeline", whole, *size, "--tokens", 30, "--out", out) == 2
        line = told(capsys)
        assert re.search(match, line) and not out.exists(), line

    refused("FluxPipeline takes no picture to edit, and .* holds 5$", whole=tmp_path / "flux")
    wanted = r"edits pictures: give a size, and beside NAME.txt that to edit, source/NAME.png$"
    for whole, name in ((folder / "whole", KONTEXT), (home(QWEN) / "whole", QWEN)):
        refused(f"{name} {wanted}", size=(), whole=whole)
        refused(f"{name} {wanted}", lambda triples: shutil.rmtree(triples / "source"), whole=whole)
    lacks = "picture to edit, source/NAME.png and one caption, NAME.txt, of each name"
    needs = f"needs one image and one {lacks}, 3 has not$"
    refused(needs, lambda triples: (triples / "source" / "3.png").unlink())
    refused(needs, lambda triples: (triples / "3.png").unlink())
    refused(needs, lambda triples: (triples / "3.txt").unlink())
    refused(needs, lambda triples: noisy(0, (20, 20)).save(triples / "source" / "3.webp"))
    needs = f"needs one {lacks}, 2 has not$"
    refused(needs, lambda triples: (triples / "2.txt").unlink(), copied="squares")
    refused("source: holds no images", lambda triples: [file.unlink() for file in (triples / "source").iterdir()])
    refused(r"source/2.png: 16 x 12 pixels, smaller than 16 x 16$",
            lambda triples: noisy(0, (16, 12)).save(triples / "source" / "2.png"))  # fmt: skip
    refused("source/4.png: cut short, or not an image",
            lambda triples: (triples / "source" / "4.png").write_bytes(b"no picture"))  # fmt: skip

    cut = shutil.copytree(folder.parent / "squares", tmp_path / "cut") / "source" / "4.png"
    cut.write_bytes(cut.read_bytes()[:-400])
    with pytest.raises(ValueError, match="source/4.png: cut short, or not an image"):
        Pairs(tmp_path / "cut", 16)
    prompts = ("--prompts", folder.parent / "squares", "--pipeline", folder / "whole", "--size", 16)
    assert run("paint", folder / "whole" / "transformer", *prompts, "--out", tmp_path / "images") == 2
    assert "FluxKontextPipeline makes no pictures of prompts alone" in told(capsys)


def test_sets_of_edits_that_do_not_fit_a_run_are_refused_in_one_line(home, tmp_path, capsys):
    folder = home(KONTEXT)

    def refused(match, *changes, data="texts"):
        own = [f"model={folder / 'whole'}", "steps=1", "batch_size=2", "lora_rank=2", *changes]
        assert run("train", "text", "--data", folder / data, "--out", tmp_path / "run", "--set", *own) == 2
        line = told(capsys)
        assert re.search(match, line) and not (tmp_path / "run").exists(), line

    refused("free holds no latents: --set data_free=true", data="free")
    changes = ("data_free=true", "latents=[4,4,4]")
    refused(r"free: holds source of shape \(4, 8, 8\), not \(4, 4, 4\)$", *changes, data="free")
    refused(r"texts: holds latents of shape \(4, 8, 8\), not prompts alone$", f"validation={folder / 'texts'}")
    two_sizes = tmp_path / "two"
    pairs = Pairs(write_triples(tmp_path / "sources", targets=False), 16, bucket_sides(16, 3, 4))
    embed(pairs.prompts, exact(folder), two_sizes, pairs, 30)
    refused("pictures to edit are drawn in one size, it holds 2: --buckets 1$", f"validation={two_sizes}")
    x, cond = Texts(two_sizes, 2).batch(1)
    assert x.shape == cond["source"].shape == (2, 4, 6, 10) and not x.any()
