"""Settings: one definition each, which recipes, the loss, error messages and the command all read."""

import inspect
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.cli.commands import main
from tinytwinflow.ranges import setting
from tinytwinflow.runs.recipes import RECIPES, configured
from tinytwinflow.runs.settings import LOSS, SETTINGS, loss_of, method_of, mode_of
from tinytwinflow.training import new_state, train


@given(st.integers(-3, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.floats(-8, 8))
def test_a_number_is_taken_just_where_it_lies_in_the_interval(low, width, closed, closed_above, value):
    """And a refusal names the setting, the interval and the number."""
    high = low + width + 1
    within = f"{'[' if closed else '('}{low}, {high}{']' if closed_above else ')'}"
    inside = low < value < high or value == low and closed or value == high and closed_above
    one = setting(float(low), "of a test", within)
    if inside:
        one.check("it", value)
    else:
        with pytest.raises(ValueError) as refused:
            one.check("it", value)
        assert str(refused.value) == f"it must lie in {within}, got {value!r}"


def test_what_is_of_another_kind_is_refused():
    for name, wrong in [
        ("steps", 1.5), ("steps", True), ("steps", "7"), ("lr", "fast"), ("lr", math.nan), ("sharp", 1), ("data", 3),
        ("peer", []), ("times", 1.0), ("times", (1.0,)), ("times", (0.0, 1.0)), ("metric", "lpips"), ("ema", 1),
        ("clip", None), ("gain", 0.0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must .*, got "):
            SETTINGS[name].check(name, wrong)
    for name, right in [("clip_norm", None), ("gain", math.inf), ("lr", 1), ("times", [2, 1.0]), ("lora_layers", [])]:
        SETTINGS[name].check(name, right)


def test_each_default_and_each_recipe_keeps_to_the_ranges():
    for name, one in SETTINGS.items():
        one.check(name, one.default)
        assert one.meaning and len(one.meaning) < 110
    for recipe in RECIPES:
        config = configured(recipe)
        assert config["recipe"] == recipe and config["seed"] == 0 and RECIPES[recipe].keys() <= SETTINGS.keys()


def test_the_loss_has_the_settings_of_the_recipes_and_the_paper_its_own():
    """TwinFlowLoss() is what recipes have but for what they say; paper() is what is printed, and takes changes."""
    assert {f.name for f in fields(TwinFlowLoss)} == {*LOSS, "base"}
    assert loss_of(configured("cifar")) == TwinFlowLoss()
    assert loss_of(configured("toy")) == TwinFlowLoss(flow_share=0.3, one_step_share=0.4, jump_c=0.12)
    printed = TwinFlowLoss.paper()
    assert (printed.order, printed.share, printed.dt, printed.clip, printed.gain) == (2, 1 / 3, 0.01, 1.0, math.inf)
    assert (printed.adversarial_weight, printed.rectify_weight, printed.one_step_share) == (1.0, 1.0, 0.0)
    assert not printed.even_inner and printed.rectify_clip is None
    assert TwinFlowLoss.paper(order=3, clip=2.0).order == 3


def test_functions_have_the_defaults_of_the_settings():
    for function, names in ((train, ("ema", "teacher_ema", "accumulate", "clip_norm", "precision")), (new_state, ())):
        defaults = inspect.signature(function).parameters
        assert all(defaults[name].default == SETTINGS[name].default for name in names)


def test_a_value_is_the_same_by_name_and_by_text():
    by_text = configured(
        "toy", ["steps=40", "lr=1", "sharp=false", "clip_norm=None", "times=[2,1]", 'peer={"a":1}'][:5]
    )
    assert by_text == configured("toy", steps=40, lr=1.0, sharp=False, clip_norm=None, times=[2, 1])
    assert by_text["warmup_steps"] == 10 and by_text["base_steps"] == 14
    assert configured("toy", ["lr=1"], lr=2.0)["lr"] == 2.0


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_command_tells_each_setting_its_range_and_its_value(recipe, capsys):
    assert main(["settings", *([recipe] if recipe else [])]) == 0
    told = capsys.readouterr().out
    for name in RECIPES[recipe] if recipe else SETTINGS:
        line = next(line for line in told.splitlines() if line.startswith(f"  {name} = "))
        assert line.endswith(f"must {SETTINGS[name].range}") and SETTINGS[name].meaning in told
    assert recipe != "fashion" or "  one_step_share = 0.7" in told


def test_the_command_knows_no_other_recipe(capsys):
    assert main(["settings", "cifar100"]) == 2
    assert "unknown recipe 'cifar100': choose from toy" in capsys.readouterr().err


@pytest.mark.parametrize("recipe, changes, message", [
    ("toy", {"predicts": "noise"}, "predicts must be one of velocity, data, got 'noise'"),
    ("toy", {"shifted": 1}, "shifted must be true or false, got 1"),
    ("toy", {"base": "dmd2"}, "base must be one of any-step, consistency training, .*shortcut, got 'dmd2'"),
    ("toy", {"base": "pixel meanflow"}, "base must be one of any-step"),
    ("toy", {"base": "meanflow", "share": 0.0}, "--set method='meanflow' trains it alone"),
    ("toy", {"base": "meanflow", "method": "shortcut"}, "a base is for the twin to stand on: --set method='meanflow'"),
    ("toy", {"base": "meanflow", "share": 1.0, "base_steps": 0}, "share=1 leaves the base no rows: --set share=0.3"),
    ("toy", {"base": "meanflow", "warmup_steps": 1000, "base_steps": 1000}, "never starts: warmup_steps . base_steps"),
    ("toy", {"base": "meanflow", "peer": {"powr": 1.0}}, "peer: meanflow has no such setting .*powr"),
    ("toy", {"peer": {"power": 1.0}}, "peer is for a method or base that is one, got {'power': 1.0}"),
    ("fashion", {"base": "meanflow", "guidance": 0.5}, "guidance and data_free are of the any-step base: guidance=0"),
    ("toy", {"method": "apex", "shifted": False}, "method apex needs shifted=True"),
    ("toy", {"method": "pixel meanflow", "predicts": "velocity"}, "method pixel meanflow needs predicts=data"),
    ("imagenet", {"predicts": "data", "epsilon": True, "guidance": 0.0}, "epsilon says .* noise: --set predicts=veloc"),
    ("text", {"method": "apex", "guidance": 0.0}, "a backbone has method twinflow"),
    ("text", {"base": "meanflow", "guidance": 0.0}, "method twinflow: --set method=twinflow base=any-step"),
    ("text", {"predicts": "data"}, "unknown setting 'predicts': text has"),
])  # fmt: skip
def test_settings_of_other_methods_that_do_not_go_together_are_refused_in_one_line(recipe, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        configured(recipe, **changes)
    assert len(str(refused.value).splitlines()) == 1


def test_a_method_brings_the_network_that_it_needs_unless_another_is_asked_for():
    """apex its shifted conditions, pixel mean flows a network that predicts data; said beside it, that is no error."""
    for method, name, value in (("apex", "shifted", True), ("pixel meanflow", "predicts", "data")):
        found, said = configured("toy", method=method), configured("toy", method=method, **{name: value})
        assert found[name] == value and said == found
        assert RECIPES["toy"][name] != value and configured("toy", method="meanflow")[name] != value
        assert configured("toy", ["steps=40", f"{name}={str(value).lower()}"])[name] == value, "also for TwinFlow"


def test_the_twin_on_another_base_is_a_loss_a_name_and_a_mode_of_its_own():
    """Every other setting of TwinFlow is read as it was; `peer` are the base's."""
    config = configured("toy", base="meanflow", peer={"power": 0.5}, share=0.25, rectify_weight=0.7)
    loss = loss_of(config)
    assert loss.base == peers.MeanFlow(power=0.5) and (loss.share, loss.rectify_weight) == (0.25, 0.7)
    assert (config["base_steps"], config["warmup_steps"]) == (700, 500)
    assert loss_of(configured("toy")).base is None
    for changes, name, mode in [
        ({"base": "meanflow"}, "twin on meanflow", "any"),
        ({"base": "consistency training"}, "twin on consistency training", peers.ConsistencyTraining.mode),
        ({"share": 1.0, "base_steps": 0}, "twin alone", None),
        ({"share": 1.0}, "twinflow", "any"),
        ({}, "twinflow", "any"),
        ({"share": 0.0}, "rcgm", "any"),
        ({"share": 0.0, "order": 0}, "flow matching", "multi"),
        ({"method": "drifting"}, "drifting", None),
        ({"method": "meanflow"}, "meanflow", "any"),
    ]:
        config = configured("toy", **changes)
        assert (method_of(config), mode_of(config)) == (name, mode), changes
