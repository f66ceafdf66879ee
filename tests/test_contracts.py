"""The contracts: what a data set, a network, a loss and a family of a user's own must be, tried from outside.

The examples are those of the docstrings, taken from there and run.
"""

import doctest

import torch

import tinytwinflow as ttf
from tinytwinflow.data.batches import DataSet
from tinytwinflow.method.draws import seeded


def example(thing, **known):
    """What the example of a docstring defines.  -> dict"""
    names = {"torch": torch, **known}
    for part in doctest.DocTestParser().get_examples(thing.__doc__):
        exec(part.source, names)
    return names


def test_a_data_set_of_ones_own_trains_and_is_measured():
    """`fit` takes it as it is; its samples come to lie where its points do, on a ring."""
    ring = example(DataSet, seeded=seeded)["Ring"]()
    assert torch.equal(ring.batch(3)[0], ring.batch(3)[0]) and not torch.equal(ring.batch(3)[0], ring.fresh(64)[0])
    model = ttf.fit(ring, steps=600, width=64, depth=3, lr=1e-2, eval_samples=500)
    assert (model.sample(500, seed=0).norm(dim=1) - 1).abs().mean() < 0.25
    assert {row["nfe"] for row in model.evaluate(nfes=(1, 2))["rows"]} == {1, 2}


def test_a_network_of_ones_own_trains_and_samples():
    """So does any callable that is one: a lambda samples as it is."""
    own = example(ttf.nets)["Own"]
    model = ttf.fit(torch.randn(500, 2) * 3 + 5, net=own(), steps=300, lr=1e-2, batch_size=64)
    x = model.sample(2000, seed=0)
    assert (x.mean(0) - 5).abs().max() < 1 and (x.std(0) - 3).abs().max() < 1.5
    assert torch.equal(ttf.sample(lambda x, t, r, cond=None: x, torch.ones(3, 2)), torch.zeros(3, 2))


def test_a_loss_of_ones_own_trains_in_the_loop_and_has_a_name_once_it_is_among_the_peers(monkeypatch):
    halfway = example(ttf.peers)["Halfway"]
    loss, data = halfway(), ttf.data.Points("moons", 128)
    state = ttf.training.new_state(ttf.nets.MLP(2, 32, 2), lr=1e-2, helpers=loss.helpers)
    totals = [record["flow"] for record in ttf.training.train(state, loss, lambda i: (data.batch(i)[0], None), 200)]
    assert sum(totals[-20:]) < 0.9 * sum(totals[:20])
    monkeypatch.setitem(ttf.peers.PEERS, "halfway", halfway)
    model = ttf.fit("moons", method="halfway", steps=30, width=16, warmup_steps=0)
    assert model.config["method"] == "halfway" and model.sample(5, steps=4).shape == (5, 2)
