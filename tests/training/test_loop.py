"""The loop and the run folder: nothing lost, nothing changed by stopping, nothing bad saved."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tinytwinflow import Losses, TwinFlowLoss, peers
from tinytwinflow.data.points import Points
from tinytwinflow.files import read_checkpoint
from tinytwinflow.method import path
from tinytwinflow.nets import MLP, mlp, shifted, times
from tinytwinflow.runs.build import dressed
from tinytwinflow.runs.folder import read_log, sampled, trained
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.run import begin, finish, steps
from tinytwinflow.training import ema, loop
from tinytwinflow.training.checkpoints import write_checkpoint
from tinytwinflow.training.in_backward import in_backward
from tinytwinflow.training.loop import OPTIONS, autocast, learning_rate, loss_of_batch, matrix_units, train
from tinytwinflow.training.state import new_state

SMALL = ["width=16", "depth=2", "batch_size=16", "warmup_steps=4", "base_steps=0", "eval_samples=64"]


def config(*changes, seed=0):
    return configured("toy", [*SMALL, *changes], seed=seed)


def small_state(seed=0):
    torch.manual_seed(seed)
    return new_state(MLP(2, 16, 2), lr=1e-2, seed=seed)


def weights(state):
    return [p for net in (state.net, state.average, state.teacher) for p in net.state_dict().values()]


@settings(max_examples=8)
@given(st.integers(1, 11), st.integers(0, 3))
def test_interrupted_training_equals_uninterrupted(stop, seed):
    """Stopped after any step, saved, loaded into fresh objects and continued: every record and weight the same."""
    batch, loss = Points("moons", 16, seed).batch, TwinFlowLoss()
    unlabelled = lambda i: (batch(i)[0], None)  # noqa: E731
    whole = small_state(seed)
    records = list(train(whole, loss, unlabelled, 12, warmup_steps=4))
    first, second = small_state(seed), small_state(seed + 10)
    before = list(itertools.islice(train(first, loss, unlabelled, 12, warmup_steps=4), stop))
    second.load_state_dict(first.state_dict())
    second.optimizer.param_groups[0]["initial_lr"] = 1e-2
    assert before + list(train(second, loss, unlabelled, 12, warmup_steps=4)) == records
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second)))


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(tmp_path):
    """kill -9 again and again, wherever it strikes; the run still ends with the weights and log of a quiet one."""
    changes = [*SMALL, "steps=200", "checkpoint_every=20"]
    command = [sys.executable, "-m", "tinytwinflow", "train", "toy", "--set", *changes, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    subprocess.run([*command, str(quiet)], check=True, env=environment, capture_output=True)
    killed.mkdir()
    kills = 0
    while True:
        with subprocess.Popen([*command, str(killed), "--resume"], env=environment, stderr=subprocess.PIPE) as process:
            log = killed / "log.jsonl"
            lines = log.read_text().count("\n") if log.exists() else 0
            while process.poll() is None and kills < 3:
                if log.exists() and log.read_text().count("\n") > lines + 30:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
            said = process.communicate()[1].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert kills
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 201, "lo')  # where the kill struck while a line was written
    a, b = read_checkpoint(quiet / "checkpoint.pt"), read_checkpoint(killed / "checkpoint.pt")
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
    assert all(torch.equal(a["average"][name], b["average"][name]) for name in a["average"])
    assert read_log(quiet) == read_log(killed)


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, state = tmp_path / "checkpoint.pt", small_state()
    write_checkpoint(path, state.state_dict())

    def cut_short(content, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, {**state.state_dict(), "step": 7})
    assert read_checkpoint(path)["step"] == 0


def test_a_loss_that_is_not_finite_stops_with_its_step_and_term(tmp_path):
    """The weights are untouched, and a checkpoint with a weight that is not finite is never written."""
    state = small_state()
    before = [p.clone() for p in weights(state)]

    def batch(step):
        return torch.full((4, 2), float("nan") if step else 0.0), None

    steps = train(state, TwinFlowLoss(), batch, 5)
    next(steps)
    before = [p.clone() for p in weights(state)]
    with pytest.raises(FloatingPointError, match="step 2: the data of its batch are not finite"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state)))
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, state.state_dict())
    next(state.net.parameters()).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="weight layers.0.weight is not finite"):
        write_checkpoint(path, state.state_dict())
    assert all(value.isfinite().all() for value in read_checkpoint(path)["net"].values())


class Given:
    """A loss whose one term is a given number, so far as its value goes; its gradient is that of the mean answer."""

    helpers, mode = {}, "multi"

    def __init__(self, value):
        self.value = value

    def __call__(self, net, x, cond=None, **_):
        t = torch.zeros(len(x))
        total = net(x, t, t, cond).mean()
        return Losses(total - total.detach() + self.value, *torch.zeros(4))


def test_options_have_the_values_of_the_recipe_for_points():
    """Those of the first command: a quarter of the steps flow matching, 35 in 100 the base alone."""
    defaults = {"steps": 2000, "warmup_steps": 500, "base_steps": 700, "ema": 0.999, "teacher_ema": 0.99}
    defaults |= {"label_dropout": 0.1, "accumulate": 1, "clip_norm": None, "precision": "float32"}
    assert {name: option.default for name, option in OPTIONS.items()} == defaults
    in_steps = {name for name, option in OPTIONS.items() if option.unit == "steps"}
    assert in_steps == {"steps", "warmup_steps", "base_steps"}


@example(1.5e5, 0.0, 1)
@example(0.99e5, 0.0, 2)
@given(st.floats(-1e8, 1e8), st.floats(0.0, 30.0), st.sampled_from([1, 2]))
def test_training_stops_just_where_a_term_is_plainly_too_large(value, spread, accumulate):
    """Above 1e5 (1 + mean of x^2), whatever its sign; the largest of healthy runs, SiD's spikes, stay below 1e4."""
    state, x = small_state(), spread * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    before = [p.clone() for p in weights(state)]
    run = train(state, Given(value), lambda step: x, 2, accumulate=accumulate)
    if abs(value) > 1.001e5 * (1 + spread**2):
        with pytest.raises(FloatingPointError, match=rf"step 1: the total loss is {value:.3g}".replace("+", r"\+")):
            next(run)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(state)))
    elif abs(value) < 0.999e5 * (1 + spread**2):
        assert next(run)["total"] == pytest.approx(value, rel=1e-6)


def test_a_loss_that_is_nan_is_named_with_its_term():
    state = small_state()
    with pytest.raises(
        FloatingPointError, match=r"step 1: the total loss is nan; lower lr \(muon_lr too\) or the term's weight"
    ):
        next(train(state, Given(float("nan")), lambda step: torch.ones(2, 2), 2))


def test_samples_astray_are_not_kept(tmp_path, monkeypatch):
    """The last update may have ruined the weights, which no loss has seen: what was kept before stays."""
    run = begin(config("steps=8", "checkpoint_every=2"), tmp_path / "run")
    for record in steps(run):
        if record["step"] == 3:
            run.state.net.out.bias.data += 1e6
            ema.update(run.state.average, run.state.net, 0.0)
            with pytest.raises(FloatingPointError, match=r"step 3: samples have spread 1e\+06, data have 1; lower lr"):
                run.keep()
            break
    assert trained(tmp_path / "run").saved["step"] == 2


@pytest.mark.parametrize(
    "option, message",
    [
        ({"clip_norm": -1}, "clip_norm must be a number > 0, or None, got -1"),
        ({"precision": "fp16"}, "precision must be one of float32, tf32, bf16, got 'fp16'"),
        ({"ema": 2.0}, r"ema must lie in \[0, 1\), got 2.0"),
        ({"teacher_ema": "x"}, r"teacher_ema must lie in \[0, 1\)"),
        ({"label_dropout": 2}, "label_dropout must lie in"),
        ({"steps": 2.5}, "steps must be at least 1 and whole, got 2.5"),
        ({"warmup_steps": -5}, "warmup_steps must be at least 0, got -5"),
        ({"base_steps": None}, "base_steps must be at least 0 and whole, got None"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"accumulate": 2.0}, "accumulate must be at least 1 and whole"),
    ],
)
def test_options_of_the_loop_are_refused_out_of_their_range(option, message):
    with pytest.raises(ValueError, match=message):
        next(train(small_state(), TwinFlowLoss(), lambda i: torch.ones(4, 2), **{"steps": 2} | option))


def test_a_run_that_diverges_stops_and_its_checkpoint_stays(tmp_path):
    """The printed setting on data that nobody standardised: its loss passes 1e25 in some hundred steps if it is let."""
    state, points = small_state(), Points("checkerboard", 128)
    terms = "base|adversarial|rectify|gap"
    with pytest.raises(FloatingPointError, match=rf"step \d+: the ({terms}) loss is [\d.]+e\+\d+; lower lr"):
        for record in train(state, TwinFlowLoss.paper(), lambda i: 5 * points.batch(i)[0], 2000):
            assert max(record.values()) < 3e6
            write_checkpoint(tmp_path / "checkpoint.pt", state.state_dict())
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == record["step"] and all(value.isfinite().all() for value in saved["average"].values())


def test_a_batch_may_be_data_alone_arrays_or_lists_of_labels_and_nothing_else():
    """The same numbers in each form that is plain; a loader where a function belongs is told what makes one of it."""
    x, label = Points("moons", 16).batch(0)
    net = MLP(2, 16, 2, classes=2)

    def records(batch, classes=0):
        torch.manual_seed(0)
        return list(train(new_state(MLP(2, 16, 2, classes)), TwinFlowLoss(), batch, 2))

    first, *others = [records(lambda i, item=item: item) for item in ((x, None), x, x.numpy(), [x], (x.numpy(),))]
    assert all(other == first for other in others)
    of_labels = [label, label.byte(), label.bool(), label.int(), label.numpy(), label.tolist()]
    first, *others = [records(lambda i, y=y: (x, y), classes=2) for y in of_labels]
    assert all(other == first for other in others)
    for batch, message in [
        ([x, x], "batch is a function of the step, got list: data.given.Stream makes one"),
        (torch.utils.data.DataLoader(x), "batch is a function of the step, got DataLoader"),
        (lambda i: 3, "a batch is x or a pair"),
        (lambda i: (x, label[:3]), "cond has 3 rows, x has 16"),
        (lambda i: (x[:3], label), "cond has 16 rows, x has 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(train(new_state(net), TwinFlowLoss(), batch, 2))


def test_warm_up_is_flow_matching_and_twins_come_after(tmp_path):
    finish(begin(config("steps=8"), tmp_path / "run"))
    log = read_log(tmp_path / "run")
    assert [r["step"] for r in log] == list(range(1, 9))
    assert all(r["adversarial"] == r["rectify"] == r["gap"] == 0 for r in log[:4])
    assert all(r["adversarial"] > 0 for r in log[4:])


def test_phases_come_in_order_and_the_teacher_is_the_moving_average():
    """Steps 1-2 flow matching, 3-5 the base alone, then everything; F^- is state.teacher throughout,
    and with decay 0 it is the network itself."""
    seen, state = [], small_state()

    @dataclasses.dataclass
    class Spy(TwinFlowLoss):
        def __call__(self, net, x, cond, teacher, null, generator, turns, **alone):
            seen.append((self.order, self.share))
            assert net is state.net and teacher is state.teacher
            assert alone == {"original": None, "progress": (len(seen) - 3) / 6}, "counted from the end of flow matching"
            return super().__call__(net, x, cond, teacher, null, generator=generator)

    batch = Points("moons", 16).batch
    unlabelled = lambda i: (batch(i)[0], None)  # noqa: E731
    for _ in train(state, Spy(order=3, share=0.5), unlabelled, 8, teacher_ema=0.0, warmup_steps=2, base_steps=3):
        assert all(torch.equal(a, b) for a, b in zip(state.net.parameters(), state.teacher.parameters()))
        assert not all(torch.equal(a, b) for a, b in zip(state.net.parameters(), state.average.parameters()))
    assert seen == [(0, 0.0)] * 2 + [(3, 0.0)] * 3 + [(3, 0.5)] * 3


def test_phases_on_another_base_are_flow_matching_then_that_base_then_both():
    """Steps 1-2 are those of flow matching, weight for weight; in 3-5 the base has all rows, then its share; it is told
    how far training is from the end of flow matching on, and F^- is state.teacher."""
    seen, state, plain = [], small_state(), small_state()

    def base(net, x, cond=None, teacher=None, progress=None, turns=None, null=None, **_):
        assert net is state.net and teacher is state.teacher and turns is not None and null.tolist() == [7]
        seen.append((state.step, len(x), progress))
        return peers.common.terms(flow=net(x, torch.ones(len(x)), torch.zeros(len(x))).square().mean())

    batch = lambda i: (torch.randn(12, 2, generator=torch.Generator().manual_seed(i)), None)  # noqa: E731
    loss = TwinFlowLoss(base=base, share=0.5, metric="normalised", order=3)
    flow_matching = dataclasses.replace(loss, base=None, order=0, share=0.0)
    flow = train(plain, flow_matching, batch, 8, null=7, label_dropout=0.0)
    given = {"null": 7, "label_dropout": 0.0, "warmup_steps": 2, "base_steps": 3}
    for i, record in enumerate(train(state, loss, batch, 8, **given)):
        if i < 2:
            assert record == next(flow) and all(map(torch.equal, weights(state), weights(plain)))
        assert (record["adversarial"] > 0) == (i >= 5)
        assert record["total"] == pytest.approx(record["base"] + record["adversarial"] + record["rectify"], rel=1e-5)
    assert seen == [(i, 12 if i < 5 else 6, (i - 2) / 6) for i in range(2, 8)]


def test_features_are_told_to_the_loss_and_stay_as_they_are():
    """They are no copy of the network, have no gradient and no place in the optimiser; where none are there, as for
    points, the loss is told of none."""
    features, told = torch.nn.Linear(2, 3).requires_grad_(False), []

    class Sees:
        helpers = {"eyes": "features", "fake": "trained"}

        def __call__(self, net, x, fake, eyes=None, **_):
            told.append(eyes)
            y = net(x, torch.ones(len(x)), torch.zeros(len(x))) + fake(x, torch.ones(len(x)), torch.ones(len(x)))
            return peers.common.terms(seen=(y if eyes is None else eyes(y)).square().mean())

    torch.manual_seed(0)
    made = {"helpers": Sees.helpers, "features": features}
    state, before = new_state(MLP(2, 16, 2), **made), copy.deepcopy(features.state_dict())
    learnt = {p for group in state.optimizer.param_groups for p in group["params"]}
    assert list(state.helpers) == ["fake", "eyes"] and not learnt & set(features.parameters())
    assert learnt == {*state.net.parameters(), *state.helpers["fake"].parameters()}
    first = state.net.out.bias.clone()
    for _ in train(state, Sees(), lambda i: torch.ones(4, 2) + i, 3, warmup_steps=1, clip_norm=1.0):
        pass
    assert told == [features] * 2 and not torch.equal(state.net.out.bias, first)
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())
    assert all(p.grad is None for p in features.parameters())
    again = new_state(MLP(2, 16, 2), helpers=Sees.helpers, features=torch.nn.Linear(2, 3).requires_grad_(False))
    again.load_state_dict(state.state_dict())
    assert torch.equal(again.helpers["eyes"].weight, features.weight), "they are saved"
    assert list(new_state(MLP(2, 16, 2), helpers=Sees.helpers).helpers) == ["fake"]
    assert list(new_state(MLP(2, 16, 2), features=features).helpers) == [], "a loss that asks for none"
    list(train(new_state(MLP(2, 16, 2), helpers=Sees.helpers), Sees(), lambda i: torch.ones(4, 2), 1))
    assert told[2:] == [None]


def test_a_run_can_start_from_the_weights_of_another(tmp_path):
    finish(begin(config("steps=6", "share=0", "order=0"), tmp_path / "flow"))
    changes = ["steps=1", "warmup_steps=0", "lr=1e-12", "muon_lr=1e-12", f"init_from={tmp_path / 'flow'}"]
    finish(begin(config(*changes, seed=5), tmp_path / "twin"))
    a, b = trained(tmp_path / "flow")[0], trained(tmp_path / "twin")[0]
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.parameters(), b.parameters()))


def test_the_usual_decays_are_those_of_many_steps_and_of_few():
    """0.999 for the average and 0.99 for the teacher, when the warm-up of both is over."""
    state = small_state()
    state.step = 20_000
    torch.nn.init.normal_(state.net.out.weight)
    before = state.average.out.weight.clone()
    next(train(state, Plain(), lambda i: (torch.ones(2, 2), None), 20_001))
    for average, decay in ((state.average, 0.999), (state.teacher, 0.99)):
        torch.testing.assert_close(average.out.weight, torch.lerp(before, state.net.out.weight, 1 - decay))


@given(st.floats(0, 0.99), st.integers(1, 5))
def test_moving_average_is_the_weighted_sum_of_the_past(decay, steps):
    net = torch.nn.Linear(1, 1).double()
    average, expected = ema.average_of(net), net.weight.item()
    for i in range(steps):
        with torch.no_grad():
            net.weight.fill_(float(i))
        ema.update(average, net, decay)
        expected = decay * expected + (1 - decay) * i
    assert average.weight.item() == pytest.approx(expected)
    assert not average.weight.requires_grad
    with pytest.raises(ValueError, match="decay must lie"):
        ema.update(average, net, 1.0)


@given(st.integers(1, 5000))
def test_learning_rate_rises_then_falls_to_zero(steps):
    rates = [learning_rate(i, steps) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_conditional_training_learns_with_guidance_and_dropout(tmp_path):
    run = finish(begin(config("steps=8", "conditional=true", "guidance=0.5"), tmp_path / "run"))
    assert run.state.net.classes == 8
    assert all(value == value for record in read_log(tmp_path / "run") for value in record.values())


class Plain(TwinFlowLoss):
    """A loss without randomness, so that what the engine does with its gradient shows."""

    seen = []

    def __call__(self, net, x, cond, teacher, null, generator, **alone):
        self.seen.append((cond, torch.is_autocast_enabled("cpu")))
        one = torch.ones(len(x))
        total = (net(x, one, one) - x**2).square().mean()
        return Losses(total, *[total.detach()] * 4)


def step_of(**options):
    """How one step of gradient descent with rate one moves the weights, and its record."""
    state, x = small_state(), torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(state.net.out.weight)
    state.optimizer = torch.optim.SGD(state.net.parameters(), lr=1.0)
    state.optimizer.param_groups[0]["initial_lr"] = 1.0
    before = [p.detach().clone() for p in state.net.parameters()]
    record = next(train(state, Plain(), lambda i: (x, None), 1, **options))
    return torch.cat([(p - b).flatten() for p, b in zip(state.net.parameters(), before)]) / record["lr"], record


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulated_parts_give_the_gradient_of_the_whole(parts):
    (whole, record), (split, record_split) = step_of(), step_of(accumulate=parts)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)
    assert record_split == pytest.approx(record, rel=1e-4)


@given(st.floats(0.01, 3))
def test_a_long_gradient_is_cut_to_the_norm_and_keeps_its_direction(norm):
    free, _ = step_of()
    clipped, _ = step_of(clip_norm=norm)
    torch.testing.assert_close(clipped, free * min(1, norm / free.norm().item()), atol=1e-4, rtol=1e-3)


@settings(max_examples=5)
@given(st.floats(0.1, 0.9))
def test_labels_are_dropped_at_the_rate_asked_for_and_else_kept(rate):
    state, label = small_state(), torch.arange(2000) % 3
    Plain.seen.clear()
    next(train(state, Plain(), lambda i: (torch.zeros(2000, 2), label), 1, null=3, label_dropout=rate))
    (given, _), dropped = Plain.seen[0], Plain.seen[0][0] == 3
    assert abs(dropped.float().mean() - rate) < 0.05
    assert torch.equal(given[~dropped], label[~dropped])


def test_precision_runs_the_loss_under_autocast():
    for precision in ("float32", "bf16"):
        Plain.seen.clear()
        step_of(precision=precision)
        assert Plain.seen == [(None, precision == "bf16")]
        with autocast("cpu", precision):  # whose cache may hold casts made without gradient
            assert not torch.is_autocast_cache_enabled()


def test_config_is_kept_and_checkpoint_is_plain_data(tmp_path):
    own = config("steps=3", "warmup_steps=1")
    finish(begin(own, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == own
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and saved["data"]["shape"] == [2]


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=10)
def test_fresh_noise_of_few_step_samples_is_not_the_first_noise(seed):
    """A network whose clean sample is zero shows, at t = 1/2, half of the noise that is added again."""
    seen = []

    class Zero(torch.nn.Linear):
        def forward(self, x, t, r, cond=None):
            seen.append(x)
            return x / t[:, None]

    sampled(Zero(1, 1), 500, (2,), 2, "few", seed)
    first, second = seen
    assert (first * 2 * second).mean().abs() < 0.2 and abs((2 * second).std() - 1) < 0.1


def test_the_learning_rate_by_value():
    """A line from 1 / 100 to 1 over 100 steps, times half a cosine from 1 to 0; each record and group has its part."""
    cosine = lambda i: (1 + math.cos(math.pi * i / 1000)) / 2  # noqa: E731
    for i, rise in ((0, 0.01), (1, 0.02), (49, 0.5), (98, 0.99), (99, 1.0), (100, 1.0), (250, 1.0), (999, 1.0)):
        assert learning_rate(i, 1000) == pytest.approx(rise * cosine(i))
    assert learning_rate(500, 1000) == pytest.approx(0.5) and learning_rate(0, 10, warm_up=4) == 0.25
    assert learning_rate(250, 1000) - learning_rate(750, 1000) == pytest.approx(0.5**0.5)
    state = small_state()
    state.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "initial_lr": 1.0})
    for i, record in enumerate(train(state, Plain(), lambda i: (torch.ones(2, 2), None), 5)):
        rates = [group["lr"] for group in state.optimizer.param_groups]
        assert rates == pytest.approx([1e-2 * learning_rate(i, 5), learning_rate(i, 5)]) and record["lr"] == rates[0]


def test_the_decay_warms_up_by_value_and_each_average_has_its_own():
    """1 / 10, 1 / 2, 9 / 10 after 0, 8 and 80 steps, then the decay asked for; average and teacher in training."""
    assert [ema.warmed_up(0.99, step) for step in (0, 8, 80)] == pytest.approx([0.1, 0.5, 0.9])
    assert [ema.warmed_up(0.99, step) for step in (889, 891, 5000)] == pytest.approx([890 / 899, 0.99, 0.99])
    state, averages = small_state(), []
    for i, _ in enumerate(train(state, Plain(), lambda i: (torch.ones(2, 2), None), 6, ema=0.3, teacher_ema=0.2)):
        net, decays = state.net.out.bias.detach().clone(), [min(most, (1 + i) / (10 + i)) for most in (0.3, 0.2)]
        last = averages or [torch.zeros(2)] * 2
        averages = [d * a + (1 - d) * net for d, a in zip(decays, last)]
        for own, wanted in zip((state.average, state.teacher), averages):
            torch.testing.assert_close(own.out.bias, wanted)


def test_an_average_that_is_not_finite_is_never_written(tmp_path):
    state, path = small_state(), tmp_path / "checkpoint.pt"
    write_checkpoint(path, {**state.state_dict(), "step": 1})
    for value in (float("nan"), float("-inf")):
        next(state.average.parameters()).data[0] = value
        with pytest.raises(FloatingPointError, match="step 0: weight layers.0.weight is not finite"):
            write_checkpoint(path, state.state_dict())
    assert read_checkpoint(path)["step"] == 1


class Pulled:
    """A loss whose gradients are as long as asked for: in each weight of the network and of the helper."""

    helpers = {"fake": "trained"}

    def __init__(self, size):
        self.size = size

    def __call__(self, net, x, fake, **others):
        parts = [self.size * sum(p.sum() for p in network.parameters()) for network in (net, fake)]
        return peers.common.terms(generator=parts[0], fake=parts[1])


@given(st.floats(0.1, 5), st.floats(0.01, 3))
@settings(max_examples=5)
def test_each_network_has_its_gradient_cut_to_the_norm_by_itself(size, norm):
    """With rate one, network and helper both move by min(norm, the length of their own gradient)."""
    state = new_state(torch.nn.Linear(3, 1), lr=1.0, helpers=Pulled.helpers)
    state.optimizer = torch.optim.SGD([*state.net.parameters(), *state.helpers["fake"].parameters()], lr=1.0)
    state.optimizer.param_groups[0]["initial_lr"] = 1.0
    before = [p.detach().clone() for p in state.net.parameters()]
    record = next(train(state, Pulled(size), lambda i: (torch.ones(2, 3), None), 1, clip_norm=norm))
    for network in (state.net, state.helpers["fake"]):
        moved = torch.cat([(p - b).flatten() for p, b in zip(network.parameters(), before)]).norm().item()
        assert moved / record["lr"] == pytest.approx(min(norm, size * 4**0.5), rel=1e-3)


def test_rate_and_betas_arrive_at_every_group_of_the_optimiser():
    """AdamW without weight decay (Table 6); frozen networks are not in it."""
    helpers = {"original": "frozen", "teacher": "average", "fake": "trained", "critic": "critic"}
    for betas, wanted in (({}, (0.9, 0.99)), ({"betas": (0.5, 0.7)}, (0.5, 0.7))):
        state = new_state(torch.nn.Linear(2, 2), lr=0.25, helpers=helpers, **betas)
        groups = state.optimizer.param_groups
        assert isinstance(state.optimizer, torch.optim.AdamW) and set(state.helpers) == set(helpers) - {"teacher"}
        assert [set(group["params"]) for group in groups] == [
            set(network.parameters()) for network in (state.net, state.helpers["fake"], state.helpers["critic"])
        ]
        for group in groups:
            assert (group["betas"], group["lr"], group["initial_lr"], group["weight_decay"]) == (wanted, 0.25, 0.25, 0)


class Heard(TwinFlowLoss):
    """A loss that keeps what it is and what it was given."""

    seen = []

    def __call__(self, net, x, **given):
        self.seen.append((self, net, x, given))
        one = torch.ones(len(x))
        total = (net(x, one, one) - x).square().mean()
        return Losses(total, *[total.detach()] * 4)


def heard(state, loss, batch, steps, **options):
    """What a loss was given in each call of some steps of training."""
    Heard.seen.clear()
    records = list(train(state, loss, batch, steps, **options))
    return [(loss, net, x, given) for loss, net, x, given in Heard.seen], records


def test_a_loss_is_given_all_that_the_state_has_and_the_batch():
    """By default all of the loss from the first step, the batch whole and its conditions as they are."""
    state, label = small_state(), torch.arange(6)
    loss = Heard(order=3, share=0.4, metric="normalised", times=(1.0, 2.0), gain=3.0)
    x = torch.randn(6, 2)
    state.original, state.call = torch.nn.Identity(), lambda *given: state.net(*given)
    for null in (9, torch.tensor([9])):
        calls, _ = heard(state, loss, lambda i: (x, label), state.step + 3, null=null)
        assert len(calls) == 3
        for own, net, seen, found in calls:
            assert own is loss and net is state.call and torch.equal(seen, x) and torch.equal(found["cond"], label)
            assert found["teacher"] is state.teacher and found["original"] is state.original
            assert found["generator"] is state.generator and found["turns"].device.type == "cpu"
            assert found["null"].tolist() == [9] and set(found) == {
                "cond", "teacher", "null", "original", "generator", "turns", "progress"}  # fmt: skip
        assert len({found["turns"].initial_seed() for *_, found in calls}) == 3
    state.call, null = None, {"a": torch.zeros(1)}
    calls, _ = heard(state, loss, lambda i: (x, {"a": x[:, 0]}), state.step + 4, null=null, warmup_steps=state.step + 1,
                     base_steps=2, accumulate=2)  # fmt: skip
    assert [net is state.net for _, net, _, _ in calls] == [True] * 8
    assert torch.equal(torch.cat([seen for _, _, seen, _ in calls]), x.repeat(4, 1))
    assert torch.equal(torch.cat([given["cond"]["a"] for *_, given in calls]), x[:, 0].repeat(4))
    for own, phase in zip(
        [call[0] for call in calls], [{"order": 0, "share": 0.0}] * 2 + [{"share": 0.0}] * 4 + [{}] * 2
    ):
        assert own == dataclasses.replace(loss, **phase)


@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(0, 2))
def test_terms_read_at_once_are_those_that_are_read_at_each_step(every, seed):
    """In the records where they are due and in the last; the others have step and rate alone. Same weights."""
    batch = Points("moons", 16, seed).batch
    runs = []
    for read_every in (1, every):
        state = small_state(seed)
        options = {"warmup_steps": 3, "base_steps": 3, "read_every": read_every}
        records = list(train(state, TwinFlowLoss(), lambda i: batch(i)[0], 11, **options))
        assert not state.unread
        runs.append((records, weights(state)))
    for one, other in zip(*(records for records, _ in runs)):
        assert other == (one if one["step"] % every == 0 or one["step"] == 11 else {k: one[k] for k in ("step", "lr")})
    assert all(map(torch.equal, *(each for _, each in runs)))


@pytest.mark.parametrize("what", ["data", "term"])
def test_a_step_astray_that_is_read_late_is_still_named_and_no_checkpoint_is_written_of_it(what, tmp_path):
    """Step 6 of 12, read at 8, or when a checkpoint is asked for before; the file is that of step 4."""
    run = begin(config("steps=12", "checkpoint_every=4", "log_every=4"), tmp_path / "run")
    fresh = run.data.batch

    def batch(step):
        x, label = fresh(step)
        return x * {"data": math.nan, "term": 1e3}[what] if step == 5 else x, label

    run.data.batch = batch
    said = {"data": "step 6: the data of its batch are not finite", "term": "step 6: the total loss is"}[what]
    if what == "term":
        run.state.net.register_forward_hook(lambda net, args, F: F * 1e7 if args[0].abs().max() > 300 else F)
    taken = steps(run)
    for _ in range(6):
        next(taken)
    for _ in range(2):  # what was told once is not forgotten
        with pytest.raises(FloatingPointError, match=said if what == "data" else "step 6: the"):
            run.keep()
    with pytest.raises(FloatingPointError, match="step 6: the"):
        list(steps(run))
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    again = begin(config("steps=12", "checkpoint_every=4", "log_every=4"), tmp_path / "again")
    again.data.batch, again.state.net = batch, run.state.net if what == "term" else again.state.net
    taken = steps(again)
    with pytest.raises(FloatingPointError, match="step 6: the"):
        for record in taken:
            assert record["step"] < 8
    assert read_checkpoint(tmp_path / "again" / "checkpoint.pt")["step"] == 4
    in_memory = begin(config("steps=12", "log_every=12", "checkpoint_every=12"))
    in_memory.data.batch, in_memory.state.net = batch, run.state.net if what == "term" else in_memory.state.net
    taken = steps(in_memory)
    for _ in range(7):
        next(taken)
    with pytest.raises(FloatingPointError, match="step 6: the"):  # as where Ctrl-C stops it
        in_memory.keep()


def test_a_step_astray_whose_terms_are_read_at_once_can_be_taken_again():
    """It has not touched the weights; and a state that is loaded knows nothing of steps that were taken after it."""
    state, bad = small_state(), [True]
    batch = lambda i: torch.full((16, 2), math.nan) if bad[0] and i == 2 else torch.randn(16, 2)  # noqa: E731
    saved = None
    for read_every in (1, 5):
        taken = train(state, TwinFlowLoss(), batch, 9, read_every=read_every)
        with pytest.raises(FloatingPointError, match="step 3: the data"):
            for record in taken:
                saved = copy.deepcopy(state.state_dict()) if record["step"] == 2 else saved
        if read_every == 1:
            assert state.step == 2 and all(p.isfinite().all() for p in weights(state))
        else:
            state.load_state_dict(saved)
        bad[0] = False
        assert next(train(state, TwinFlowLoss(), batch, 9))["step"] == 3
        bad[0], state = True, small_state()


def test_a_gradient_inside_the_backward_pass_that_is_not_finite_stops_the_training():
    net = MLP(2, 16, 2)
    state = small_state()
    state.net, state.optimizer = net, in_backward(net.named_parameters(), 1e-3)
    net.out.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="the gradient of out.weight is not finite"):
        list(train(state, TwinFlowLoss(), lambda i: torch.randn(16, 2), 9))
    assert state.step == 0


def test_no_picture_is_drawn_of_a_step_astray(tmp_path):
    """Pictures, too, are drawn of what was read: sample_every=3 where a line of the log is due at 10 alone."""
    run = begin(config("steps=12", "checkpoint_every=10", "log_every=10") | {"sample_every": 3}, tmp_path / "run")
    fresh = run.data.batch
    run.data.batch = lambda i: (fresh(i)[0] * (math.nan if i == 1 else 1), None)
    with pytest.raises(FloatingPointError, match="step 2: the data"):
        for record in steps(run):
            assert record["step"] < 3
    assert not list((tmp_path / "run").glob("*.png"))


def test_which_parts_a_batch_of_one_row_has_depends_on_the_seed():
    parts = []
    for seed in range(6):
        calls, _ = heard(small_state(seed), Heard(), lambda i: torch.zeros(1, 2), 4)
        parts.append(tuple(given["turns"].initial_seed() for *_, given in calls))
    assert len(set(parts)) == 6 and len({each for own in parts for each in own}) == 24


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for an accelerator, a value or a size that depends on values, and who asks for it.

    torch.optim keeps its count of steps on the CPU, and a coin is tossed there.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def note(self, name):
        stack = traceback.extract_stack()
        if not any("torch/optim" in frame.filename or frame.name == "coin" for frame in stack):
            self.found.append((name, [frame.name for frame in stack if "tinytwinflow/" in frame.filename][-1]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if (
            name in self.NAMES
            or name.startswith("index")
            and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.note(name)
        return function(*args, **(kwargs or {}))


TWINFLOW = {"guided": {"guidance": 0.5}, "guided somewhere": {"guidance": 0.5, "guidance_range": (0.2, 0.6)}}
TWINFLOW |= {"on soflow": {"base": peers.SoFlow()}, "on shortcut": {"base": peers.Shortcut()}}
TWINFLOW |= {"data-free": {"data_free": True}, "normalised": {"jump_c": 0.1, "rectify_clip": 1.0}, "as it is": {}}


def labelled_steps(name, read_every, device="cpu"):
    """Twenty steps of TwinFlow in one of its forms, or of a peer, with all that a step can have."""
    loss = TwinFlowLoss(**TWINFLOW[name]) if name in TWINFLOW else peers.PEERS[name]()
    torch.manual_seed(0)
    net = dressed(partial(MLP, 2, 16, 2), 3, **getattr(loss, "needs", {})).to(device)
    state = new_state(net, helpers=getattr(loss, "helpers", None), muon_lr=1e-2)
    x, label = torch.randn(24, 2), torch.arange(24) % 3
    options = {"null": 3, "label_dropout": 0.5, "clip_norm": 1.0, "accumulate": 2, "base_steps": 2}
    return train(state, loss, lambda i: (x, label), 20, read_every=read_every, **options)


@pytest.mark.parametrize("name", [*TWINFLOW, *peers.PEERS])
def test_nothing_in_a_step_waits_for_the_device_but_the_reading_of_its_terms(name, monkeypatch):
    """Of TwinFlow in all its forms and of every peer. What looks at times and labels does so on a CPU alone."""
    for room in (path, times):
        monkeypatch.setattr(room, "check_time", lambda *args, **kwargs: None)
    for room in (mlp, shifted):
        monkeypatch.setattr(room, "check_labels", lambda cond, n, classes: cond)
    waits, found = Waits(), []
    for copied in ("tolist", "cpu", "numpy"):  # these no dispatch sees
        own = getattr(torch.Tensor, copied)
        monkeypatch.setattr(torch.Tensor, copied, lambda x, own=own, name=copied: waits.note(name) or own(x))
    for record in labelled_steps(name, read_every=5):
        found.append(list(waits.found))
        waits.found.clear()
        if record["step"] == 1:  # what is made once, pairs for instance, may be waited for
            waits.__enter__()
    waits.__exit__(None, None, None)
    for step, each in enumerate(found[1:], 2):
        assert each == ([] if step % 5 else [("tolist", "read_terms")]), (step, each)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="nobody waits for a GPU that is not there")
@pytest.mark.parametrize("name", [*TWINFLOW, *peers.PEERS])
def test_nothing_in_a_step_waits_for_the_gpu(name):
    """torch raises an error where it would."""
    taken = labelled_steps(name, read_every=100, device="cuda")
    for _ in range(4):
        next(taken)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(10):
            next(taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision, device, wanted", [
    ("tf32", "cuda", "high"), ("tf32", "cpu", "highest"), ("float32", "cuda", "highest"), ("bf16", "cuda", "highest"),
])  # fmt: skip
def test_tf32_is_for_products_of_matrices_on_cuda_and_ends_with_its_context(precision, device, wanted):
    """Also where it ends with an error."""
    with pytest.raises(KeyError), matrix_units(device, precision):
        assert torch.get_float32_matmul_precision() == wanted
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_forward_and_backward_pass_have_the_precision_of_the_run_and_what_comes_between_steps_has_not(monkeypatch):
    seen, state, own = [], small_state(), torch.get_float32_matmul_precision
    monkeypatch.setattr(loop, "matrix_units", lambda device, precision: matrix_units("cuda", precision))
    state.net.register_forward_hook(lambda *_: seen.append(own()))
    state.net.out.weight.register_hook(lambda grad: seen.append(own()))
    for _ in train(state, TwinFlowLoss(order=2), lambda i: torch.randn(16, 2), 3, precision="tf32"):
        assert own() == "highest"
    assert len(seen) == 3 * 4 and set(seen) == {"high"}  # of the network itself three calls and a backward pass


def test_a_batch_that_does_not_divide_into_equal_parts_is_refused():
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 equal parts"):
        next(train(small_state(), Plain(), lambda i: (torch.zeros(6, 2), None), 1, accumulate=4))


def test_training_is_the_loop_written_out():
    """By hand with plain descent, two parts, clipped: each step's rate, gradients of that step alone, both averages."""
    x = torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(1))
    states = small_state(), small_state()
    for state in states:
        torch.nn.init.normal_(state.net.out.weight, generator=torch.Generator().manual_seed(2))
        state.optimizer = torch.optim.SGD(state.net.parameters(), lr=1.0)
        state.optimizer.param_groups[0]["initial_lr"] = 0.5
        state.step = 20_000
    one, other = states
    calls, records = heard(one, Heard(), lambda i: (x[i - 20_000], None), 20_003, accumulate=2, clip_norm=1.0)
    for i, record in zip(range(20_000, 20_003), records):
        values = []
        other.net.zero_grad()
        for part in x[i - 20_000].chunk(2):
            value = (other.net(part, torch.ones(3), torch.ones(3)) - part).square().mean()
            (value / 2).backward()
            values.append(value.item())
        length = torch.cat([p.grad.flatten() for p in other.net.parameters()]).norm().item()
        with torch.no_grad():
            for p, a, b in zip(*(net.parameters() for net in (other.net, other.average, other.teacher))):
                p -= 0.5 * learning_rate(i, 20_003) * p.grad / max(1.0, length)
                a += 0.001 * (p - a)
                b += 0.01 * (p - b)
        assert record["step"] == i + 1 and record["total"] == record["gap"] == pytest.approx(sum(values) / 2, rel=1e-5)
        assert list(record) == ["step", "lr", *Losses._fields]
    for a, b in zip(weights(one), weights(other)):
        torch.testing.assert_close(a, b)
    assert one.step == 20_003 and len(calls) == 6


class Late:
    """A peer's loss with a term whose name comes after "total"."""

    helpers = {}

    def __init__(self, **values):
        self.values, self.progress = values, []

    def __call__(self, net, x, progress, **given):
        self.progress.append(progress)
        here = sum(p.sum() for p in net.parameters())
        return peers.common.terms(**{name: value + 0 * here for name, value in self.values.items()})


def test_a_term_that_is_not_finite_is_named_before_the_total():
    for values, name in (({"x": math.nan, "a": 0.0}, "x"), ({"a": math.inf, "x": -math.inf}, "a")):
        with pytest.raises(FloatingPointError, match=f"step 1: the {name} loss is"):
            next(train(small_state(), Late(**values), lambda i: (torch.zeros(2, 2), None), 1))


@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_a_peer_begins_with_flow_matching_and_is_told_how_far_it_is(warmup):
    """The same weights as flow matching makes, for so many steps; then the share of the rest that is done."""
    batch = lambda i: (torch.randn(8, 2, generator=torch.Generator().manual_seed(i)), None)  # noqa: E731
    peer, plain, late = small_state(), small_state(), Late(a=1.0)
    flow = TwinFlowLoss(order=0, share=0.0)
    steps = zip(train(peer, late, batch, 5, warmup_steps=warmup), train(plain, flow, batch, 5))
    for i, (one, other) in enumerate(steps):
        if i < warmup:
            assert one == other and all(map(torch.equal, weights(peer), weights(plain)))
    assert late.progress == [i / (5 - warmup) for i in range(5 - warmup)]
    loss_of_batch(late, peer, batch(0)[0])
    assert late.progress[-1] == 0, "where nothing is said of it"


def test_which_labels_are_dropped_is_the_states_own_chance():
    """Not torch's own generator; without a null, or a share, none is."""
    found, label = [], torch.arange(64)
    for seed in (0, 1):
        state = small_state()
        torch.manual_seed(seed)  # of torch, which is not asked
        calls, _ = heard(state, Heard(), lambda i: (torch.zeros(64, 2), label), 2, null=99, label_dropout=0.5)
        found.append([given["cond"].tolist() for *_, given in calls])
    assert found[0] == found[1] and found[0][0] != found[0][1]
    for options in ({"null": 99}, {"label_dropout": 0.5}):
        calls, _ = heard(small_state(), Heard(), lambda i: (torch.zeros(64, 2), label), 1, **options)
        assert torch.equal(calls[0][3]["cond"], label)


class World:
    """A stand-in for many processes, of which this is one."""

    def __init__(self):
        self.said = []

    def reseed(self, generator, step):
        self.said.append(("reseed", generator, step))
        return f"turns {step}"

    def sync(self, network, last):
        self.said.append(("sync", network, last))

    def mean(self, terms):
        return terms + 100


def test_processes_agree_before_each_step_share_gradients_after_the_last_part_and_mean_their_terms():
    state, world, x = small_state(), World(), torch.zeros(6, 2)
    calls, records = heard(state, Heard(), lambda i: (x, None), 2, accumulate=3, world=world)
    parts = [("sync", state.net, last) for last in (False, False, True)]
    assert world.said == [("reseed", state.generator, 0), *parts, ("reseed", state.generator, 1), *parts]
    assert [given["turns"] for *_, given in calls] == ["turns 0"] * 3 + ["turns 1"] * 3
    assert all(record["total"] >= 100 for record in records)
    state.call = torch.nn.Module()
    state.call.forward = lambda *given: state.net(*given)
    heard(state, Heard(), lambda i: (x, None), 3, world=world)
    assert world.said[-1] == ("sync", state.call, True)


def test_an_average_is_a_frozen_copy_and_buffers_are_copied():
    """In evaluation mode whatever the network is in; the network stays as it is."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = ema.average_of(net)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    net(torch.randn(8, 2) + 3)
    ema.update(average, net, 0.9)
    assert torch.equal(average[1].running_mean, net[1].running_mean) and average[1].running_mean.abs().max() > 0
    with torch.no_grad():
        net[0].weight.fill_(1.0), average[0].weight.fill_(0.0)
    ema.update(average, net, 0.0)
    assert torch.equal(average[0].weight, net[0].weight) and net[0].weight.eq(1).all()
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got"):
            ema.update(average, net, decay)
