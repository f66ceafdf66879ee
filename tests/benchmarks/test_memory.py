"""Bytes are counted exactly, and counted small they tell the large."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.benchmarks import memory
from tinytwinflow.benchmarks.memory import LiveBytes
from tinytwinflow.cli.commands import main
from tinytwinflow.nets import DiT, dit
from tinytwinflow.nets.dit import SIZES


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


@pytest.mark.parametrize("loss", [TwinFlowLoss(order=0, share=0.0), TwinFlowLoss(), peers.VSD(), peers.MeanFlow()])
def test_small_passes_tell_the_bytes_of_the_whole(loss, monkeypatch):
    """One and two blocks with 6 and 12 samples give, without rounding, those of four blocks and 24 samples."""
    monkeypatch.setitem(SIZES, "s", (32, 4, 2))
    found = memory.costs_of_dit({"loss": loss}, "dit-s-8", 24)["loss"]
    whole = memory.forward_cost(loss, DiT(32, 4, 1000, 32, 4, 2, 8), torch.zeros(24, 4, 32, 32))
    whole["graph"] = max(whole["graph"], whole.pop("passing"))
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
