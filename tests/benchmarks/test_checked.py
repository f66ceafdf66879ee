"""The table of families: what it says holds was tried, and what does not hold is said."""

from pathlib import Path

import pytest
import torch

from tinytwinflow.backbones.families import FAMILIES, published_names
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.benchmarks import checked

pytest.importorskip("diffusers")
KIND = "SanaTransformer2DModel"


@pytest.mark.parametrize("kind", [KIND, "LTXVideoTransformer3DModel", "StableAudio3DiTModel"])
def test_what_holds_for_a_family_is_tried(kind):
    assert checked.checked_family(kind) == dict.fromkeys(checked.CHECKS, True)


def broken(name, monkeypatch):
    """Break what one of the checks is to see."""
    if name == "r = t":
        monkeypatch.setattr(Velocity, "_add", lambda self, embedder, args, emb: None)
    if name == "file":
        read = checked.load_velocity

        def load(path):
            net = read(path)
            torch.nn.init.zeros_(next(net.r_embedder.parameters()))
            return net

        monkeypatch.setattr(checked, "load_velocity", load)
    if name == "adapters":
        add = checked.adapt

        def adapt(net, rank, seed):
            add(net, rank, seed=seed)
            torch.nn.init.ones_(net.get_submodule(net.lora.layers[0]).lora_B.weight)

        monkeypatch.setattr(checked, "adapt", adapt)
    if name == "loss":
        monkeypatch.setattr(checked, "_falls", lambda net, parameters, *_: hasattr(net, "lora"))


@pytest.mark.parametrize("name", checked.CHECKS)
def test_what_does_not_hold_is_said(name, monkeypatch):
    broken(name, monkeypatch)
    assert [check for check, holds in checked.checked_family(KIND).items() if not holds] == [name]


def test_the_table_has_all_families_and_their_published_models(monkeypatch):
    monkeypatch.setattr(checked, "checked_family", lambda kind: {**dict.fromkeys(checked.CHECKS, True), "loss": False})
    monkeypatch.setattr(checked, "needs_of_step", lambda *_, kept: {"peak": (1 if kept else 3) * 2**30})
    first, second = checked.table_of_families([KIND, "QwenImageTransformer2DModel"]).split("\n\n")
    assert first.splitlines()[2] == f"| {KIND} | prompt_embeds, prompt_mask | Sana | yes | NO | yes | yes |"
    assert "(source) | QwenImage, QwenImageEdit, QwenImageEditPlus | yes" in first
    names = [name for kind in (KIND, "QwenImageTransformer2DModel") for name in FAMILIES[kind].published]
    assert [line.split(" | ")[0] for line in second.splitlines()[2:]] == [f"| {name}" for name in names]
    assert f"| sana-1.6b | {KIND} | 1.6 B | 32 x 32 x 32 | 300 | 3.0 | 1.0 |" in second


def test_the_page_has_the_table():
    """Of each family the conditions, the pipelines and what holds; of each model its latents and tokens."""
    page = (Path(__file__).parents[2] / "tutorials" / "backbones.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    found = {row[0]: row[1:] for row in rows if row[0] in FAMILIES}
    assert [*found] == [*FAMILIES]
    for kind, family in FAMILIES.items():
        conditions, pipelines, *held = found[kind]
        assert conditions.replace("(", "").replace(")", "").split(", ") == [*family.cond, *family.optional]
        assert pipelines == (", ".join(p.name.removesuffix("Pipeline") for p in family.pipelines) or "-")
        assert held == ["yes"] * len(checked.CHECKS)
    models = {row[0]: row[1:] for row in rows if row[0] in published_names()}
    assert [*models] == published_names()
    for name, (kind, _, latents, tokens, bf16, nf4) in models.items():
        about = FAMILIES[kind].published[name]
        assert latents == " x ".join(map(str, about.latents)) and int(tokens) == about.tokens
        assert 0 < float(nf4) < float(bf16)
