"""The front door: any data in, samples out in the units and the type of the data, and nothing lost on the way."""

import copy
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_folder, write_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import tinytwinflow as ttf
from tinytwinflow.data.given import Table, as_data_set, in_units
from tinytwinflow.method import path
from tinytwinflow.runs.evaluate import rows_of, yardstick
from tinytwinflow.training.loop import train

QUICK = {"steps": 6, "width": 16, "depth": 2, "batch_size": 16, "eval_samples": 60}
OF_NET = {"steps": 6, "batch_size": 16, "eval_samples": 60}  # of a network of one's own
IMAGES = {"steps": 4, "width": 16, "depth": 1, "heads": 2, "batch_size": 8, "eval_samples": 20}


class Net(torch.nn.Module):
    """A network of a user's own."""

    def __init__(self, dim=2):
        super().__init__()
        self.f = torch.nn.Sequential(torch.nn.Linear(dim + 2, 32), torch.nn.SiLU(), torch.nn.Linear(32, dim))

    def forward(self, x, t, r, cond=None):
        return self.f(torch.cat([x, t[:, None], r[:, None]], dim=1))


class Doubled(Net):
    """One that answers in another type than it is asked in."""

    def forward(self, x, t, r, cond=None):
        return super().forward(x, t, r).double()


@settings(max_examples=25)
@given(st.sampled_from(["float32", "float64", "int64", "uint8"]), st.booleans(), st.integers(1, 3), st.integers(0, 99))
def test_standardised_and_mapped_back_is_the_same_in_units_and_type(dtype, array, dim, seed):
    """in_units(standardise(x)) = x, whatever the scale: also seconds of a clock, which float32 cannot tell apart."""
    rng = np.random.default_rng(seed)
    whole = dtype in ("int64", "uint8")
    x = rng.integers(0, 250, (40, dim)) if whole else rng.normal(1.7e9 if dtype == "float64" else 30, 10, (40, dim))
    x = x.astype(dtype) if array else torch.from_numpy(x.astype(dtype))
    table = Table(x, 8)
    back = in_units(table.table, table.scaling)
    assert type(back) is type(x) and back.dtype == x.dtype
    assert table.table.dtype == torch.float32 and (table.table.std(0) - 1).abs().max() < 1e-3
    np.testing.assert_allclose(np.asarray(back, float), np.asarray(x, float), rtol=0, atol=0.5 if whole else 1e-4)


def test_points_come_back_in_their_units_and_type():
    x = np.random.default_rng(0).normal([1000, -5], [20, 0.1], (500, 2))
    model = ttf.fit(x, **QUICK | {"steps": 200, "lr": 1e-2})
    y = model.sample(1000, seed=0)
    assert isinstance(y, np.ndarray) and y.dtype == np.float64 and y.shape == (1000, 2)
    assert (np.abs(y.mean(0) - x.mean(0)) < x.std(0)).all() and (y.std(0) < 3 * x.std(0)).all()
    z = ttf.fit(torch.from_numpy(x).float(), **QUICK).sample(3)
    assert torch.is_tensor(z) and z.dtype == torch.float32
    assert torch.equal(model.net.state_dict()["out.weight"], model.run.state.average.state_dict()["out.weight"])


def test_jumps_go_by_way_of_the_times_that_the_settings_say_and_euler_steps_by_even_ones(tmp_path):
    """2 NFE of the toy recipe stop at t = 0.5^2.5; `evaluate` measures the same samples."""
    own = ttf.fit("moons", **QUICK, out=tmp_path / "run", lr=1e-2).own
    model, z = ttf.load(tmp_path / "run"), torch.randn(60, 2, generator=torch.Generator().manual_seed(5))
    mid = torch.full((60,), 0.5**2.5)
    with torch.no_grad():
        x = path.jump(z, own.net(z, torch.ones(60), mid), torch.ones(60), mid)
        x = path.jump(x, own.net(x, mid, torch.zeros(60)), mid, torch.zeros(60))
    torch.testing.assert_close(model.draw(60, steps=2, seed=5), x)
    yard = yardstick(own.config)
    rows, kept = rows_of(own, (2,), yard)
    torch.testing.assert_close(kept["twinflow", 2], model.draw(60, steps=2, seed=0))
    assert torch.equal(model.draw(60, steps=3, seed=5, mode="multi"), ttf.sample(own.net, z, 3, mode="multi"))
    even = ttf.fit("moons", **QUICK, lr=1e-2, time_shape=(1, 1, 1))
    assert torch.equal(even.draw(60, steps=2, seed=5), ttf.sample(even.net, z, 2))


def test_labels_make_the_model_conditional():
    """Two clouds, one a label: each label's samples lie at its own cloud."""
    label = np.arange(400) % 2
    x = np.random.default_rng(0).normal(0, 0.3, (400, 2)) + 4 * label[:, None]
    model = ttf.fit((x, label), **QUICK | {"steps": 300, "lr": 1e-2, "batch_size": 64})
    assert model.config["conditional"] and model.net.classes == 2
    low, high = (model.sample(200, cond=k, seed=0).mean() for k in (0, 1))
    assert high - low > 2
    for cond in (np.array([0, 1, 1, 0]), [0, 1, 1, 0], np.int64(1), torch.tensor(1), True):
        assert model.sample(4, cond=cond).shape == (4, 2)
    with pytest.raises(ValueError, match="cond has 2 rows, x has 4"):
        model.sample(4, cond=[0, 1])
    with pytest.raises(ValueError, match=r"cond \[0, 1, 2, 0\]: this run knows labels 0 to 1"):
        model.sample(4, cond=[0, 1, 2, 0])
    with pytest.raises(ValueError, match="cond 2: this run knows labels 0 to 1"):
        model.sample(4, cond=2)


def test_images_of_bytes_come_back_as_bytes():
    pixels = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    model = ttf.fit((pixels, torch.arange(60) % 3), **IMAGES)
    assert model.config["size"] == 8 and model.sample(5).dtype == torch.uint8 and model.sample(5).shape == (5, 3, 8, 8)
    assert {row["nfe"] for row in model.evaluate(nfes=(1, 2))["rows"]} == {1, 2}
    bare = ttf.fit(pixels.double() / 255, **IMAGES)
    assert bare.sample(2).dtype == torch.float64 and not bare.config["conditional"]
    assert "sliced_wasserstein" in bare.evaluate(nfes=(1,))["floor"]


def test_folders_with_and_without_classes_and_names(tmp_path):
    write_folder(tmp_path / "classes", classes=2, n=80, size=16)
    flat = write_folder(tmp_path / "one", classes=1, n=40, size=16) / "class-0"
    for folder, conditional in ((tmp_path / "classes", True), (flat, False)):
        model = ttf.fit(folder, **IMAGES, size=16)
        assert model.config["conditional"] == conditional
        x = model.sample(3, seed=0)
        assert x.dtype == torch.uint8 and x.shape == (3, 3, 16, 16)
    assert ttf.fit("moons", **QUICK).sample(3).shape == (3, 2)
    write_mnist(tmp_path / "raw", n=60)
    model = ttf.fit("mnist", **IMAGES, data_dir=str(tmp_path / "raw"), size=12)
    assert model.sample(2).shape == (2, 1, 12, 12)


def test_streams_a_loader_a_generator_and_a_function_of_the_step():
    """A loader is gone through again; a generator that ends too early is told so; a function is asked by step."""
    x = 3 * torch.randn(100, 2) + 7
    loader = DataLoader(TensorDataset(x, torch.arange(100) % 4), batch_size=20)
    quick = {name: value for name, value in QUICK.items() if name != "batch_size"}
    model = ttf.fit(loader, **quick | {"steps": 12})
    assert model.net.classes == 4 and model.config["batch_size"] == 20
    with pytest.raises(ValueError, match="the batches given have 20 rows, so batch_size cannot be 16"):
        ttf.fit(loader, batch_size=16)
    assert (model.run.data.mean - x.double().mean(0)).abs().max() < 1e-6
    asked = []
    model = ttf.fit(lambda step: asked.append(step) or x[step % 5 :: 5], **quick)
    assert model.sample(3).shape == (3, 2) and set(range(6)) <= set(asked)
    with pytest.raises(ValueError, match="the iterable ended before step 5: give one that can be gone through again"):
        ttf.fit((x[:20] for _ in range(4)), **quick)
    for source in ([x[:20], x[20:40]], DataLoader(x, batch_size=20, shuffle=True), lambda step: x[step : step + 1]):
        stream = as_data_set(source)
        one, other = stream.fresh(20, 0)[0], stream.fresh(20, 1)[0]
        assert len(one) == len(other) == 20 and not any((row == other).all(1).any() for row in one)
    dicts = as_data_set([(x[:20], {"a": x[:20]}), (x[20:40], {"a": x[20:40]})])
    rows, cond = dicts.fresh(20, 1)
    assert torch.allclose(dicts.standardise(cond["a"]), rows)
    with pytest.raises(ValueError, match="step 17: label 1, but in the first batches they ended with 0"):
        ttf.fit([(x[:20], torch.zeros(20).long())] * 16 + [(x[:20], torch.ones(20).long())], **quick | {"steps": 20})


def test_a_model_read_back_goes_on_with_its_data_and_its_network(tmp_path, monkeypatch):
    """To the same end as one left alone; without its data it says so, whatever lies in the current folder."""
    x = np.random.default_rng(0).normal(5, 2, (100, 2))
    for name, more in (("points", {"width": 16, "depth": 2}), ("own", {"net": Net()})):
        torch.manual_seed(0)
        known = {"steps": 6, "batch_size": 16, "eval_samples": 60, "checkpoint_every": 3, "out": tmp_path / name}
        state = {key: copy.deepcopy(value) for key, value in more.items()}
        whole = ttf.fit(x, **known | more | {"out": tmp_path / f"{name}-whole"})

        def stops(*args, **kwargs):
            yield from itertools.islice(train(*args, **kwargs), 3)

        with monkeypatch.context() as patch:
            patch.setattr("tinytwinflow.runs.run.train", stops)
            ttf.fit(x, **known | state)
        half = ttf.load(tmp_path / name, net=Net() if name == "own" else None)
        assert half.saved["step"] == 3
        with pytest.raises(ValueError, match="read back without its data: train.data. takes them"):
            half.train()
        assert np.array_equal(half.train(x).sample(9, seed=0), whole.sample(9, seed=0))


def test_numbers_of_numpy_are_settings_and_leave_files_that_can_be_read(tmp_path):
    x, run = np.random.default_rng(0).normal(0, 1, (50, 2)), tmp_path / "run"
    numbers = {"lr": np.float64(1e-3), "seed": np.int64(3), "batch_size": np.int32(16), "share": np.float32(0.25)}
    ttf.fit(x, **QUICK | numbers, out=run).save(tmp_path / "deep" / "m.pt")
    assert ttf.load(run).config == ttf.load(tmp_path / "deep" / "m.pt").config
    assert ttf.load(run).config["share"] == 0.25 and ttf.TwinFlowLoss(share=np.float32(0.25)).share == 0.25


def test_a_network_of_ones_own_is_saved_and_read_back_with_it(tmp_path):
    model = ttf.fit(torch.randn(100, 3), net=Net(3), **OF_NET)
    model.save(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="of the user's own"):
        ttf.load(tmp_path / "own.pt")
    assert torch.equal(ttf.load(tmp_path / "own.pt", net=Net(3)).sample(9, seed=1), model.sample(9, seed=1))


def test_saved_and_loaded_in_a_fresh_process_gives_the_same_samples(tmp_path):
    """From a file, from a run folder, from its checkpoint; the file holds no pickled code."""
    x = np.random.default_rng(0).normal(5, 2, (200, 2))
    np.save(tmp_path / "x.npy", x)
    model = ttf.fit(tmp_path / "x.npy", **QUICK, out=tmp_path / "run")
    model.save(tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 6
    np.save(tmp_path / "y.npy", model.sample(50, steps=2, seed=3))
    code = (
        "import sys, numpy as np, tinytwinflow as ttf\n"
        "y = np.load(sys.argv[1])\n"
        "for path in sys.argv[2:]:\n"
        "    assert np.array_equal(ttf.load(path).sample(50, steps=2, seed=3), y), path\n"
    )
    places = [tmp_path / "model.pt", tmp_path / "run", tmp_path / "run" / "checkpoint.pt"]
    subprocess.run([sys.executable, "-c", code, tmp_path / "y.npy", *places], check=True)


@pytest.fixture
def hears_ctrl_c():
    """Where tests run in the background it is ignored.  -> what hears it"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_model_that_samples_and_goes_on_to_the_same_end(hears_ctrl_c, monkeypatch, tmp_path, capsys):
    """Interrupted in the midst of a step it stops after it; going on ends with the weights of a quiet run."""
    x = np.random.default_rng(0).normal(0, 1, (200, 2))
    quiet = ttf.fit(x, **QUICK)

    def interrupted(*args, **kwargs):
        for record in train(*args, **kwargs):
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr("tinytwinflow.runs.run.train", interrupted)
        model, kept = ttf.fit(x, **QUICK), ttf.fit(x, **QUICK, out=tmp_path / "run")
    assert model.saved["step"] == kept.saved["step"] == 3 and "stopped at step 3 of 6" in capsys.readouterr().err
    assert model.sample(4).shape == (4, 2) and ttf.load(tmp_path / "run").saved["step"] == 3
    for again in (model.train(), kept.train()):
        assert np.array_equal(again.sample(20, seed=0), quiet.sample(20, seed=0))
    assert signal.getsignal(signal.SIGINT) is hears_ctrl_c


def test_fit_and_the_command_line_are_the_same_code(tmp_path):
    from tinytwinflow.cli.commands import main

    changes = [f"{name}={value}" for name, value in QUICK.items()]
    assert main(["train", "toy", "--data", "moons", "--set", *changes, "--out", str(tmp_path / "run")]) == 0
    assert torch.equal(ttf.load(tmp_path / "run").sample(30, seed=0), ttf.fit("moons", **QUICK).sample(30, seed=0))


def test_wrong_arguments_of_the_front_door_are_told_in_one_line(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (50, 2))
    model = ttf.fit(x, **QUICK)
    model.save(tmp_path / "model.pt")
    frozen = Net().requires_grad_(False)
    for call, message in [
        (lambda: ttf.fit(x, out=""), "out is the name of a folder, got ''"),
        (lambda: ttf.fit(x, out=3), "out is the name of a folder, got 3"),
        (lambda: ttf.fit(x, net=frozen), "parameters that learn, this one has none"),
        (lambda: ttf.fit(x, net=Net().half()), r"net fails on two samples \(RuntimeError: "),
        (lambda: ttf.fit(x, net=ttf.nets.MLP(2).half()), "weights in float16 do not learn"),
        (
            lambda: ttf.fit(x, net=Doubled()),
            "net's answer to x in float32 must be of such numbers, too, got torch.float64",
        ),
        (lambda: ttf.nets.MLP(0), "must be at least 1, got 0"),
        (lambda: ttf.load(tmp_path / "model.pt", device="cpu:1"), "device 'cpu:1' is unknown or not on this machine"),
        (lambda: model.sample(4, seed="a"), "seed must lie in"),
        (lambda: model.sample(4, cond="a"), "a condition is of numbers, got str"),
        (
            lambda: ttf.TwinFlowLoss(guidance=1.0)(model.net, torch.ones(2, 2), torch.ones(2), null=3.5),
            "null has shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    assert model.sample(np.int64(5)).shape == (5, 2)


def test_a_notebook_shows_samples_and_plots_of_ones_own_stay():
    import matplotlib

    before = matplotlib.get_backend().lower()  # "agg" or "Agg" until something is drawn
    assert ttf.fit("moons", **QUICK)._repr_png_().startswith(b"\x89PNG")
    assert matplotlib.get_backend().lower() == before


def test_randomness_of_ones_own_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ttf.fit("moons", **QUICK).sample(10)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_and_batch_norm_are_still_when_sampling():
    """The average is in evaluation mode: samples are the same twice, and its buffers stay what they are."""

    class Noisy(Net):
        def forward(self, x, t, r, cond=None):
            return super().forward(self.norm(torch.nn.functional.dropout(x, 0.5, self.training)), t, r)

    net = Noisy()
    net.norm = torch.nn.BatchNorm1d(2)
    model = ttf.fit(torch.randn(200, 2), net=net, **OF_NET)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    assert torch.equal(model.sample(50, seed=0), model.sample(50, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_wrong_data_is_told_in_one_line(tmp_path):
    nan = np.zeros((5, 2))
    nan[3] = np.nan
    for data, message in [
        (np.zeros(5), r"samples are arrays \(n, D\) or \(n, C, H, W\), got shape \(5,\)"),
        (np.zeros((5, 2), complex), "samples are real numbers of at most 64 bits, got complex128"),
        (np.zeros((5, 2), bool), "samples are real numbers of at most 64 bits, got bool"),
        (nan, "row 3 holds NaN or infinity"),
        (np.ones((5, 2)), "column 0 is constant"),
        (np.zeros((1, 2)), "needs at least 4 samples, got 1"),
        (np.zeros((5, 28, 28, 3)), r"images are \(n, C, H, W\), got \(5, 28, 28, 3\): transpose them"),
        (np.random.rand(5, 1, 8, 6), "images must be square, got 8 x 6 pixels"),
        ((np.random.rand(5, 2), np.zeros(4, int)), "there are 4 labels for 5 samples"),
        ((np.random.rand(5, 2), np.array([-1, 0, 1, 0, 1])), "labels are whole numbers from 0 on, got -1"),
        ([], "the iterable of batches is empty"),
        (["abc"], r"a batch is x or a pair \(x, condition\) of arrays, got str"),
        (5, "data is an array, a pair of arrays, an iterable, a function or a name, got int"),
        ("blobs", "unknown data set 'blobs'"),
        (tmp_path, "holds no images"),
    ]:
        with pytest.raises(ValueError, match=message):
            ttf.fit(data, **QUICK)
    x = np.random.rand(50, 2)
    for settings_, message in [
        ({"learning_rate": 1e-3}, "unknown setting 'learning_rate': toy has"),
        ({"lr": -1.0}, "lr must be a number > 0, got -1.0"),
        ({"recipe": "mine"}, "unknown recipe 'mine'"),
        ({"share": 2}, r"share must lie in \[0, 1\], got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            ttf.fit(x, **QUICK | settings_)
    for settings_, message in [
        ({"conditional": True}, "labels are .n,. whole numbers from 0 on: other conditions need a net of your own"),
        ({"net": Net(3)}, "shape|size"),
        ({"net": lambda x, t, r, cond=None: x}, "a net to train is an nn.Module, got function"),
        ({"net": Net(), "depth": 9}, "depth would not be read"),
        ({"flip": True}, "flip would not be read"),
        ({"seed": -1}, "seed must lie in"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"compile": "graphs"}, "compile graphs is for device cuda"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            ttf.fit(x, **{k: v for k, v in QUICK.items() if "net" not in settings_} | settings_, out=tmp_path / "none")
        assert not (tmp_path / "none").exists()
    model = ttf.fit(x, **QUICK, out=tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        ttf.fit(x, **QUICK, out=tmp_path / "run")
    for n in (0, 2.0, -1):
        with pytest.raises(ValueError, match="n must be a whole number of samples >= 1"):
            model.sample(n)
    with pytest.raises(ValueError, match="read back without its data"):
        ttf.load(tmp_path / "run").evaluate()
    with pytest.raises(ValueError, match="no such checkpoint"):
        ttf.load(tmp_path / "nowhere.pt")
    model.save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="nothing to go on training with"):
        ttf.load(tmp_path / "m.pt").train()
