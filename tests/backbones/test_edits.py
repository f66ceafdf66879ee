"""Learning to edit, by the commands: triples of pictures are encoded, trained on with their own sources, with data and
without, and what was learnt edits inside the pipelines of diffusers."""

import json
import math
import shutil
import sys
import warnings
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
from test_prompts import picture_of  # noqa: E402
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
