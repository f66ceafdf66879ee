"""Every recipe from end to end, as a user runs it, on small files of the true formats."""

import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_cifar, write_clipart, write_folder, write_mnist
from test_commands import fails
from test_nets import published

from tinytwinflow.cli.commands import main
from tinytwinflow.data.clipart import make_clipart
from tinytwinflow.files import read_checkpoint
from tinytwinflow.nets.dit import SIZES
from tinytwinflow.runs.folder import read_log, trained
from tinytwinflow.runs.recipes import RECIPES

ENGINE = [
    "steps=4",
    "warmup_steps=1",
    "base_steps=1",
    "batch_size=6",
    "eval_samples=12",
    "log_every=1",
    "sample_every=2",
]
IMAGE_METRICS = {"frechet", "off_data", "precision", "recall", "coverage", "diversity", "accuracy"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A classifier of three steps and a DiT-S of one layer: these tests look at the path, not at the figures."""
    from tinytwinflow.evaluation import features

    monkeypatch.setitem(SIZES, "s", (32, 1, 2))
    whole = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", lambda data, device, shown: whole(data, 3, device=device))


@pytest.fixture(scope="module")
def home(tmp_path_factory, vae):
    home = tmp_path_factory.mktemp("data")
    write_mnist(home)
    write_cifar(home)
    make_clipart(home / "clipart", write_clipart(home / "package", n=60))
    write_folder(home / "pictures", n=120)
    assert (
        main(["encode", str(home / "pictures"), "--vae", str(vae), "--size", "16", "--out", str(home / "latents")]) == 0
    )
    return home


RUNS = {
    "fashion": ["width=16", "depth=1", "heads=2", "size=16"],
    "clipart": ["width=16", "depth=1", "heads=2", "size=16", "precision=float32"],
    "cifar": ["width=8", "depth=1", "size=16", "precision=float32"],
    "imagenet": ["net=dit-s-8", "size=8", "precision=float32", "compile=none"],
}


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_runs_from_files_to_table_and_picture(recipe, home, tmp_path, capsys, vae):
    folder = tmp_path / "run"
    command = ["train", recipe, "--data-dir", str(home), "--set", *ENGINE, *RUNS[recipe], "--out", str(folder)]
    assert main(command) == 0
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "classifier.pt", "samples.png", "metrics.json",
        "samples-000002.png", "samples-000004.png",
    }  # fmt: skip
    assert len(read_log(folder)) == 4 and read_log(folder)[-1]["adversarial"] > 0
    result = json.loads((folder / "metrics.json").read_text())
    assert set(result["floor"]) == IMAGE_METRICS
    assert all(set(row) == IMAGE_METRICS | {"method", "mode", "nfe"} for row in result["rows"])
    classes = {"imagenet": 2, "clipart": 3}.get(recipe, 10)
    assert main(["sample", str(folder), "--cond", str(classes - 1), "--n", "3", "--out", str(tmp_path / "x.npy")]) == 0
    shape = trained(folder)[2]["data"]["shape"]
    assert np.load(tmp_path / "x.npy").shape == (3, *shape)
    fails(capsys, ["sample", folder, "--cond", classes], f"labels 0 to {classes - 1}")
    decoded = ["--vae", str(vae)] if recipe == "imagenet" else []
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.png"), *decoded]) == 0
    if decoded:
        fails(capsys, ["sample", folder], "--vae")
        assert main(["sample", str(folder), "--n", "3", "--out", str(tmp_path / "x.npy"), *decoded]) == 0
        assert np.load(tmp_path / "x.npy").shape == (3, 3, 16, 16)
    assert main(["evaluate", str(folder)]) == 0
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]) for row in rows} >= {("flow matching", 100), ("twinflow", 1)}


@pytest.mark.parametrize("recipe", RUNS)
def test_without_data_the_same_command_says_what_is_missing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinytwinflow.data.readers.DEBIAN", {})
    monkeypatch.setattr("tinytwinflow.data.clipart.PACKAGE", str(tmp_path / "package"))
    out = tmp_path / "run"
    words = {
        "fashion": "apt install dataset-fashion-mnist",
        "clipart": "apt install openclipart-png",
        "cifar": "CIFAR10",
        "imagenet": "encode",
    }
    fails(capsys, ["train", recipe, "--data-dir", tmp_path / "no", "--out", out], str(tmp_path / "no"), words[recipe])
    assert not out.exists()


def test_without_labels_a_run_is_measured_by_what_needs_none(home, tmp_path):
    changes = [*ENGINE, *RUNS["fashion"], "conditional=false"]
    command = ["train", "fashion", "--data-dir", str(home), "--set", *changes, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(result["floor"]) == IMAGE_METRICS - {"diversity", "accuracy"}


def test_a_folder_of_pictures_trains_too(home, tmp_path):
    command = ["train", "cifar", "--data", str(home / "pictures"), "--set", *ENGINE, *RUNS["cifar"]]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("options", [[], ["precision=bf16"], ["accumulate=3", "clip_norm=0.5"], ["guidance=0.5"]])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_the_same(options, home, tmp_path, capsys):
    """Same weights, bit for bit, whatever the engine does."""
    changes = [*ENGINE, *RUNS["fashion"], "checkpoint_every=1", "sample_every=100", *options]
    command = ["train", "fashion", "--data-dir", str(home), "--set", *changes]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--out", str(whole)]) == 0

    from tinytwinflow.training import checkpoints as train

    saved = train.write_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def stop(path, content):
            saved(path, content)
            if content["step"] == 2:
                raise KeyboardInterrupt

        patch.setattr("tinytwinflow.training.checkpoints.write_checkpoint", stop)
        assert main([*command, "--out", str(parts)]) == 130
    assert main([*command, "--out", str(parts), "--resume"]) == 0
    a, b = (read_checkpoint(folder / "checkpoint.pt") for folder in (whole, parts))
    assert all(torch.equal(a[part][name], b[part][name]) for part in ("net", "average") for name in a["net"])
    assert read_log(whole) == read_log(parts)


def test_published_weights_start_a_run(home, tmp_path, capsys):
    """SiT's into the velocity network, DiT's into the one that predicts noise; a step of no length keeps them."""
    weights = published(8, 8, 4, 2, 32, 1, True, 0)
    for name in ("weight", "bias"):  # a prediction of noise as far off as a random one is: astray, as it should be
        weights[f"final_layer.linear.{name}"] *= 0.05
    torch.save(weights, tmp_path / "weights.pt")
    engine = ["steps=1", "warmup_steps=0", "base_steps=0", "batch_size=6", "eval_samples=12", "lr=1e-20"]
    for kind, epsilon in (("sit", "false"), ("dit", "true")):
        command = ["train", "imagenet", "--data-dir", str(home), "--init-from", f"{kind}:{tmp_path / 'weights.pt'}"]
        changes = [*engine, *RUNS["imagenet"], f"epsilon={epsilon}"]
        assert main([*command, "--set", *changes, "--out", str(tmp_path / kind)]) == 0
        net = trained(tmp_path / kind).net
        torch.testing.assert_close(net.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    changes = [*engine, *RUNS["fashion"]]
    command = ["train", "fashion", "--data-dir", str(home), "--set", *changes, "--out", str(tmp_path / "other")]
    fails(capsys, [*command, "--init-from", f"sit:{tmp_path / 'weights.pt'}"], "weights.pt", "another network")


def test_wrong_settings_are_answered_in_one_line(home, vae, tmp_path, capsys):
    def refused(recipe, *words, changes=()):
        command = ["train", recipe, "--data-dir", home, "--out", tmp_path / "run", "--set", *changes, "batch_size=6"]
        fails(capsys, command, *words)
        assert not (tmp_path / "run").exists()

    refused("fashion", "size must be at most 28", changes=["size=32"])
    refused("fashion", "unknown net 'vit': choose from", changes=["net=vit"])
    refused("fashion", "net 'mlp' does not fit samples of shape (1, 28, 28)", changes=["net=mlp"])
    refused("fashion", "size 27 must be a multiple of patch 2", changes=["size=27"])
    refused("cifar", "size 30 must halve 2 times", changes=["size=30"])
    refused("imagenet", "size is 8 there, not 32")
    refused("imagenet", "unknown DiT 'xxl-2'", changes=["net=dit-xxl-2", "size=8"])
    refused("fashion", "batch_size 6 must be a multiple of accumulate 4", changes=["accumulate=4"])
    refused("fashion", "precision must be one of float32, tf32, bf16", changes=["precision=fp8"])
    refused("fashion", "compile must be one of none, default", changes=["compile=yes"])
    refused("fashion", "graphs overwrite gradients", changes=["compile=graphs", "accumulate=2"])
    refused("fashion", "graphs overwrite gradients", changes=["compile=graphs", "parallel=fsdp"])
    refused("fashion", "clip_norm must be a number > 0, or None", changes=["clip_norm=0"])
    refused("toy", "net 'unet' does not fit", changes=["net=unet"])
    refused("cifar", "net 'dit' needs heads, patch, which recipe cifar does not set", changes=["net=dit"])
    refused("fashion", "times must be 2 numbers", changes=['times=["a",1]'])
    refused("fashion", "guidance_range must be 2 numbers", changes=["guidance_range=[1]"])
    refused("fashion", "subset must be at least 0", changes=["subset=-1"])
    refused("fashion", "eval_samples must be at least 6", changes=["eval_samples=4"])
    refused("fashion", "lr must be a number > 0", changes=["lr=Infinity"])
    refused("fashion", "nofile.pth: no such file: features are", changes=["features=nofile.pth"])
    refused("imagenet", "config.json: no such file", changes=["vae=nowhere", "size=8"])
    refused("cifar", "no such checkpoint", changes=["init_from=nowhere"])
    write_folder(tmp_path / "few", n=20)
    command = ["train", "cifar", "--data", tmp_path / "few", "--set", "size=16", "--out", tmp_path / "run"]
    fails(capsys, command, "2 images are kept to measure", "at least 12", "so 240 in the folder, which holds 40")
    write_folder(tmp_path / "many", classes=40)
    command = ["train", "cifar", "--data", tmp_path / "many", "--set", "size=16", "--out", tmp_path / "run"]
    fails(capsys, command, "12 images are kept", "diversity needs two of one class among the 6")
    fails(capsys, ["encode", home / "pictures", "--vae", vae, "--size", "0", "--out", tmp_path / "run"], "size must be")
    fails(capsys, ["encode", home / "nowhere", "--vae", vae, "--out", tmp_path / "run"], "no such folder")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("in the way")
    fails(capsys, ["train", "fashion", "--data-dir", home, "--out", tmp_path / "file" / "run"], "file")


def test_resuming_refuses_what_it_would_ignore(home, tmp_path, capsys):
    run, changes = tmp_path / "run", ["--set", *ENGINE, *RUNS["fashion"]]
    assert main(["train", "fashion", "--data-dir", str(home), *changes, "--out", str(run)]) == 0

    def refused(*words, recipe="fashion", options=()):
        fails(capsys, ["train", recipe, "--resume", "--out", run, *options], "keeps its settings", *words)

    refused("recipe is 'fashion' there, not 'cifar'", recipe="cifar")
    refused("recipe is 'fashion' there, not 'toy'", recipe="toy")
    refused("data is 'fashion' there, not 'mnist'", options=["--data", "mnist"])
    refused("seed is 0 there, not 7", options=["--seed", "7"])
    refused("init_from", options=["--init-from", tmp_path])
    fails(capsys, ["sample", run, "--vae", tmp_path], "this run makes none")
    moved = home.rename(home.with_name("moved"))
    try:
        assert main(["train", "fashion", "--resume", "--out", str(run), "--data-dir", str(moved)]) == 0
        assert main(["evaluate", str(run)]) == 0
    finally:
        moved.rename(home)


def test_flow_matching_starts_where_twinflow_started(home, tmp_path):
    """The baseline of a run has its first weights too; and both runs are judged by the same classifier."""
    small = [
        "steps=1",
        "warmup_steps=0",
        "base_steps=0",
        "batch_size=6",
        "eval_samples=12",
        "lr=1e-20",
        "muon_lr=1e-20",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    train = ["train", "fashion", "--data-dir", str(home)]
    assert main([*train, "--set", *ENGINE, *RUNS["fashion"], "--out", str(first)]) == 0
    changes = ["--set", *small, *RUNS["fashion"], "subset=2"]
    assert main([*train, *changes, "--init-from", str(first), "--seed", "5", "--out", str(second)]) == 0
    assert main(["evaluate", str(second)]) == 0
    weights = [trained(folder)[0].state_dict() for folder in (first, second, second / "flow-matching")]
    assert all(torch.equal(w[name], weights[0][name]) for w in weights for name in weights[0])
    judges = [torch.load(folder / "classifier.pt", weights_only=True)["net"] for folder in (first, second)]
    assert all(torch.equal(judges[0][name], judges[1][name]) for name in judges[0])


def test_every_recipe_has_the_settings_that_scripts_rely_on():
    """The list of the design page."""
    common = {"steps", "batch_size", "lr", "share", "order", "guidance", "warmup_steps", "ema", "log_every"}
    for recipe in RECIPES.values():
        assert common | {"checkpoint_every"} <= recipe.keys()


def test_latents_are_decoded_for_inception_and_for_pictures(home, vae, tmp_path, monkeypatch):
    """The path to a FID on ImageNet: latents to pixels to torchvision's Inception, here with random weights."""
    from tinytwinflow.evaluation import pictures

    torch.manual_seed(0)
    weights = torchvision.models.inception_v3(weights=None, init_weights=False).state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    drawn, draw = [], pictures.draw
    monkeypatch.setattr(pictures, "draw", lambda path, panels, *rest: (drawn.extend(panels), draw(path, panels, *rest)))
    changes = [*ENGINE, *RUNS["imagenet"], f"vae={vae}", f"features={tmp_path / 'inception.pth'}"]
    command = ["train", "imagenet", "--data-dir", str(home), "--set", *changes, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(result["floor"]) == IMAGE_METRICS - {"accuracy"} and result["samples"] == 6
    assert all(x.shape[1:] == (3, 16, 16) for _, x, *_ in drawn)
