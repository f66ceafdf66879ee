"""Files: nothing lost when one cannot be written, and the true reason, in one line, when one cannot be read.

A full disk is a limit on the size of the files of this process, which fails as a disk does; a folder that cannot be
written is one of another user, which `nobody` sees also where the tests are run by root.
"""

import argparse
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import full_at
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import SMALL, fails

import tinytwinflow as ttf
from tinytwinflow.cli.arguments import config_of, parser
from tinytwinflow.cli.commands import main
from tinytwinflow.evaluation.pictures import draw_one
from tinytwinflow.files import aside, read_checkpoint, read_torch, read_weights, write_json
from tinytwinflow.nets import MLP
from tinytwinflow.runs.build import first_weights
from tinytwinflow.runs.folder import read_log, trained
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish, resume
from tinytwinflow.training.distributed import device_of


@contextmanager
def as_nobody():
    """Not root, who may read and write what its owner forbids."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def same(a, b):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@settings(max_examples=12)
@given(st.integers(0, 30000), st.sampled_from(["text", "weights", "picture"]))
def test_of_a_file_that_does_not_fit_on_the_disk_nothing_is_left(tmp_path_factory, room, kind):
    """Whatever writes it and however far it comes: the old file is there, no other, and the error says why."""
    folder = tmp_path_factory.mktemp("full")
    path = folder / "file"
    path.write_bytes(b"old")
    weights, points = {"a": torch.zeros(5000), "b": torch.ones(5000)}, torch.randn(5000, 2).numpy()
    with pytest.raises(OSError, match="File too large") as error, full_at(room if kind != "picture" else room // 4):
        if kind == "text":
            write_json(path, ["a line"] * 10000)
        elif kind == "weights":
            with aside(path) as file:
                torch.save(weights, file)
        else:
            draw_one(path, points, "points")
    assert error.value.filename == str(path) and len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == b"old" and list(folder.iterdir()) == [path]


CHANGES = [*SMALL, "steps=30", "checkpoint_every=7"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    finish(begin(configured("toy", CHANGES), folder))
    return folder


@pytest.mark.parametrize("share", [0.0, 0.02, 0.45, 0.9, 0.999])
def test_a_run_whose_disk_is_full_goes_on_when_there_is_room(quiet, tmp_path, share):
    """Full before the first checkpoint, in the log, or at a later checkpoint, which is longer: what was whole stays,
    nothing else does, and the run ends with the tensors and the log of one that nothing happened to."""
    folder, size = tmp_path / "run", (quiet / "checkpoint.pt").stat().st_size
    with pytest.raises(OSError, match="File too large"), full_at(int(share * size)):
        finish(begin(configured("toy", CHANGES), folder))
    left = {path.name for path in folder.iterdir()}
    assert left <= {"config.json", "log.jsonl", "checkpoint.pt"} and ("config.json" in left) == (share > 0)
    if "checkpoint.pt" in left:
        assert read_checkpoint(folder / "checkpoint.pt")["step"] == 0 and trained(folder)
    finish(resume(folder) if "config.json" in left else begin(configured("toy", CHANGES), folder))
    assert same(read_checkpoint(folder / "checkpoint.pt"), read_checkpoint(quiet / "checkpoint.pt"))
    assert read_log(folder) == read_log(quiet)


def test_the_command_line_says_in_one_line_that_the_disk_is_full(quiet, tmp_path, capsys):
    """In training, and in measuring, which leaves the old picture and table."""
    with full_at(3000):
        fails(capsys, ["train", "toy", "--set", *CHANGES, "--out", tmp_path / "run"], "File too large", "checkpoint.pt")
    assert main(["train", "toy", "--resume", "--out", str(tmp_path / "run"), "--set", *CHANGES]) == 0
    capsys.readouterr()
    picture = (tmp_path / "run" / "samples.png").read_bytes()
    with full_at(5000):
        fails(capsys, ["sample", tmp_path / "run", "--out", tmp_path / "run" / "samples.png"], "samples.png")
    assert (tmp_path / "run" / "samples.png").read_bytes() == picture
    assert not [path for path in (tmp_path / "run").iterdir() if "tmp" in path.name]


@pytest.fixture
def open_to_all():
    """A temporary folder that every user may read; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_may_not_be_read_or_written_is_not_called_damaged(quiet, open_to_all, capsys):
    """Another user's folder and file: "Permission denied", and nothing is left behind."""
    locked = open_to_all / "locked"
    begin(configured("toy", CHANGES), locked)
    (locked / "checkpoint.pt").chmod(0)
    locked.chmod(0o555)
    before = set(locked.iterdir())
    with as_nobody():
        fails(capsys, ["train", "toy", "--set", *CHANGES, "--out", locked / "new"], "Permission denied", "locked/new")
        fails(capsys, ["sample", locked], "Permission denied", "checkpoint.pt")
        fails(capsys, ["train", "toy", "--out", locked, "--resume"], "Permission denied", "checkpoint.pt")
        with pytest.raises(PermissionError):
            first_weights(MLP(2, 16, 2), locked)
    locked.chmod(0o755)
    (locked / "checkpoint.pt").chmod(0o644)
    locked.chmod(0o555)
    with as_nobody():
        fails(capsys, ["train", "toy", "--out", locked, "--resume"], "Permission denied", "log.jsonl.tmp")
    assert set(locked.iterdir()) == before
    finish(resume(locked))
    assert same(read_checkpoint(locked / "checkpoint.pt"), read_checkpoint(quiet / "checkpoint.pt"))


def test_no_memory_is_no_damage(quiet, capsys, monkeypatch):
    for error in (MemoryError("Unable to allocate 3 GiB"), torch.OutOfMemoryError("CUDA out of memory.\nTried")):
        monkeypatch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            read_torch(quiet / "checkpoint.pt")
        fails(capsys, ["sample", quiet], "out of memory")
    huge = ["train", "toy", "--out", quiet.parent / "huge", "--set", *SMALL, "batch_size=4000000000000"]
    fails(capsys, huge, "out of memory (RuntimeError: ", "tried to allocate")


def test_a_device_that_is_not_there_is_named(quiet, capsys):
    for device in ("cpu:1", "cuda:77", "meta", "abacus"):
        fails(capsys, ["sample", quiet, "--device", device], f"device '{device}' is unknown or not on this machine (")
    assert device_of("cpu") == "cpu" and device_of("cpu:0") == "cpu:0"


def mapped(tensor, path):
    """Whether a tensor's memory is a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(at, 16) for at in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what memory is as Linux does")
def test_a_run_is_read_on_the_cpu_without_its_optimiser(quiet):
    """The tensors of a file are mapped, not read; a resumed optimiser has its own, and a loaded model only its net."""
    content, path = read_checkpoint(quiet / "checkpoint.pt"), quiet / "checkpoint.pt"
    assert all(mapped(value, path) for value in content["net"].values())
    state = resume(quiet).state
    moments = [value for each in state.optimizer.state.values() for value in each.values()]
    tensors = [*moments, *state.net.state_dict().values(), *ttf.load(quiet).net.state_dict().values()]
    assert len(moments) > 5 and not any(mapped(tensor, path) for tensor in tensors)
    assert ttf.load(quiet).saved.keys() == trained(quiet).saved.keys() == {"step", "data"}


# Weights of training scripts.


def script_file(path, wrap=lambda w: w, prefix="", seed=1, **more):
    """What a training script saves of an MLP: its weights wrapped and named as it likes.  -> the weights"""
    torch.manual_seed(seed)
    net = MLP(2, 16, 2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    weights = net.state_dict()
    torch.save({**wrap({prefix + name: value for name, value in weights.items()}), **more}, path)
    return weights


@pytest.mark.parametrize(
    "wrap, prefix, said",
    [
        (lambda w: w, "", ""),
        (lambda w: w, "module.", "without 'module.'"),
        (lambda w: {"model": {name: 0 * value for name, value in w.items()}, "ema": w, "opt": {}}, "", "its ema"),
        (lambda w: {"model": w, "epoch": 3}, "module._orig_mod.", "its model, without 'module.', without '_orig_mod.'"),
        (lambda w: {"state_dict": w}, "_orig_mod.", "its state_dict, without '_orig_mod.'"),
        (lambda w: {"average": w, "ema": {}, "net": w}, "", ""),
    ],
)
def test_weights_of_any_training_script_are_found(tmp_path, wrap, prefix, said, capsys):
    """The average before the network, names without what wrappers put before them; what was taken is said."""
    arguments = argparse.Namespace(model="SiT-XL/2", lr=1e-4, cfg=None, resume=False, sizes=[1, 2])
    path = tmp_path / "script.pt"
    more = {"args": arguments} if "" != said != "without 'module.'" else {}
    weights, net = script_file(path, wrap, prefix, **more), MLP(2, 16, 2)
    assert first_weights(net, path) == said and same(dict(net.state_dict()), dict(weights))
    config = configured("toy", [*SMALL, "sharp=false", f"init_from={path}"])
    assert same(dict(begin(config).state.net.state_dict()), dict(weights))
    assert capsys.readouterr().err == (f"{path}: {said}\n" if said else "")


def test_files_without_weights_say_what_they_hold(tmp_path):
    path = tmp_path / "script.pt"
    many = {f"key{i}": i for i in range(9)}
    prefixed = {f"model.{name}": value for name, value in MLP(2, 16, 2).state_dict().items()}  # as Lightning does
    for content, fault in [
        ({"epoch": 3, "args": argparse.Namespace()}, "holds epoch, args, and weights neither there nor under average"),
        (many, "holds key0, key1, key2, key3, key4, key5, 3 more, and weights neither"),
        ({"model": {}, "ema": None}, "holds model, ema, and weights neither"),
        ({"model": MLP(2, 16, 2)}, r"holds a \S*MLP, whose code is not run: save net.state_dict\(\) alone"),
        ({"model": {"a": torch.zeros(1)}, "args": Path("x")}, "holds a pathlib.*Path, whose code is not run"),
        ({"model": {"a": torch.zeros(1)}}, r"holds another network \(a is \(1,\) there, None here\)"),
        ({"state_dict": MLP(2, 16, 1).state_dict()}, r"holds another network \(layers.1.bias is not there\)"),
        (
            {"state_dict": prefixed},
            r"holds another network \(layers.0.bias is not there; it holds model.layers.0.bias\)",
        ),
        ({"model": {"a": torch.zeros(1), 3: torch.zeros(1)}}, "weights neither"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=fault) as error:
            first_weights(MLP(2, 16, 2), path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="holds no average, data, step, so .* it holds model"):
        ttf.load(path)
    with pytest.raises(ValueError, match="a folder, not a checkpoint"):
        read_weights(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for wrap in (lambda w: {"ema": w, "args": argparse.Namespace(x=Trap())}, lambda w: {"ema": w, "opt": Trap()}):
        script_file(tmp_path / "trap.pt", wrap)
        with pytest.raises(ValueError, match="holds a .*mkdir, whose code is not run"):
            read_weights(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["run_12:30:00", "v1:2", "C:\\x", "sit", "dit:x"])
def test_paths_with_a_colon_are_whole(tmp_path, monkeypatch, name):
    """Of folders and files, given from here or from the root; sit: and dit: alone are prefixes, and only of weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    weights = script_file(tmp_path / name / "checkpoint.pt")
    net = MLP(2, 16, 2)
    first_weights(net, tmp_path / name)
    assert same(dict(net.state_dict()), dict(weights))
    given = f"./{name}"
    args = parser().parse_args(["train", "toy", "--init-from", given, "--out", "o"])
    assert config_of(args, "toy")["init_from"] == str(tmp_path / name)
    config = config_of(args, "toy") | {"width": 16, "depth": 2, "sharp": False}
    assert same(dict(begin(config).state.net.state_dict()), dict(weights))
    changes = [f"features={name}", f"vae={name}", f"init_from=sit:{name}"]
    config = config_of(parser().parse_args(["train", "imagenet", "--set", *changes, "--data", "moons"]), "imagenet")
    assert config["features"] == config["vae"] == str(tmp_path / name)
    assert config["init_from"] == f"sit:{tmp_path / name}"
    text = config_of(parser().parse_args(["train", "text", "--set", f"model={name}"]), "text")
    assert text["model"] == str(tmp_path / name)
