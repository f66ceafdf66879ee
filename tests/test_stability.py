"""The recommended loss is sound where it is hardest, and the grid of `stability.py` that says so can be believed."""

import pytest
import stability
import torch

from tinytwinflow import TwinFlowLoss, nets
from tinytwinflow.data.toys import TOYS, draw_points
from tinytwinflow.training import new_state, train


@pytest.mark.parametrize("phase", stability.PHASES)
def test_the_recommended_loss_is_sound_on_every_set_at_the_highest_rate_and_the_smallest_batch(phase, monkeypatch):
    """It never diverges, and its one-step samples are at most 3 times as far from data as those of the base alone."""
    monkeypatch.setitem(stability.NETS, "sharp", lambda: nets.MLP(2, width=64, sharp=True))
    cell = {"net": "sharp", "phase": phase, "lr": 4e-3, "batch": 32, "steps": 200, "samples": 2000, "seeds": 1}
    base, twin = (stability.run({**cell, "loss": loss, "sets": TOYS}, "cpu") for loss in ("here share=0", "here"))
    assert not stability.lost(base) and not stability.lost(twin)
    ratios = stability.ratios(twin, base)
    assert len(ratios) == 11 and max(ratios.values()) <= 3, ratios


def member(seed):
    torch.manual_seed(seed)
    return nets.MLP(2, width=16, depth=2)


def points(steps, members=1):
    """Batches (24, members, 2)."""
    draws = [draw_points("moons", 24 * members, torch.Generator().manual_seed(i))[0] for i in range(steps)]
    return [x.view(24, members, 2) for x in draws]


@pytest.mark.parametrize("loss", [TwinFlowLoss(), TwinFlowLoss.paper()])
def test_a_member_is_trained_as_the_library_trains_it_alone(loss):
    x, alone, many = points(20), new_state(member(0), lr=4e-3), new_state(stability.Many([member(0)]), lr=4e-3)
    for _ in train(alone, loss, lambda i: x[i][:, 0], steps=20, warmup_steps=5):
        pass
    stability.train_many(many, loss, lambda i: x[i], 20, 5)
    for a, b in zip(alone.average.parameters(), many.average.stacked):
        torch.testing.assert_close(a, b[0], rtol=1e-5, atol=1e-6)


def test_a_member_that_diverges_leaves_the_others_as_they_are():
    x, stacks = points(20, members=3), []
    for poison in (1.0, 1e9):
        state = new_state(stability.Many([member(0), member(1), member(2)]), lr=4e-3)
        state.net.stacked[0].data[1] *= poison
        stability.train_many(state, TwinFlowLoss(), lambda i: x[i], 20, 5)
        stacks.append(state.average.stacked)
    assert (state.net.largest[[0, 2]] < 100).all() and not state.net.largest[1] < 1e9
    for a, b in zip(*stacks):
        assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])


def test_a_gradient_does_not_shrink_with_the_number_of_members():
    """AdamW would not mind, but for its epsilon."""
    norms, x = [], torch.ones(512, 1, 2)
    for members in (1, 4):
        state = new_state(stability.Many([member(0)] * members), lr=1e-3)
        stability.train_many(state, TwinFlowLoss(), lambda i, n=members: x.expand(-1, n, -1), 1, 0)
        norms.append(state.net.stacked[state.net.names.index("out.weight")].grad.flatten(1).norm(dim=1).mean())
    assert norms[1] / norms[0] == pytest.approx(1, rel=0.2)


def test_the_tables_count_what_was_lost_and_divide_by_the_base():
    def line(loss, *figures):
        members = [{"set": "moons", "seed": i, "w2": w2, "largest": 1.0} for i, w2 in enumerate(figures)]
        return {"net": "mlp", "loss": loss, "phase": "none", "lr": 1e-3, "batch": 32, "members": members}

    base, twin = (
        line("paper order=4 share=0", 0.1, 0.2, 0.1, None),
        line("paper order=4 rectify_clip=1", 0.3, 0.2, None, 1),
    )
    assert stability.base_of(twin["loss"]) == base["loss"]
    words = stability.report([base, twin])
    assert "| mlp | paper order=4 share=0 | none | 1 of 4 | | | |" in words
    assert "| none | 1 of 4 | 3.00 | 2.00 | moons, seed 0, lr 0.001, batch 32 |" in words
    assert "| 0.001 | 1; 3.00, 2.00 |" in words
    loss = stability.loss_named(twin["loss"])
    assert (loss.order, loss.rectify_clip, loss.gain) == (4, 1.0, float("inf"))
