"""The table of families: what it says holds was tried, and what does not hold is said."""

import pytest
import torch

from tinytwinflow.backbones.families import FAMILIES
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
    monkeypatch.setattr(checked, "needs_of_step", lambda name, loss, rows, training: {"peak": 3 * 2**30})
    first, second = checked.table_of_families([KIND, "QwenImageTransformer2DModel"]).split("\n\n")
    assert first.splitlines()[2] == f"| {KIND} | prompt_embeds, prompt_mask | Sana | yes | NO | yes | yes |"
    assert "(source) | QwenImage, QwenImageEdit, QwenImageEditPlus | yes" in first
    names = [name for kind in (KIND, "QwenImageTransformer2DModel") for name in FAMILIES[kind].published]
    assert [line.split(" | ")[0] for line in second.splitlines()[2:]] == [f"| {name}" for name in names]
    assert f"| sana-1.6b | {KIND} | 1.6 B | 32 x 32 x 32 | 300 | 3.0 GiB |" in second
