"""What a run is built of: networks in what their method needs around them, and features that images are compared by."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import write_folder

import tinytwinflow as ttf
from tinytwinflow.cli.commands import main
from tinytwinflow.evaluation import features as judging
from tinytwinflow.evaluation.features import Classifier
from tinytwinflow.files import read_checkpoint
from tinytwinflow.nets import MLP, PredictsData, Shifted
from tinytwinflow.runs import build
from tinytwinflow.runs.build import dressed, features_for, net_of
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish, resume, steps
from tinytwinflow.runs.settings import loss_of

SMALL = {"steps": 6, "warmup_steps": 2, "width": 16, "depth": 2, "batch_size": 12, "eval_samples": 60}
KINDS = {
    "predicts data": {"predicts": "data", "base_steps": 1},
    "shifted": {"shifted": True, "base_steps": 1},
    "shifted, with labels": {"shifted": True, "base_steps": 1, "conditional": True},
    "on meanflow": {"base": "meanflow", "base_steps": 2, "peer": {"power": 0.5}},
    "on shortcut": {"base": "shortcut", "base_steps": 0, "share": 0.5},
    "apex": {"method": "apex", "conditional": True},
    "pixel meanflow": {"method": "pixel meanflow"},
    "drifting": {"method": "drifting"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_run_stopped_anywhere_goes_on_to_the_same_end_and_is_read_back(kind, tmp_path):
    """The network is the one that the settings say; a folder and a file give the same samples in one step and two."""
    config = configured("toy", **SMALL, **KINDS[kind])
    whole = finish(begin(config, tmp_path / "whole"), shown=False)
    parts = begin(config | {"checkpoint_every": 1}, tmp_path / "parts")
    list(itertools.islice(steps(parts), 3))
    parts = finish(resume(tmp_path / "parts"), shown=False)
    for name, weights in whole.state.weights().items():
        assert all(torch.equal(value, parts.state.weights()[name][key]) for key, value in weights.items()), name
    assert isinstance(whole.state.net, PredictsData) == ("data" in kind or "pixel" in kind)
    assert isinstance(whole.state.net, Shifted) == ("shifted" in kind or "apex" in kind)
    model = ttf.load(tmp_path / "whole")
    model.save(tmp_path / "model.pt")
    again = ttf.load(tmp_path / "model.pt")
    assert again.config == config and type(again.net) is type(whole.state.net)
    for nfe in (1, 2):
        mode = "any" if kind == "drifting" else None
        x, y = (own.sample(20, nfe, seed=1, mode=mode) for own in (model, again))
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y)) and np.isfinite(np.asarray(x)).all()
    if kind == "drifting":
        with pytest.raises(ValueError, match="drifting makes samples in one step"):
            model.sample(3, 2)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_network_is_dressed_from_within(classes):
    """First both conditions, then the clean sample that it answers with; as the settings say, or a method's needs."""
    config = configured("toy", width=8, depth=2, conditional=classes > 0, shifted=True, predicts="data")
    net = net_of(config, (2,), 3)
    assert type(net) is PredictsData and type(net.net) is Shifted and type(net.net.net) is MLP
    assert net.classes == classes and net.net.net.classes == 2 * classes + 1
    assert type(dressed(lambda classes: MLP(2, 8, 2, classes), classes)) is MLP
    for name in ("apex", "pixel meanflow"):
        made = dressed(lambda classes: MLP(2, 8, 2, classes), classes, **ttf.peers.PEERS[name].needs)
        assert type(made) is {"apex": Shifted, "pixel meanflow": PredictsData}[name] and made.classes == classes


def test_first_weights_are_those_of_a_network_of_the_same_kind(tmp_path):
    """Of a flow that predicts data into pixel mean flows; of a velocity they are refused, as are shifted ones."""
    flow = {**SMALL, "order": 0, "share": 0.0, "base_steps": 0}
    for name, own in (("velocity", {}), ("data", {"predicts": "data"}), ("shifted", {"shifted": True})):
        finish(begin(configured("toy", **flow, **own), tmp_path / name), shown=False)
    still = {**SMALL, "steps": 1, "warmup_steps": 0, "lr": 1e-20, "muon_lr": 1e-20}
    for method, fits in (("pixel meanflow", "data"), ("apex", "shifted")):
        config = configured("toy", **still, method=method, init_from=str(tmp_path / fits))
        begun, first = begin(config).state.net, read_checkpoint(tmp_path / fits / "checkpoint.pt")["average"]
        assert all(torch.equal(value, first[name]) for name, value in begun.state_dict().items())
        for other in {"velocity", "data", "shifted"} - {fits}:
            config = configured("toy", **still, method=method, init_from=str(tmp_path / other))
            with pytest.raises(ValueError, match="checkpoint.pt: .*another network") as refused:
                begin(config, tmp_path / "refused")
            assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "refused").exists()
    config = configured("imagenet", predicts="data", guidance=0.0)
    with pytest.raises(ValueError, match="sit:x: published weights are for a dit with predicts=velocity and shifted=f"):
        build.first_weights(PredictsData(MLP(2)), "sit:x")
    assert config["predicts"] == "data"


def test_a_network_of_ones_own_for_pixel_mean_flows_predicts_data():
    """One that answers with a velocity is refused, wrapped it is trained."""
    x, few = np.random.default_rng(0).normal(size=(40, 2)), {"steps": 2, "warmup_steps": 1, "batch_size": 8}
    with pytest.raises(ValueError, match="pixel meanflow takes a network that predicts x: net=nets.PredictsData"):
        ttf.fit(x, net=MLP(2, 8, 2), method="pixel meanflow", **few)
    model = ttf.fit(x, net=PredictsData(MLP(2, 8, 2)), method="pixel meanflow", **few)
    assert model.sample(3).shape == (3, 2)


def test_a_network_of_ones_own_is_asked_for_its_shifted_conditions(tmp_path):
    x, options = np.random.default_rng(0).normal(size=(200, 2)), {"steps": 4, "batch_size": 12, "warmup_steps": 1}
    model = ttf.fit(x, net=Shifted(lambda classes: MLP(2, 8, 2, classes)), method="apex", **options)
    assert model.sample(5, steps=2, seed=0).shape == (5, 2)
    with pytest.raises(ValueError, match="unconditional: it takes no cond"):
        ttf.fit(x, net=MLP(2, 8, 2), method="apex", out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists(), "which is found before the first step"
    for name in ({"predicts": "data"}, {"shifted": True}):
        with pytest.raises(ValueError, match=f"{next(iter(name))} would not be read: data or net are handed over"):
            ttf.fit(x, net=MLP(2, 8, 2), **options, **name)


@pytest.fixture
def trainings(monkeypatch):
    """Classifiers are trained for three steps; which are, with which seed of their weights, on which data."""
    seen, whole = [], judging.train_classifier

    def short(data, device="cpu", shown=False, seed=None):
        seen.append((seed, data))
        return whole(data, 3, device=device, seed=seed)

    for room in (judging, build):
        monkeypatch.setattr(room, "train_classifier", short)
    return seen


OF_IMAGES = {
    "steps": 5, "warmup_steps": 1, "batch_size": 8, "eval_samples": 12, "size": 16, "width": 16, "depth": 1, "heads": 2,
    "patch": 4, "method": "drifting", "log_every": 1, "checkpoint_every": 1, "sample_every": 10,
}  # fmt: skip


def drifting(folder, **changes):
    return configured("fashion", data=str(folder), **OF_IMAGES | changes)


def test_images_drift_by_the_features_of_a_classifier_that_does_not_judge(tmp_path, trainings):
    """Trained once, before the first step, on the whole set; it stays as it is, without gradient and outside of the
    optimiser; what resumes reads it back and trains none. The judge's weights begin otherwise."""
    folder = write_folder(tmp_path / "pictures", n=120)
    config = drifting(folder, subset=2, seed=3)
    run = begin(config, tmp_path / "run")
    ((seed, data),) = trainings
    assert len(data.rows) > 200 and data.batch_size == 128 and not data.flip and seed == 4
    eyes = run.state.helpers["features"]
    assert isinstance(eyes, Classifier) and not any(p.requires_grad for p in eyes.parameters()) and not eyes.training
    before, seen = {name: value.clone() for name, value in eyes.state_dict().items()}, []
    eyes.norms[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    records = list(itertools.islice(steps(run), 3))
    assert len(seen) == 2 * 2 and all("drift" in record for record in records[1:]), "of fakes and of data, once a step"
    assert all(torch.equal(value, before[name]) for name, value in eyes.state_dict().items())
    assert all(p.grad is None for p in eyes.parameters())
    again = resume(tmp_path / "run")
    found, read = again.state.helpers["features"].state_dict(), again.state.helpers["features"]
    assert not read.training and not any(p.requires_grad for p in read.parameters())
    assert len(trainings) == 1 and all(torch.equal(value, found[name]) for name, value in before.items())
    finish(again, shown=False)
    assert all(torch.equal(value, before[name]) for name, value in again.state.helpers["features"].state_dict().items())
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    judge = torch.load(tmp_path / "run" / "classifier.pt", weights_only=True)["net"]
    assert len(trainings) == 2 and not torch.equal(judge["last.weight"], found["last.weight"])
    assert {row["nfe"] for row in json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]} == {1, 100}
    model = ttf.load(tmp_path / "run")
    assert model.sample(3, seed=0).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("form", ["table", "stream"])
def test_features_of_images_that_are_handed_over_are_not_the_judges_either(form, trainings):
    x, label = torch.randn(60, 1, 8, 8), torch.arange(60) % 2
    data = (x, label) if form == "table" else lambda step: (x[:8], label[:8])
    options = {name: value for name, value in OF_IMAGES.items() if name != "size"}
    model = ttf.fit(data, recipe="fashion", seed=5, **options)
    model.evaluate(nfes=(1,))
    eyes = model.run.state.helpers["features"]
    (first, on), (second, judged_on) = trainings
    assert first == 6 and second is None and on is judged_on is model.run.data and getattr(on, "seed", 0) in (0, 5)
    assert not torch.equal(eyes.last.weight, judging.train_classifier(on).last.weight)


def test_images_without_labels_have_no_features_to_drift_by(tmp_path, trainings):
    """Which is said before anything is written; labels that the network is not told are enough."""
    folder = write_folder(tmp_path / "pictures", classes=1, n=240)
    for path in (folder / "class-0").iterdir():
        path.rename(folder / path.name)
    (folder / "class-0").rmdir()
    with pytest.raises(ValueError, match="^drifting compares images by a classifier's features: the data need labels$"):
        begin(drifting(folder, conditional=False), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not trainings
    labelled = write_folder(tmp_path / "labelled", n=120)
    run = begin(drifting(labelled, conditional=False))
    assert run.state.net.classes == 0 and len(trainings) == 1 and "drift" in list(steps(run))[-1]


def test_points_and_other_losses_have_no_features(trainings):
    points, images = configured("toy", **SMALL, method="drifting"), drifting("somewhere", method="meanflow")
    assert "features" not in begin(points).state.helpers
    pictures = type("Pictures", (), {"shape": (3, 16, 16), "classes": 2})()
    assert features_for(loss_of(images), images, pictures) is None
    assert features_for(loss_of(configured("fashion")), configured("fashion"), pictures) is None and not trainings
