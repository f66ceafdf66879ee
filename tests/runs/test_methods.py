"""Rows of a table of methods: each name is trained with what it says."""

import pytest

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.runs.methods import TUNED, entry, known_methods
from tinytwinflow.runs.settings import loss_of, method_of


@pytest.mark.parametrize("name", known_methods())
def test_a_row_is_the_method_that_it_is_called(name):
    """With half of the steps a flow-matching beginning has half its length, too; all rows have the table's batch."""
    whole, half = entry(name), entry(name, ["steps=1500"])
    assert method_of(whole) == name and whole["steps"] == 3000 and whole["batch_size"] == 256
    assert half["warmup_steps"] == whole["warmup_steps"] / 2 and half["base_steps"] == whole["base_steps"] / 2
    loss = loss_of(whole)
    if name.startswith("twin on "):
        alone = loss_of(entry(name.removeprefix("twin on ")))
        assert loss.base == alone and isinstance(loss, TwinFlowLoss) and loss.share == 1 / 3
    else:
        assert getattr(loss, "base", None) is None and isinstance(loss, TwinFlowLoss) == (name not in peers.PEERS)


@pytest.mark.parametrize("name", ["meanflow", "consistency training"])
def test_a_twin_has_what_was_found_for_its_base(name):
    own, twin = entry(name), entry(f"twin on {name}")
    of_twin = {"method", "base", "base_steps"}
    assert {key for key in own if own[key] != twin[key]} == of_twin and TUNED[name]
    assert (twin["method"], twin["base"], twin["base_steps"]) == ("twinflow", name, 1050)


def test_a_twin_alone_comes_after_flow_matching_with_nothing_between():
    config = entry("twin alone")
    assert (config["share"], config["base_steps"], config["warmup_steps"]) == (1.0, 0, 1500)
    assert loss_of(config).shares()[:2] == (0.0, 0.0)
    other = entry("twinflow")
    own = {"share", "base_steps"} | {change.partition("=")[0] for change in TUNED["twin alone"]}
    assert {key for key in config if config[key] != other[key]} == own
    assert entry("twin alone steps=1000 warmup_steps=900")["base_steps"] == 0


def test_settings_after_the_name_win_over_those_for_all_and_these_over_what_was_found():
    name = "twin on meanflow"
    assert entry(name)["peer"] == {"power": 0.5} and entry(name)["lr"] == 1e-3 and entry(name)["warmup_steps"] == 0
    config = entry(f"{name} lr=3e-4 share=0.2", ["lr=2e-3", 'peer={"power":1.0}', "warmup_steps=30"])
    assert (config["lr"], config["share"], config["peer"], config["warmup_steps"]) == (3e-4, 0.2, {"power": 1.0}, 30)
    assert entry("meanflow base_steps=0")["base_steps"] == 0


def test_a_row_refuses_what_would_make_it_another():
    for text, message in [
        ("twin on dmd2", "unknown method 'twin on dmd2': choose from flow matching, rcgm"),
        ("twin on meanflow share=0", "trains it alone"),
        ("twin on meanflow share=1 base_steps=0", "share=1 leaves the base no rows"),
        ("apex shifted=false", "method apex needs shifted=True"),
        ("twin alone share=0.3", "'twin alone' says itself what share is"),
        ("twin on meanflow base=shortcut", "says itself what base is"),
        ("flow matching order=2", "says itself what order is"),
        ("rcgm share=0.5", "says itself what share is"),
    ]:
        with pytest.raises(ValueError, match=message):
            entry(text)
