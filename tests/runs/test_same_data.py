"""A run knows its data: resumed or measured on others it says in one line what differs, whatever kind they are of."""

import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import seeds, write_cifar, write_folder, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_commands import SMALL, fails

import tinytwinflow as ttf
from tinytwinflow.backbones.texts import Texts
from tinytwinflow.cli.commands import main
from tinytwinflow.data.batches import known_of, mark_of, spread
from tinytwinflow.data.given import Stream, Table
from tinytwinflow.data.images import Images
from tinytwinflow.data.latents import LATENTS_INDEX
from tinytwinflow.data.points import Points
from tinytwinflow.runs.checks import same_data
from tinytwinflow.training import sharded

RNG = np.random.default_rng(0)


def points(folder):
    np.save(folder / "x.npy", RNG.normal(10, 1, (300, 2)))

    def other():
        np.save(folder / "x.npy", RNG.normal(-500, 1, (300, 2)))

    return lambda: Points(folder / "x.npy", 8), other, r"the mean of column 0 was (10|9)\.\d+, is now -(500|499)"


def fewer(folder):
    np.savetxt(folder / "x.csv", RNG.normal(10, 1, (300, 2)), delimiter=",")

    def other():
        lines = (folder / "x.csv").read_text().splitlines()
        (folder / "x.csv").write_text("\n".join(lines[:-1]) + "\n")

    return lambda: Points(folder / "x.csv", 8), other, "count was 300, is now 299"


def shuffled(folder):
    x = RNG.normal(10, 1, (300, 2))
    np.save(folder / "x.npy", x)
    return lambda: Points(folder / "x.npy", 8), lambda: np.save(folder / "x.npy", x[::-1]), "as many, but some"


def labels(folder):
    x, y = RNG.normal(0, 1, (300, 2)), np.arange(300) % 2
    given = [y, 1 - y]
    return lambda: Table(x, 8, labels=given[0]), lambda: given.pop(0), "as many, but some"


def named(folder):
    write_mnist(folder, zipped=False)

    def other():
        path = folder / "train-images-idx3-ubyte"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 255
        path.write_bytes(raw)

    return lambda: Images("mnist", 8, folder=folder, size=28), other, "as many, but some"


def cifar(folder):
    write_cifar(folder)

    def other():
        write_cifar(folder / "more", n=21)
        (folder / "cifar-10-batches-py").rename(folder / "old")
        (folder / "more" / "cifar-10-batches-py").rename(folder / "cifar-10-batches-py")

    return lambda: Images("cifar10", 8, folder=folder), other, "count was 100, is now 105"


def pictures(folder):
    write_folder(folder / "p")

    def other():
        path = folder / "p" / "class-1" / "3.png"
        Image.new("RGB", (30, 24), "red").save(path)

    return lambda: Images(str(folder / "p"), 8, size=16), other, "as many, but some"


def one_more_class(folder):
    write_folder(folder / "p")
    return (
        lambda: Images(str(folder / "p"), 8, size=16),
        lambda: write_folder(folder / "p" / "z", 1),
        "classes was 2, is",
    )


def latents(folder):
    x = RNG.normal(0, 1, (8, 2, 8, 4, 4)).astype(np.float16)
    np.save(folder / "latents-00000.npy", abs(x))
    index = {"shards": ["latents-00000.npy"], "labels": [0, 1] * 4, "classes": 2, "scale": 0.18, "shift": 0.0}
    (folder / LATENTS_INDEX).write_text(json.dumps(index))
    change = lambda: np.save(folder / "latents-00000.npy", abs(x[::-1]))  # noqa: E731
    return lambda: Images(str(folder), 4, size=4), change, "as many, but some"


def texts(folder):
    def write(value):
        words = {"prompt_embeds": torch.full((8, 5, 12), value)}
        safetensors.torch.save_file({**words, "latents": torch.ones(8, 4, 4, 4)}, folder / "texts-00000.safetensors")
        safetensors.torch.save_file({"prompt_embeds": torch.zeros(1, 5, 12)}, folder / "null.safetensors")

    write(1.0)
    tensors = {"prompt_embeds": ["F32", [5, 12]], "latents": ["F32", [4, 4, 4]]}
    index = {"shards": ["texts-00000.safetensors"], "sizes": [8], "tensors": tensors, "null": "null.safetensors"}
    (folder / "texts.json").write_text(json.dumps(index))
    return lambda: Texts(folder, 4), lambda: write(2.0), "as many, but some"


def stream(folder):
    means = [0.0, 3.0]
    batch = lambda i: np.random.default_rng(i).normal(means[0], 1, (32, 2))  # noqa: E731
    return lambda: Stream(batch), lambda: means.pop(0), r"the mean of column 0 was [\d.e-]+, is now (3|2\.9)"


KINDS = (points, fewer, shuffled, labels, named, cifar, pictures, one_more_class, latents, texts, stream)


@pytest.mark.parametrize("kind", KINDS)
def test_data_are_known_again_and_others_are_refused(kind, tmp_path):
    made, change, words = kind(tmp_path)
    known = known_of(made())
    same_data(made(), known, "run")
    same_data(made(), {name: value for name, value in known.items() if name not in ("count", "mark")}, "old run")
    change()
    with pytest.raises(ValueError, match=f"run was begun with other data: {words}") as error:
        same_data(made(), known, "run")
    assert len(str(error.value).splitlines()) == 1


def test_named_sets_drawn_afresh_need_no_mark():
    assert known_of(Points("moons", 8)) == {"shape": [2], "classes": 2, "mean": None, "std": None}


@pytest.mark.parametrize("command", [["train", "toy", "--resume", "--out"], ["evaluate"]])
def test_a_file_that_changed_is_told_by_the_command_and_nothing_is_written(command, tmp_path, capsys):
    file, run = tmp_path / "x.npy", tmp_path / "run"
    np.save(file, RNG.normal(10, 1, (300, 2)))
    whole = ["train", "toy", "--data", str(file), "--set", *SMALL, "checkpoint_every=2", "--unmeasured"]
    assert main([*whole, "--out", str(run)]) == 0
    before = {path: path.read_bytes() for path in run.iterdir()}
    np.save(file, RNG.normal(-500, 1, (300, 2)))
    fails(capsys, [*command, run], f"{run} was begun with other data: the mean of column 0 was ", "is now -")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert main(["sample", str(run), "--out", str(tmp_path / "y.npy")]) == 0
    assert abs(np.load(tmp_path / "y.npy").mean() - 10) < 5


def test_a_stream_goes_on_in_the_units_that_its_run_began_with(tmp_path, monkeypatch):
    """Its first batches are others after a stop, so their mean and spread are; the model's units must not move."""

    class Loader:
        def __init__(self, seed):
            self.seed = seed

        def __iter__(self):
            rng = np.random.default_rng(self.seed)
            return (rng.normal(7, 2, (16, 2)) for _ in range(20))

    train = ttf.training.loop.train
    with monkeypatch.context() as patch:
        patch.setattr("tinytwinflow.runs.run.train", lambda *a, **k: itertools.islice(train(*a, **k), 3))
        ttf.fit(Loader(0), steps=6, checkpoint_every=3, width=16, depth=2, out=tmp_path / "run")
    half = ttf.load(tmp_path / "run")
    began, whole = half.saved["data"], half.train(Loader(1)).saved["data"]
    assert whole["mean"].equal(began["mean"]) and whole["std"].equal(began["std"])
    assert not Stream(Loader(1)).mean.equal(began["mean"])
    assert half.run.data.standardise(torch.full((1, 2), 7.0)).allclose(((7 - began["mean"]) / began["std"]).float())


def test_images_in_memory_are_kept_and_known_again(tmp_path):
    x, y = RNG.integers(0, 256, (60, 1, 8, 8), np.uint8), np.arange(60) % 3
    for name, images in (("bytes", x), ("floats", x / 10)):
        ttf.fit((images, y), steps=3, batch_size=8, width=16, depth=1, out=tmp_path / name)
        model = ttf.load(tmp_path / name)
        assert model.sample(3).dtype == images.dtype
        with pytest.raises(ValueError, match="begun with other data: "):
            model.train((images[::-1], y))


@settings(max_examples=20)
@given(st.integers(1, 5000), st.integers(1, 1024))
def test_rows_for_a_mark_are_few_and_far_between(n, most):
    rows = spread(n, most)
    assert 1 <= len(rows) <= most and rows[0] == 0 and 0 <= n - 1 - rows[-1] < -(-n // most)
    assert len(rows) == n or most < n


@given(seeds)
def test_a_mark_tells_order_and_each_number_apart(seed):
    x = np.random.default_rng(seed).normal(size=(4, 2))
    y = x.copy()
    y[3, 1] = np.nextafter(y[3, 1], 9)
    marks = {mark_of(x), mark_of(y), mark_of(x[::-1]), mark_of(x, "a"), mark_of(x, b"b"), mark_of("a", x)}
    assert len(marks) == 6 and mark_of(x) == mark_of(torch.from_numpy(x))


class Channels:
    """Images of a user: scaling by channel, a condition with a part that is None, a count of another meaning."""

    shape, classes, on_disk = (3, 4, 4), 0, False
    scaling = {"mean": torch.zeros(3, 1, 1), "std": torch.full((3, 1, 1), 2.0), "units": ["torch", "float32"]}
    null = {"mask": None, "text": torch.zeros(1, 5)}

    def count(self, label):
        """A method of theirs, which is no number of samples."""

    def fresh(self, n, draw=0):
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(n, *self.shape, generator=generator)
        return x, {"mask": None, "text": torch.randn(n, 5, generator=generator)}

    def batch(self, step):
        return self.fresh(8, step + 2)


class Told(torch.nn.Module):
    """A field that looks at the text alone."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 48)

    def forward(self, x, t, r, cond):
        assert cond["mask"] is None
        return self.layer(cond["text"]).view(x.shape)


def test_scaling_by_channel_and_conditions_with_gaps_are_kept_drawn_and_read_back(tmp_path):
    torch.manual_seed(0)
    quick = {"steps": 2, "warmup_steps": 0, "base_steps": 0, "eval_samples": 6}
    model = ttf.fit(Channels(), Told(), conditional=True, sample_every=1, out=tmp_path / "run", **quick)
    assert (tmp_path / "run" / "samples-000002.png").exists()
    model.save(tmp_path / "model.pt")
    cond = {"mask": None, "text": np.ones((2, 5), np.float32)}
    for path in ("run", "model.pt"):
        again = ttf.load(tmp_path / path, net=Told())
        assert torch.equal(again.sample(2, cond=cond, seed=0), model.sample(2, cond=cond, seed=0))
    for wrong, match in (("a", "a condition is of numbers, got str"), ({"text": np.ones((3, 5))}, "text has 3 rows")):
        with pytest.raises(ValueError, match=match) as error:
            model.sample(2, cond=wrong)
        assert len(str(error.value).splitlines()) == 1


def test_a_model_that_could_not_be_read_back_is_not_written(tmp_path):
    model = ttf.fit(RNG.normal(size=(50, 2)), steps=1, warmup_steps=0, base_steps=0, batch_size=8)
    model.net.out.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 1: weight out.bias is not finite"):
        model.save(tmp_path / "model.pt")
    assert not any(tmp_path.iterdir())


def test_a_stream_may_come_in_another_order_with_a_rare_label_late():
    def stream(at):
        return Stream(lambda i: (RNG.normal(size=(8, 2)), np.full(8, 3 if i == at else i % 3)))

    known = known_of(stream(5))
    other = stream(20)
    assert other.classes == 3
    same_data(other, known, "run")
    assert other.classes == 4 and other.batch(20)[1].tolist() == [3] * 8


def test_pieces_keep_a_mean_that_is_zero(tmp_path):
    folder = tmp_path / sharded.PREFIX
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    data = {"shape": [1, 4, 4], "classes": 0, "mean": 0.0, "std": 1.0, "units": ["torch", "float32"]}
    (folder / sharded.ABOUT).write_text(json.dumps({"step": 3, "size": 1, "data": data}))
    found = sharded.about(folder)["data"]
    assert found["mean"].equal(torch.tensor(0.0, dtype=torch.float64)) and found["std"] == 1


def test_a_note_of_the_data_that_was_cut_is_told_in_one_line(tmp_path):
    x = RNG.normal(size=(50, 2))
    known = known_of(Table(x, 8))
    with pytest.raises(ValueError, match="the mean of column 1 was .*, is now "):
        same_data(Table(x, 8), known | {"mean": known["mean"][:1], "std": known["std"][:1]}, "run")
    ttf.fit(x, steps=1, warmup_steps=0, base_steps=0, batch_size=8).save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt")
    content["data"] |= {"shape": [1, 4, 4], "mean": None, "std": None}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: net 'mlp' does not fit samples of shape \(1, 4, 4\)"):
        ttf.load(tmp_path / "model.pt")
