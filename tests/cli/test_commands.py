"""The command line as a user meets it: what it leaves behind, and one line for each wrong use."""

import json
import os
import signal

import numpy as np
import pytest
import torch

import tinytwinflow as ttf
from tinytwinflow.cli.commands import main
from tinytwinflow.runs.folder import read_config, trained
from tinytwinflow.training import checkpoints
from tinytwinflow.training.loop import train

SMALL = ["width=16", "depth=2", "batch_size=16", "steps=6", "warmup_steps=2", "base_steps=1", "eval_samples=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run, made by the default command."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert main(["--set", *SMALL, "--out", str(folder)]) == 0
    return folder


def check_metrics(folder, metrics=("sliced_wasserstein", "off_data", "energy_distance", "coverage", "diversity")):
    result = json.loads((folder / "metrics.json").read_text())
    assert {"data", "seed", "seconds", "device", "floor", "rows"} <= result.keys()
    assert set(metrics) == result["floor"].keys()
    for row in result["rows"]:
        assert set(metrics) | {"method", "mode", "nfe"} == row.keys()
    return {(row["method"], row["nfe"]) for row in result["rows"]}


def test_default_command_leaves_a_table_and_a_picture(run, capsys):
    assert {path.name for path in run.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "samples.png", "metrics.json", "flow-matching", "play.html",
    }  # fmt: skip
    flow = {("flow matching", 1), ("flow matching", 100)}
    assert check_metrics(run) == {("twinflow", 1), ("twinflow", 2), ("twinflow", 4)} | flow
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "log.jsonl").read_text().splitlines()) == 6
    own, flow = (json.loads((f / "config.json").read_text()) for f in (run, run / "flow-matching"))
    assert {key for key in own if own[key] != flow[key]} == {"order", "share", "warmup_steps", "base_steps"}


def test_default_command_moves_an_earlier_run_aside(tmp_path, capsys):
    folder = tmp_path / "toy"
    for _ in range(3):
        assert main(["--set", *SMALL, "--out", str(folder)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "toy.1", "toy.2"}
    assert "moved to" in capsys.readouterr().out


def test_only_a_run_is_moved_and_never_from_under_our_feet(tmp_path, capsys, monkeypatch, run):
    """What else is in the way stays where it is, byte for byte; an empty folder is taken."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    for out in ("thesis", "file", "."):
        fails(capsys, ["--set", *SMALL, "--out", out], f"{out} is there and no run, so it is not moved: choose another")
    assert (tmp_path / "thesis" / "config.json").read_text() == '{"model_type": "llama"}'
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "file"}
    monkeypatch.chdir(run)
    fails(capsys, ["--set", *SMALL, "--out", "."], "is the folder that we are in, so it is not moved")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["--set", *SMALL, "--out", "."]) == 0
    assert (tmp_path / "empty" / "metrics.json").exists() and not (tmp_path / "empty.1").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_clusters_end_lose_no_step(number, tmp_path, capsys, monkeypatch):
    """Both end a run after its step with a checkpoint, and say truly that it goes on from there; to the same end."""
    command = ["train", "toy", "--unmeasured", "--set", *SMALL]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    def asked(*args, **kwargs):
        for record in train(*args, **kwargs):
            if record["step"] == 3:
                os.kill(os.getpid(), number)
            yield record

    with monkeypatch.context() as patch:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
        patch.setattr("tinytwinflow.runs.run.train", asked)
        assert main([*command, "--out", str(tmp_path / "run")]) == 130
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err and trained(tmp_path / "run").saved["step"] == 3
    assert main([*command, "--resume", "--out", str(tmp_path / "run")]) == 0
    a, b = (trained(tmp_path / name).net.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_steps_alone_and_measured_later(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "toy", "--set", *SMALL, "--unmeasured", "--out", str(folder)]) == 0
    assert "evaluate measures it" in capsys.readouterr().out and not (folder / "metrics.json").exists()
    assert main(["train", "toy", "--set", *SMALL, "--resume", "--out", str(folder)]) == 0
    assert "measuring; --set eval_samples=N takes fewer" in capsys.readouterr().out
    assert check_metrics(folder) >= {("twinflow", 1), ("twinflow", 4)}
    (folder / "samples.png").rename(folder / "samples.png.tmp")  # as if it had been killed while it drew
    assert main(["train", "toy", "--set", *SMALL, "--resume", "--out", str(folder)]) == 0
    assert (folder / "samples.png").exists() and not (folder / "samples.png.tmp").exists()
    assert main(["train", "toy", "--set", *SMALL, "--resume", "--out", str(folder)]) == 0
    assert "was measured" in capsys.readouterr().out


def test_help_and_version_say_what_there_is(capsys):
    for words, told, untold in [
        (["--version"], [f"tinytwinflow {ttf.__version__}, torch {torch.__version__}"], []),
        (["toy", "--help"], ["checkerboard", "FILE.csv", "`python -m tinytwinflow settings`"], ["fashion", "cifar10"]),
        (["train", "--help"], ["checkerboard", "fashion", "cifar10", "--unmeasured"], []),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        shown = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0
        assert all(text in shown for text in told) and not any(text in shown for text in untold)


def test_a_name_with_dollars_is_drawn_and_measured_and_one_sample_too(tmp_path, capsys):
    """matplotlib would read what is between two of them as a formula."""
    file, folder = tmp_path / "a $1 b $_2 数.npy", tmp_path / "run"
    np.save(file, np.random.default_rng(0).standard_normal((200, 1)))
    assert main(["--data", str(file), "--set", *SMALL, "--out", str(folder)]) == 0
    assert main(["evaluate", str(folder)]) == 0
    capsys.readouterr()
    assert main(["sample", str(folder), "--n", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_evaluate_prints_the_table_of_metrics_json(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    rows = check_metrics(run)
    assert {nfe for method, nfe in rows if method == "twinflow"} == {1, 2, 4, 8, 100}
    printed = capsys.readouterr().out
    for row in json.loads((run / "metrics.json").read_text())["rows"]:
        assert f"{row['sliced_wasserstein']:.4f}" in printed


def test_train_then_sample(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "toy", "--data", "moons", "--set", *SMALL, "--out", str(folder), "--seed", "3"]) == 0
    assert check_metrics(folder, ("sliced_wasserstein", "off_data", "energy_distance", "diversity")) == {
        ("twinflow", n) for n in (1, 2, 4)
    }
    for arguments in (["--steps", "3", "--mode", "few"], ["--steps", "2", "--mode", "multi"], []):
        for out in ("x.npy", "x.png"):
            assert main(["sample", str(folder), "--n", "50", *arguments, "--out", str(tmp_path / out)]) == 0
        assert np.load(tmp_path / "x.npy").shape == (50, 2)
    assert main(["evaluate", str(folder)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["train", "toy", "--resume", "--out", str(folder)]) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "had taken its last step and was measured" in capsys.readouterr().out


def test_a_file_of_a_model_is_sampled_beside_it_and_measured_elsewhere(run, tmp_path, capsys):
    """The pictures of a file have its name; `evaluate`, whose table lies in a run folder, says what to do."""
    ttf.load(run).save(tmp_path / "m.pt")
    assert main(["sample", str(tmp_path / "m.pt"), "--n", "50"]) == 0
    assert main(["sample", str(tmp_path / "m.pt"), "--n", "50", "--steps", "2"]) == 0
    there = {"m.pt", "m-samples-1.png", "m-samples-2.png"}
    assert {path.name for path in tmp_path.iterdir()} == there
    assert capsys.readouterr().out == "".join(f"{tmp_path}/m-samples-{n}.png\n" for n in (1, 2))
    fails(capsys, ["evaluate", tmp_path / "m.pt"], "m.pt: evaluate takes a run folder", "ttf.load(FILE).evaluate()")
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_table_of_an_earlier_step_is_not_taken_for_the_last(tmp_path, monkeypatch, capsys):
    """Stopped, evaluated, resumed, and killed before it was measured: resumed once more it is."""
    folder, real = tmp_path / "run", checkpoints.write_checkpoint

    def stop(path, content):
        real(path, content)
        if content["step"] == 3:
            raise KeyboardInterrupt

    changes = [*SMALL, "checkpoint_every=3"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", stop)
        assert main(["train", "toy", "--set", *changes, "--out", str(folder)]) == 130
    assert main(["evaluate", str(folder)]) == 0
    early = (folder / "metrics.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("tinytwinflow.cli.commands.evaluate", lambda *_, **__: read_config("killed here"))
        assert main(["train", "toy", "--resume", "--out", str(folder)]) == 2
    assert main(["train", "toy", "--resume", "--out", str(folder)]) == 0
    assert (folder / "metrics.json").read_text() != early
    assert check_metrics(folder) == {("twinflow", n) for n in (1, 2, 4)}


@pytest.mark.parametrize("mode", ["any", "few", "multi"])
def test_the_same_seed_gives_the_same_samples(run, tmp_path, mode):
    def points(seed):
        out = tmp_path / "x.npy"
        arguments = ["--n", "50", "--steps", "3", "--mode", mode, "--seed", str(seed), "--out", str(out)]
        assert main(["sample", str(run), *arguments]) == 0
        return np.load(out)

    first, again, other = points(1), points(1), points(2)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_users_points_of_any_dimension(tmp_path, capsys):
    """Five columns on very different scales: samples come back in the units of the file."""
    raw = np.random.default_rng(0).normal([0, 100, -5, 3, 1e4], [1, 20, 0.1, 2, 500], (300, 5))
    np.savetxt(tmp_path / "points.csv", raw, delimiter=",")
    folder, changes = tmp_path / "run", [*SMALL, "steps=60", "lr=1e-2", "batch_size=64"]
    assert main(["--data", "points.csv", "--data-dir", str(tmp_path), "--set", *changes, "--out", str(folder)]) == 0
    (tmp_path / "points.csv").unlink()
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.npy"), "--steps", "4"]) == 0
    x = np.load(tmp_path / "x.npy")
    assert x.shape[1] == 5
    assert (np.abs(x.mean(0) - raw.mean(0)) < 2 * raw.std(0)).all()


def test_conditional_runs_sample_by_label(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["--set", *SMALL, "conditional=true", "guidance=0.5", "--out", str(folder)]) == 0
    assert main(["sample", str(folder), "--cond", "3", "--out", str(tmp_path / "x.npy")]) == 0
    assert main(["sample", str(folder), "--cond", "8"]) == 2
    assert "this run knows labels 0 to 7" in capsys.readouterr().err


def test_compare_trains_each_method_once_and_resumes(tmp_path, capsys):
    """One table of costs and one of quality a data set; called again it prints the same without training."""
    methods = ["flow matching", "twinflow", "dmd2", "meanflow lr=1e-3 width=8"]
    command = ["compare", "--data", "moons", "8gaussians", "--seeds", "2", "--jobs", "2", "--methods", *methods]
    command += ["--set", *SMALL, "--out", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "| flow matching, 100 NFE |" in first and "| meanflow lr=1e-3 width=8 | any-step | 0 / 0 | 2 x |" in first
    assert "| dmd2 | adversarial | 2 / 1 | 5 x |" in first
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert len(result["rows"]) == 2 * (5 + 4 + 1 + 4)
    runs = {name: tmp_path / "moons" / "seed-1" / name for name in ("dmd2", "meanflow-lr=1e-3-width=8")}
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in runs.items()}
    assert configs["dmd2"]["width"] == 16 and configs["meanflow-lr=1e-3-width=8"]["width"] == 8
    own = [json.loads((tmp_path / "moons" / f"seed-{seed}" / "dmd2" / "metrics.json").read_text()) for seed in (0, 1)]
    values = [row["sliced_wasserstein"] for r in own for row in r["rows"] if row["nfe"] == 1]
    row = next(r for r in result["rows"] if (r["data"], r["method"], r["nfe"]) == ("moons", "dmd2", 1))
    assert row["sliced_wasserstein"] == pytest.approx(sum(values) / 2) and values[0] != values[1]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint.pt"))]
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint.pt"))] and len(times) == 16
    fails(capsys, [*command[:-2], "lr=0.5", *command[-2:]], "other settings")
    old = tmp_path / "moons" / "seed-1" / "dmd2" / "metrics.json"  # as before there was off_data
    measured = json.loads(old.read_text())
    old.write_text(json.dumps({**measured, "floor": {}, "rows": []}))
    assert main(command) == 0
    assert capsys.readouterr().out == first
    again = json.loads(old.read_text())
    assert (again["rows"], again["floor"]) == (measured["rows"], measured["floor"])
    assert again["seconds"] > measured["seconds"]
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint.pt"))]


def test_compare_reports_a_method_that_diverges(tmp_path, capsys):
    """With the step, in the table, and the other methods are measured all the same."""
    methods = ["flow matching", "shortcut lr=1e30"]
    command = ["compare", "--data", "moons", "--seeds", "1", "--jobs", "1", "--methods", *methods]
    assert main([*command, "--set", *SMALL, "steps=200", "--out", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| shortcut lr=1e30 | div"))
    assert "seed 0: step" in line
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert all(("sliced_wasserstein" in row) == (row["method"] == "flow matching") for row in rows)


def test_a_peer_trains_from_the_command_line(tmp_path, capsys):
    """`--set method=` takes any of them; the run resumes, samples and evaluates like every other."""
    folder = tmp_path / "run"
    changes = ["width=16", "depth=2", "batch_size=16", "steps=6", "warmup_steps=2", "eval_samples=64"]
    peer = ["method=dmd2", 'peer={"every":1}']
    assert main(["train", "toy", "--data", "moons", "--set", *changes, *peer, "--out", str(folder)]) == 0
    assert main(["train", "toy", "--data", "moons", "--set", *changes, *peer, "--out", str(folder), "--resume"]) == 0
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.npy")]) == 0
    assert main(["evaluate", str(folder)]) == 0
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {(row["method"], row["mode"]) for row in rows} == {("dmd2", "any"), ("flow matching", "multi")}


def fails(capsys, arguments, *words):
    """The command exits with 2 and one line that holds the words."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error, error


def test_wrong_words_are_answered_with_the_right_ones(capsys, tmp_path, run):
    fails(capsys, ["draw"], "draw", "sample", "evaluate")
    fails(capsys, ["train", "cifar100", "--out", tmp_path / "a"], "unknown recipe 'cifar100'", "toy")
    fails(capsys, ["train", "toy", "--data", "blobs", "--out", tmp_path / "a"], "unknown data set 'blobs'", "moons")
    fails(capsys, ["--set", "learning_rate=1", "--out", tmp_path / "b"], "unknown setting 'learning_rate'", "lr")
    fails(capsys, ["--set", "lr", "--out", tmp_path / "b"], "key=value")
    fails(capsys, ["--set", "steps=many", "--out", tmp_path / "b"], "steps must be at least 1", "'many'")
    fails(capsys, ["--set", "steps=1.5", "--out", tmp_path / "b"], "steps must be at least 1 and whole, got 1.5")
    fails(capsys, ["--set", "conditional=7", "--out", tmp_path / "b"], "conditional must be true or false, got 7")
    fails(capsys, ["--set", "steps=0", "--out", tmp_path / "b"], "steps must be at least 1")
    fails(capsys, ["--set", "share=2", "--out", tmp_path / "b"], "share must lie in [0, 1]")
    fails(capsys, ["--set", "metric=lpips", "--out", tmp_path / "b"], "squared, normalised")
    fails(capsys, ["--set", "steps=10", "warmup_steps=10", "--out", tmp_path / "b"], "the method never starts")
    fails(capsys, ["--set", "guidance=1", "--out", tmp_path / "b"], "guidance needs labels")
    fails(capsys, ["--set", "times=[1]", "--out", tmp_path / "b"], "times must be 2 numbers")
    fails(capsys, ["--device", "abacus", "--out", tmp_path / "b"], "device 'abacus'")
    fails(capsys, ["sample", run, "--mode", "fast"], "unknown mode 'fast': choose from any, few, multi")
    fails(capsys, ["sample", run, "--steps", "0"], "steps must be a whole number of network calls >= 1")
    fails(capsys, ["sample", run, "--n", "0"], "--n must be at least 1")
    fails(capsys, ["sample", run, "--out", "x.jpg"], "FILE.png or FILE.npy")
    fails(capsys, ["sample", run, "--cond", "1"], "no labels")
    fails(capsys, ["compare", "--data", "blobs", "--out", tmp_path / "c"], "unknown data set 'blobs'")
    fails(capsys, ["compare", "--seeds", "0", "--out", tmp_path / "c"], "--seeds must be at least 1")
    fails(capsys, ["compare", "--jobs", "0", "--out", tmp_path / "c"], "--jobs must be at least 1")
    fails(capsys, ["compare", "--methods", "gan", "--out", tmp_path / "c"], "unknown method 'gan'", "dmd2", "twinflow")
    fails(capsys, ["compare", "--methods", "dmd rate=1", "--out", tmp_path / "c"], "unknown setting 'rate'")
    fails(capsys, ["--set", "method=gan", "--out", tmp_path / "b"], "method must be one of", "sana-sprint", "'gan'")
    fails(capsys, ["--set", "method=vsd", 'peer={"alpha":1}', "--out", tmp_path / "b"], "vsd has no such setting")
    fails(capsys, ["--set", 'peer={"alpha":1}', "--out", tmp_path / "b"], "peer is for a method or base that is one")
    fails(
        capsys, ["--set", "method=sid", "base_steps=5", "--out", tmp_path / "b"], "base_steps are for method twinflow"
    )
    fails(capsys, ["--set", "recompute=true", "--out", tmp_path / "b"], "recompute is for networks with blocks", "mlp")
    for seed in ("-1", "1.5", str(2**64)):
        fails(capsys, ["train", "toy", f"--seed={seed}", "--out", tmp_path / "b"], "a seed is a whole number", seed)
        fails(capsys, ["sample", run, f"--seed={seed}"], "a seed is a whole number", seed)
    fails(capsys, ["bench", "--training", "adapters"], "--training is not for mlp")
    fails(capsys, ["bench", "--batch-size", "largest"], "--batch-size largest is not for mlp")
    fails(capsys, ["bench", "--net", "qwen_image", "--training", "adapters"], "unknown net 'qwen_image'", "qwen-image")
    fails(capsys, ["bench", "--batch-size", "0"], "a batch has 1 row or more")
    fails(capsys, ["bench", "--net", "qwen-image", "--compile", "graphs"], "--compile graphs is for small networks")
    fails(capsys, ["bench", "--compile", "yes"], "--compile must be one of none, default, graphs")
    fails(capsys, ["bench", "--compile", "graphs"], "compile graphs is for device cuda, got cpu")
    fails(capsys, ["--set", "compile=graphs", "--out", tmp_path / "b"], "compile graphs is for device cuda, got cpu")
    fails(capsys, ["memory", "--net", "unet"], "unknown net 'unet'", "dit-s-2")
    fails(capsys, ["memory", "--batch-size", "0"], "--batch-size must be at least 1")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists(), "a refused command leaves no folder"


def test_wrong_files_are_named(capsys, tmp_path):
    for name, content, fault in [
        ("missing.csv", None, "no such file"),
        ("empty.csv", "", "empty"),
        ("words.csv", "1,2\nthree,4\n", "line 2: 'three' is not a finite number"),
        ("nan.csv", "1,2\n3,nan\n", "line 2: 'nan' is not a finite number"),
        ("one.CSV", "1,2\n", "at least 4 samples"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        fails(capsys, ["--data", tmp_path / name, "--out", tmp_path / "run"], str(tmp_path / name), fault)
        assert not (tmp_path / "run").exists()


def test_wrong_run_folders_are_named(capsys, tmp_path, run):
    import shutil

    fails(capsys, ["evaluate", tmp_path / "nowhere"], "nowhere", "no such file")
    fails(capsys, ["train", "toy", "--resume", "--out", tmp_path / "nowhere"], "no such run to resume")
    fails(capsys, ["train", "toy", "--out", run], "already holds a run", "--resume")
    fails(capsys, ["train", "toy", "--resume", "--out", run, "--set", "lr=1"], "keeps its settings", "lr")

    def copy(name):
        shutil.copytree(run, tmp_path / name)
        return tmp_path / name

    bare = copy("bare")
    (bare / "checkpoint.pt").unlink()
    cut = copy("cut")
    (cut / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    noise = copy("noise")
    (noise / "checkpoint.pt").write_bytes(b"")
    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "width": 24}))
    plain = copy("plain")
    torch.save({"a": torch.zeros(2)}, plain / "checkpoint.pt")
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    flipped = copy("flipped")
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (flipped / "checkpoint.pt").write_bytes(content)
    text = copy("text")
    (text / "checkpoint.pt").write_text("weights")
    poor = copy("poor")
    (poor / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "net"}))
    for folder, fault in [
        (flipped, "damaged"),
        (text, "no checkpoint"),
        (poor, "net missing"),
        (bare, "no such checkpoint"),
        (cut, "cut short"),
        (noise, "cut short"),
        (other, "another network"),
        (plain, "no checkpoint of this library"),
        (broken, "not the settings of a run"),
    ]:
        fails(capsys, ["sample", folder], str(folder), fault)
        fails(capsys, ["evaluate", folder], str(folder), fault)
        fails(capsys, ["train", "toy", "--resume", "--out", folder], str(folder), fault)


def test_a_run_that_diverges_says_where(capsys, tmp_path):
    """A learning rate that blows up: exit code 1, the step and the term, and a checkpoint that still loads."""
    folder = tmp_path / "run"
    changes = [*SMALL, "steps=500", "lr=1e30", "checkpoint_every=1"]
    assert main(["train", "toy", "--set", *changes, "--out", str(folder)]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "step" in error
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.npy")]) == 0


def test_bench_prints_ratios(capsys):
    from tinytwinflow.benchmarks import speed as bench

    figures = bench.bench_steps(batch_size=32, points=100, rounds=1)
    printed = capsys.readouterr().out
    assert "x flow matching" in printed and "matrix peak" in printed
    measured = {"steps", "sampling", "peak", "share_of_peak", "memory", "compile_seconds", "graphs"}
    assert measured == figures.keys() and figures["graphs"] == 0 and "compiled" not in printed


def test_bench_of_a_dit_runs_a_small_one_on_a_cpu(capsys, monkeypatch):
    """Every loss's step, with and without guidance, and sampling at 1, 2 and 100 NFE; here of one layer."""
    from tinytwinflow.benchmarks import speed as bench
    from tinytwinflow.nets.dit import SIZES

    monkeypatch.setitem(SIZES, "s", (64, 1, 2))
    figures = bench.bench_steps(net="dit-xl-2", batch_size=2, points=2, rounds=1)
    printed = capsys.readouterr().out
    assert "dit-s-8 (on a CPU in place of dit-xl-2), 32 x 32 x 4 latents, batch 2" in printed
    assert figures["steps"].keys() == figures["memory"].keys() and len(figures["steps"]) == 4
    assert figures["sampling"].keys() == {1, 2, 100} and figures["sampling"][100] > 10 * figures["sampling"][1]
    with pytest.raises(ValueError, match="unknown DiT 'xxl-2'"):
        bench.bench_steps(net="dit-xxl-2")
