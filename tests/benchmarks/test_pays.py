"""Where the twin pays: costs are what a training calls, and every method goes on from the same weights."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import write_mnist
from torch.autograd import forward_ad

from tinytwinflow.benchmarks import compare, pays
from tinytwinflow.cli.commands import main
from tinytwinflow.evaluation.features import Classifier
from tinytwinflow.evaluation.pictures import draw_costs
from tinytwinflow.runs.build import data_of, state_of
from tinytwinflow.runs.folder import trained
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish, steps
from tinytwinflow.runs.settings import loss_of
from tinytwinflow.training.loop import fill_helpers

FLOW = {"order": 0, "share": 0.0, "warmup_steps": 0, "base_steps": 0, "eval_samples": 64}
FEW_PAIRS = 'dmd peer={"pairs":40,"steps":3}'
LINES = [FEW_PAIRS if name.startswith("dmd with") else name for name in pays.COMPARED]
LINES += ["twin on meanflow", "twin on shortcut share=0.5", "twin alone", "freeflow", "drifting"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A flow-matching run, its network moved far from its average."""
    config = configured("toy", **FLOW, steps=8, width=16, depth=2, batch_size=48, lr=0.3)
    return finish(begin(config, tmp_path_factory.mktemp("runs") / "flow"), shown=False).folder


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_a_flow_matching_step_costs_one(batch):
    assert pays.cost_of(configured("toy", **FLOW, steps=5, batch_size=batch)) == 5


def by_hand(text, count, **changes):
    """Forward calls of one row of a few steps of 40 rows."""
    config = configured("toy", text.split(), steps=count, batch_size=40, warmup_steps=0, base_steps=0, **changes)
    return round(pays.cost_of(config) * 3 * 40, 6)


def test_costs_by_hand():
    """Forty rows, twelve any-step, twelve flow, eight adversarial, eight rectify: fakes of eight, all with gradient,
    three jumps of the teacher for twelve, both velocities for eight; with guidance both conditions for 24 more."""
    twin = 8 + 3 * 40 + 3 * 12 + 2 * 8
    ours = "order=3 share=0.4 flow_share=0.5"
    assert by_hand(ours, 4) == 4 * twin
    assert by_hand(f"{ours} guidance=0.5 conditional=true", 2) == 2 * (twin + 2 * 24)
    assert by_hand("order=2 share=0 flow_share=0.5", 3) == 3 * (3 * 40 + 2 * 20)
    assert by_hand("method=meanflow", 3) == 3 * (2 * 10 + 3 * 40), "a call in forward mode is two"
    assert by_hand("method=shortcut", 3) == 3 * (3 * 40 + 2 * 10)
    dmd = 3 * 40 + 2 * 40 + 3 * 40 + 3 * 10
    assert by_hand('method=dmd peer={"pairs":100,"steps":4}', 5) == 400 + 5 * dmd, "pairs are made once"
    with_labels = by_hand('method=dmd peer={"pairs":100,"steps":4} conditional=true', 5)
    assert with_labels == 5 * (dmd + 4 * 10), "and with labels at every step"
    assert by_hand('method=dmd2 peer={"every":1}', 2) == 2 * (3 * 40 + 2 * 3 * 40 + 3 * 40 + 3 * 40 + 2 * 40)
    assert by_hand("", 2, method="consistency distillation") == 2 * (3 + 3) * 40


@pytest.mark.parametrize("line", LINES)
def test_costs_are_those_of_the_real_training(line, flow):
    """Rows that go through the networks of a run, told by hooks on them; its noise is that which costs are drawn by."""
    config, rows = pays.fine_tuned(line, flow, 5), []
    run = begin(config)

    def count(net, given, answer):
        forwards = 3 if answer.requires_grad else 2 if forward_ad.unpack_dual(answer).tangent is not None else 1
        rows.append(len(given[0]) * forwards)

    for network in (run.state.net, run.state.teacher, *run.state.helpers.values()):
        network.register_forward_hook(count)
    assert len(list(steps(run))) == 5
    assert sum(rows) == pytest.approx(pays.cost_of(config) * 3 * 48)


@pytest.mark.parametrize("line", LINES)
def test_every_method_goes_on_from_the_average_of_the_run(line, flow):
    """Network, averages and all networks beside it, at the first step, which is one of the method's own."""
    config, before = pays.fine_tuned(line, flow, 50), trained(flow).net.state_dict()
    assert (config["warmup_steps"], config["base_steps"], config["steps"]) == (0, 0, 50)
    state, loss = state_of(config, data_of(config)), loss_of(config)
    fill_helpers(state, loss, 0, 50)
    for network in (state.net, state.average, state.teacher, *state.helpers.values()):
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_lines_are_those_that_they_are_called(flow):
    """The run's network and data; the recipe's loss, or the paper's base; a peer's own settings; those given last."""
    printed = {"order": 2, "one_step_share": 0, "jump_c": None, "share": 1 / 3, "gain": 4.0, "clip": 10.0}
    found = pays.fine_tuned("twinflow on the paper's base", flow, 5)
    assert {key: found[key] for key in printed} == printed and (found["width"], found["lr"]) == (16, 0.3)
    assert pays.fine_tuned("the paper's base lr=0.1", flow, 5, ["lr=0.2"]) == found | {"share": 0.0, "lr": 0.1}
    ours, base = (pays.fine_tuned(name, flow, 5) for name in ("twinflow", "rcgm"))
    recipe = configured("toy")
    assert {key: ours[key] for key in printed} == {key: recipe[key] for key in printed} and recipe["order"] == 8
    assert base == ours | {"share": 0.0}
    assert pays.fine_tuned("dmd", flow, 5)["peer"] == {"regression": 1.0}
    assert pays.fine_tuned("dmd with few pairs", flow, 5)["peer"] == {"regression": 1.0, "pairs": 4096}
    assert pays.fine_tuned("flow matching", flow, 5)["order"] == 0
    assert pays.fine_tuned("twin on meanflow", flow, 5) == ours | {"base": "meanflow", "peer": {"power": 0.5}}
    assert pays.fine_tuned("twin alone", flow, 5) == ours | {"share": 1.0, "rectify_clip": 1.0}
    for name, needs in (("apex", "shifted=True"), ("pixel meanflow", "predicts=data")):
        with pytest.raises(ValueError, match=f"{name} goes on from a run with {needs}"):  # which the run has not
            pays.fine_tuned(name, flow, 5)


def test_the_command_makes_table_and_picture_and_goes_on(flow, tmp_path, capsys, monkeypatch):
    """Figures and costs are means over the seeds' runs; called again it trains nothing, with a longer one that alone;
    without a rate all methods stay where they began."""
    # processes of their own, which take seconds to start, are those of every comparison
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    command = ["compare", "--from", str(flow), "--methods", "twinflow lr=1e-12", "meanflow", "dmd2 lr=1e-12"]
    command += ["shortcut lr=1e30"]
    command += ["--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "out"), "--steps"]
    assert main([*command, "3", "2"]) == 0
    first, result = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    runs = [json.loads((tmp_path / f"out/meanflow/steps-3/seed-{seed}/metrics.json").read_text()) for seed in (0, 1)]
    row = next(row for row in result["rows"] if (row["method"], row["steps"]) == ("meanflow", 3))
    figures = [run["rows"][0]["sliced_wasserstein"] for run in runs]
    assert row["sliced_wasserstein"] == pytest.approx(sum(figures) / 2) and figures[0] != figures[1]
    assert row["cost"] == 3.5 and [row["steps"] for row in result["rows"]] == [2] * 4 + [3] * 4
    still = {row["off_data"] for row in result["rows"] if "lr=1e-12" in row["method"]}
    assert len(still) == 1, "both stay what the run was"
    cells = f"{row['sliced_wasserstein']:.3f} ± {row['sliced_wasserstein_spread']:.3f} (4)"
    assert "| method | 2 steps | 3 steps |" in first and cells in first and "| flow matching, 100 NFE |" in first
    assert "| shortcut lr=1e30 | diverged (seed 0: step 2" in first
    assert first.startswith((tmp_path / "out" / "table.md").read_text()[:-1])
    assert (tmp_path / "out" / "pays.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("checkpoint.pt")}
    assert main([*command, "2", "3"]) == 0 and capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("checkpoint.pt")} == times
    assert len(times) == 16
    assert main([*command, "2", "--set", "width=8"]) == 2 and "other settings" in capsys.readouterr().err


def test_the_picture_has_a_panel_a_metric_and_a_line_a_method(tmp_path, monkeypatch):
    """Costs across, figures up, in the colours of the other pictures; the run and real data lie across them."""
    drawn = []
    monkeypatch.setattr("tinytwinflow.evaluation.pictures._save", lambda figure, path: drawn.append(figure))
    rows = [
        {"method": m, "cost": c, "a": 1 / c, "a_spread": 0.1, "b": 0.5, "b_spread": 0.0}
        for m in ("twinflow", "twinflow order=2", "rcgm", "dmd")
        for c in (10, 100)
    ]
    lines = {f"flow matching, {n} NFE": {"a": 0.2, "b": 0.1} for n in (1, 100)} | {"real data": {"a": 0.1, "b": 0.01}}
    names = ["twinflow", "twinflow order=2", "rcgm", "dmd"]
    draw_costs(tmp_path / "x.png", rows, lines, names, {"a": ("A", ".3f"), "b": ("B", ".2%")})
    left, right = drawn[0].axes
    found = {c.get_label(): c.lines[0] for c in left.containers}
    assert list(found) == names and all(list(line.get_xdata()) == [10, 100] for line in found.values())
    assert list(found["dmd"].get_ydata()) == [0.1, 0.01]
    colors = [line.get_color() for line in found.values()]
    assert colors[0] == colors[1] != colors[2] and len({*colors}) == 3
    assert [line.get_linestyle() for line in found.values()] == ["-", "--", "-", "-"]
    across = [line.get_label() for line in left.lines if not line.get_label().startswith("_")]
    assert across == ["flow matching, 100 NFE", "real data"] and left.get_xscale() == right.get_yscale() == "log"


def test_adapters_of_a_dit_are_trained_alone(tmp_path):
    """They begin as the run, cost a third less in gradients, and leave all but themselves and two embedders as it was;
    figures are those of images, by the classifier that is kept for all."""
    write_mnist(tmp_path)
    image = {"data": "mnist", "data_dir": str(tmp_path), "size": 8, "width": 8, "depth": 1, "heads": 2, "patch": 4}
    before = begin(configured("fashion", **FLOW | image, steps=2, batch_size=12), tmp_path / "flow")
    finish(before, shown=False)
    torch.save({"net": Classifier(1, 10).state_dict()}, tmp_path / "classifier.pt")
    config = pays.fine_tuned("twinflow", tmp_path / "flow", 3) | {"lr": 0.1}
    net, x = pays.adapted(config, 2), torch.randn(4, 1, 8, 8)
    rest = torch.rand(4), torch.zeros(4), torch.arange(4)
    torch.testing.assert_close(net(x, *rest), trained(tmp_path / "flow").net(x, *rest))
    first = copy.deepcopy(net.state_dict())
    begin(config, tmp_path / "run", net=net)
    pays.fine_tune(tmp_path / "run", config, "twinflow", tmp_path, adapters=2)
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["rows"][0]["nfe"] == 1 and result["rows"][0]["frechet"] > 0
    assert pays.cost_of(config) - result["cost"] == pytest.approx(3 / 3)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["net"]
    moved = {name for name in after if not torch.equal(after[name], first[name])}
    assert any(name.startswith("blocks.0.attn.qkv.lora_B") for name in moved)
    assert all(any(name.startswith(f"times.{part}.") for name in moved) for part in ("r", "twin"))
    assert all("lora_" in name or name.startswith(("times.r.", "times.twin.")) for name in moved), moved


def test_wrong_uses_are_refused_in_one_line(flow, tmp_path, capsys):
    other = begin(configured("toy", steps=9, width=8, depth=2, eval_samples=64), tmp_path / "twin").folder
    out = ["--out", tmp_path / "out"]
    for given, words in [
        (["--from", tmp_path / "none"], "is no run folder"),
        (["--from", other], "is a run of twinflow: --from takes one of flow matching"),
        (["--from", flow, "--methods", "gan"], "unknown method 'gan': choose from twinflow on the paper's base"),
        (["--from", flow, "--methods", "dmd rate=1"], "unknown setting 'rate'"),
        (["--from", flow, "--steps", "50", "0"], "--steps must be at least 1, got 0"),
        (["--from", flow, "--data", "moons"], "--from takes the data of its run: leave --data out"),
        (["--from", flow, "--set", "steps=3"], "steps is no setting with --from"),
        (["--from", flow, "--adapters", "8"], "--adapters are for a dit, this run has net 'mlp'"),
        (["--steps", "50"], "--steps and --adapters are for --from RUN"),
    ]:
        assert main([str(word) for word in ["compare", *given, *out]]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "out").exists(), given
