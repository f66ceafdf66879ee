"""Families: a model of the user's own, registered from outside, is adapted and measured like those that are known."""

import doctest

import pytest
import torch
from torch import nn

from tinytwinflow.backbones import families, family, states
from tinytwinflow.backbones.families import FAMILIES, published_names
from tinytwinflow.backbones.family import Configuration, Family
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.benchmarks.calls import condition_for, named_structure
from tinytwinflow.benchmarks.speed_backbone import bench_backbone
from tinytwinflow.cli.commands import main


class Waves(nn.Module):
    def forward(self, time):
        return torch.stack([time.cos(), time.sin()], 1)


class OwnTransformer2DModel(nn.Module):
    """Nothing of diffusers: a mapping called config, and a forward of its own names."""

    def __init__(self, width=8):
        super().__init__()
        self.config = {"in_channels": 4, "patch_size": 1, "words": 6}
        self.waves, self.text = Waves(), nn.Linear(6, 4)
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 4))
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 4))])

    def forward(self, image, time, text, return_dict=True):
        h = image.movedim(1, 3) + (self.time(self.waves(time).to(image.dtype)) + self.text(text).mean(1))[:, None, None]
        for layer in self.layers:
            h = h + layer(h)
        return (h.movedim(3, 1),)


@pytest.fixture
def own(monkeypatch):
    about = Family(
        "time", "waves", lambda model, x, t, cond: {"image": x, "time": 1000 * t, "text": cond["prompt_embeds"]},
        {"prompt_embeds": ("L", "words")}, ("layers",), small={"width": 16},
        published={"own": Configuration({"width": 32}, (4, 8, 8), tokens=3)}, model=OwnTransformer2DModel,
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, "OwnTransformer2DModel", about)
    return about


def test_the_example_of_the_contract_runs():
    found = doctest.testmod(family)
    assert found.attempted > 5 and not found.failed and "MyTransformer2DModel" not in FAMILIES


def test_a_family_of_ones_own_is_a_velocity_field_and_can_be_adapted(own):
    net, x, t = Velocity(OwnTransformer2DModel()), torch.randn(2, 4, 8, 8), torch.rand(2)
    cond = {"prompt_embeds": torch.randn(2, 3, 6)}
    assert torch.equal(net(x, t, t, cond), net.model(x, 1000 * t, cond["prompt_embeds"])[0])
    states.adapt(net, 2)
    assert net.lora.layers == ("model.layers.0.0", "model.layers.0.2")


def test_a_family_of_ones_own_is_measured_by_its_name(own, capsys):
    """The small variant runs on a CPU; the published one, of 32, is counted without weights."""
    assert main(["bench", "--net", "own", "--batch-size", "2", "--training", "float32"]) == 0
    assert "in place of own), float32, twinflow: 0.0 M parameters" in capsys.readouterr().out
    count = sum(p.numel() for p in Velocity(OwnTransformer2DModel(16)).parameters())
    assert bench_backbone("own", "float32", 2)["parameters"] == count
    capsys.readouterr()
    assert main(["memory", "--net", "own", "--methods", "twinflow"]) == 0
    out = capsys.readouterr().out
    assert "latents 4 x 8 x 8, 3 tokens" in out and out.count("| twinflow |") == 3
    assert main(["bench", "--net", "owner"]) == 2
    assert f"unknown net 'owner': choose from mlp, dit-s-2 ... dit-xl-8, {', '.join(published_names())}" in (
        capsys.readouterr().err
    )


def test_a_published_name_belongs_to_one_family():
    assert len(published_names()) == len(set(published_names())) >= 5
    with pytest.raises(ValueError, match="unknown backbone 'vit': choose from sd3.5-large, "):
        families.published_backbone("vit")


@pytest.mark.parametrize(
    "name, billions",
    {"flux.2": 32, "flux.2-klein-4b": 3.9, "chroma": 8.9, "auraflow-0.3": 6.8, "longcat-image": 6.3,
     "ovis-image-7b": 7.4}.items(),
)  # fmt: skip
def test_a_published_model_has_as_many_parameters_as_they_say_and_takes_its_usual_sample(name, billions):
    pytest.importorskip("diffusers")
    net, about = named_structure(name)
    assert sum(p.numel() for p in net.model.parameters()) == pytest.approx(billions * 1e9, rel=0.01)
    x, cond = torch.empty(1, *about.latents, device="meta"), condition_for(net, 1, about.tokens)
    net.check(x, cond)
    net.family.inputs(net.model, x, torch.ones(1), cond)
