"""The optimisers: which weights Muon gets, and that each weight is stepped as by torch's own optimiser alone."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.data.points import Points
from tinytwinflow.nets import MLP, DiT, UNet
from tinytwinflow.training.loop import learning_rate, train
from tinytwinflow.training.optimizers import inner_matrices, optimizer_of
from tinytwinflow.training.state import new_state


def small_state(seed=0, lr=1e-2, muon_lr=2e-2, **more):
    torch.manual_seed(seed)
    return new_state(MLP(2, 16, 3, sharp=True), lr, seed=seed, muon_lr=muon_lr, **more)


def batch(i):
    return Points("moons", 16).batch(i)[0]


def test_inner_matrices_are_those_between_hidden_units():
    """Not what reads inputs, times or labels, nor what makes the answer, nor vectors, nor convolutions."""
    assert inner_matrices(MLP(2, 16, 3, 5, sharp=True)) == {"layers.1.weight", "layers.2.weight"}
    of_block = ("adaLN_modulation.1", "attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in of_block}
    assert inner_matrices(DiT(4, 1, 3, 16, 2, 2)) == expected
    assert inner_matrices(MLP(2, 16, 1)) == set()
    assert all(p.ndim == 2 for k, p in UNet(8, 1).named_parameters() if k in inner_matrices(UNet(8, 1)))
    assert inner_matrices(torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Linear(3, 3)])) == {"1.weight"}


@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(1e-3, 1e-1), st.floats(1e-3, 1e-1))
def test_each_weight_is_stepped_as_by_its_optimiser_alone(seed, lr, muon_lr):
    torch.manual_seed(seed)
    net, alone = MLP(2, 8, 3), MLP(2, 8, 3)
    alone.load_state_dict(net.state_dict())
    inner = {"layers.1.weight", "layers.2.weight"}
    matrices = [p for name, p in alone.named_parameters() if name in inner]
    others = [p for name, p in alone.named_parameters() if name not in inner]
    both = optimizer_of([net], lr, muon_lr)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    for _ in range(3):
        for a, b in zip(net.parameters(), alone.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (both, muon, adamw):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters()))
    assert [group["initial_lr"] for group in both.param_groups] == [lr, muon_lr]


def test_both_rates_follow_the_schedule_and_every_learning_network_of_a_peer_has_its_matrices():
    state = small_state()
    for record in train(state, TwinFlowLoss(), batch, 5):
        factor = learning_rate(record["step"] - 1, 5)
        assert [group["lr"] for group in state.optimizer.param_groups] == [1e-2 * factor, 2e-2 * factor]
        assert record["lr"] == 1e-2 * factor
    loss = peers.PEERS["dmd2"]()
    state = small_state(helpers=loss.helpers)
    learning = [state.net, *(net for name, net in state.helpers.items() if loss.helpers[name] != "frozen")]
    adamw, muon = ({id(p) for p in group["params"]} for group in state.optimizer.param_groups)
    for net in learning:
        names = {name for name, p in net.named_parameters() if id(p) in muon}
        assert names == inner_matrices(net) and len(names) >= 2
    assert muon | adamw == {id(p) for net in learning for p in net.parameters()} and not muon & adamw


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 7), st.integers(0, 3))
def test_training_with_muon_goes_on_bit_for_bit(stop, seed):
    whole, first, second = small_state(seed), small_state(seed), small_state(seed + 10)
    records = list(train(whole, TwinFlowLoss(), batch, 8))
    before = list(itertools.islice(train(first, TwinFlowLoss(), batch, 8), stop))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert before + list(train(second, TwinFlowLoss(), batch, 8)) == records
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), second.net.parameters()))


def test_a_network_without_inner_matrices_learns_by_adamw_alone():
    ends = []
    for muon_lr in (None, 2e-2):
        torch.manual_seed(0)
        state = new_state(MLP(2, 16, 1), 1e-2, muon_lr=muon_lr)
        list(train(state, TwinFlowLoss(), batch, 3))
        ends.append((type(state.optimizer), *state.net.parameters()))
    assert ends[0][0] is ends[1][0] is torch.optim.AdamW
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:]))


def test_matrices_may_be_all_that_learns_and_something_must():
    net = MLP(2, 16, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="no weight of the network learns: requires_grad is False on all"):
        new_state(net)
    net.layers[1].weight.requires_grad_()
    optimizer = new_state(net, muon_lr=1e-2).optimizer
    net.layers[1].weight.grad = torch.ones(16, 16)
    before = net.layers[1].weight.clone()
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and not torch.equal(before, net.layers[1].weight)
