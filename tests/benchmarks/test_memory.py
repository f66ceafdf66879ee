"""Bytes are counted exactly, and counted small they tell the large."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.benchmarks import memory
from tinytwinflow.benchmarks.calls import calls_of
from tinytwinflow.benchmarks.memory import LiveBytes
from tinytwinflow.cli.commands import main
from tinytwinflow.evaluation.features import Classifier
from tinytwinflow.nets import DiT, dit
from tinytwinflow.nets.dit import SIZES
from tinytwinflow.runs.build import dressed
from tinytwinflow.runs.methods import entry, known_methods
from tinytwinflow.runs.settings import loss_of


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=8))
def test_live_bytes_follow_every_tensor(made):
    """Sizes of what is made are added, of what is let go taken off, views are free; the peak is the most at once."""
    counter, kept, now, peak = LiveBytes(), [], 0, 0
    with counter:
        for size, keep in made:
            x = torch.zeros(size, dtype=torch.float64)
            now, peak = now + 8 * size, max(peak, now + 8 * size)
            view = x.view(-1)[:1]
            assert counter.now == now
            if keep:
                kept.append(view)  # a view keeps its storage
            else:
                now -= 8 * size
            del x, view
            assert counter.now == now
    assert counter.peak == peak


EACH = [TwinFlowLoss(order=0, share=0.0), TwinFlowLoss(), peers.VSD(), peers.MeanFlow()]
EACH += [TwinFlowLoss(base=peers.MeanFlow()), peers.APEX(), peers.PixelMeanFlow(), peers.Drifting(), peers.SoFlow()]
EACH += [peers.FreeFlow()]


@pytest.mark.parametrize("loss", EACH, ids=lambda loss: type(loss).__name__)
def test_small_passes_tell_the_bytes_of_the_whole(loss, monkeypatch):
    """One and two blocks with 12 and 24 samples give, without rounding, those of four blocks and 48 samples."""
    monkeypatch.setitem(SIZES, "s", (32, 4, 2))
    found = memory.costs_of_dit({"loss": loss}, "dit-s-8", 48)["loss"]
    net = dressed(lambda classes: DiT(32, 4, classes, 32, 4, 2, 8), 1000, **getattr(loss, "needs", {}))
    whole = memory.forward_cost(loss, net, torch.zeros(48, 4, 32, 32))
    whole["graph"] = max(whole.pop(key) for key in [*whole] if isinstance(key, int))
    assert {key: found[key] for key in whole} == pytest.approx(whole, rel=0.01)


def test_weights_are_the_published_number():
    """Flow matching holds the network and its average: two times the parameters of DiT-S/8, and the position table."""
    found = memory.costs_of_dit({"flow matching": TwinFlowLoss(order=0, share=0.0)}, "dit-s-8", 64)["flow matching"]
    net = dit("s-8")
    assert found["weights"] == 2 * 4 * sum(tensor.numel() for tensor in net.state_dict().values())
    assert found["moments"] == 2 * found["gradients"] == 2 * 4 * sum(p.numel() for p in net.parameters())


def test_three_networks_need_more(monkeypatch, capsys):
    """The table of the command: DMD2 holds four more networks than flow matching, TwinFlow its teacher alone."""
    monkeypatch.setitem(SIZES, "s", (32, 4, 2))
    command = ["memory", "--net", "dit-s-8", "--batch-size", "24", "--methods", "dmd2", "twinflow"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| ") and "trained /" not in line] == [
        ["| flow matching", "0 / 0"], ["| dmd2", "2 / 1"], ["| twinflow", "0 / 0"],
    ]  # fmt: skip


def bytes_of(net):
    return 4 * sum(tensor.numel() for tensor in net.state_dict().values())


FLOW = {"order": 0, "share": 0.0}
CALLED = {"all flow": TwinFlowLoss(flow_share=1.0), "guided flow": TwinFlowLoss(**FLOW, guidance=0.5)}
CALLED |= {"data-free flow": TwinFlowLoss(**FLOW, data_free=True), "on flow": TwinFlowLoss(base=TwinFlowLoss(**FLOW))}
CALLED |= {
    "on rcgm": TwinFlowLoss(base=TwinFlowLoss(share=0.0)),
    "alone": TwinFlowLoss(share=1.0, base=peers.Shortcut()),
}


@pytest.mark.parametrize("name", [*CALLED, *(name for name in known_methods() if name != "progressive distillation")])
def test_the_teacher_is_counted_just_where_it_is_called(name):
    """By the calls themselves; of progressive distillation it is what its frozen network becomes."""
    loss = CALLED[name] if name in CALLED else loss_of(entry(name))
    called = "teacher" in {call.network for seed in range(4) for call in calls_of(loss, 12, seed)}
    assert memory.uses_teacher(loss) == called


def test_networks_of_other_methods_are_counted(monkeypatch):
    """Beyond flow matching's network and average: a teacher where the base has one, the shift with its own gradients
    and moments, features that learn nothing."""
    monkeypatch.setitem(SIZES, "s", (32, 1, 2))
    losses = {name: loss_of(entry(name)) for name in ("flow matching", "twin on meanflow", "twin on shortcut", "apex")}
    losses |= {name: loss_of(entry(name)) for name in ("twin alone", "pixel meanflow", "drifting")}
    found = memory.costs_of_dit(losses, "dit-s-8", 12)
    net, flow = bytes_of(dit("s-8")), found["flow matching"]
    shift = 4 * (32 * 32 + 32)
    more = {"twin on meanflow": 0, "twin on shortcut": net, "apex": net + 3 * shift, "twin alone": 0}
    more |= {"pixel meanflow": 0, "drifting": bytes_of(Classifier(4, 1000))}
    assert {name: found[name]["weights"] - flow["weights"] for name in more} == more
    for name in more:
        learnt = shift * (name == "apex")
        assert found[name]["gradients"] - flow["gradients"] == learnt and found[name]["trained"] == 0, name
        assert found[name]["moments"] - flow["moments"] == 2 * learnt and found[name]["frozen"] == 0
