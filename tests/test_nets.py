"""A network is a velocity field: right shapes, both signs of time told apart, null label like any other."""

import pytest
import torch
from conftest import inside, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from tinytwinflow.nets import MLP


def mlp(seed=0, dim=2, classes=0):
    torch.manual_seed(seed)
    net = MLP(dim, 32, 3, classes)
    for layer in (net.out, net.twin_in, net.twin_out):
        torch.nn.init.normal_(layer.weight)
    return net.double()


@given(seeds, st.integers(1, 5), st.integers(0, 4))
def test_output_has_the_shape_of_x(seed, dim, B):
    t = torch.zeros(B).double()
    assert mlp(seed, dim)(torch.zeros(B, dim).double(), t, t).shape == (B, dim)


@given(seeds, st.one_of(inside, st.just(1.0)))
def test_the_sign_of_time_is_seen_at_every_time(seed, t):
    """t = 1 included."""
    net, x, t = mlp(seed), torch.ones(1, 2).double(), torch.tensor([t]).double()
    assert (net(x, t, t) - net(x, -t, -t)).abs().max() > 1e-6


@given(seeds, inside, inside)
def test_the_target_time_is_seen(seed, t, r):
    assume(abs(t - r) > 0.01)
    net, x = mlp(seed), torch.ones(1, 2).double()
    t, r = torch.tensor([t]).double(), torch.tensor([r]).double()
    assert (net(x, t, r) - net(x, t, t)).abs().max() > 1e-6


@given(seeds)
def test_rows_do_not_see_each_other(seed):
    net = mlp(seed)
    x, t, r = torch.randn(5, 2).double(), torch.rand(5).double(), torch.rand(5).double()
    together, alone = net(x, t, r), torch.cat([net(x[i : i + 1], t[i : i + 1], r[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)


@given(seeds, inside)
def test_the_twin_is_born_equal_to_the_real_field(seed, t):
    """Whatever the real field has learnt: until the twin's own layers move, the gap is zero."""
    net, x, t = mlp(seed), torch.ones(1, 2).double(), torch.tensor([t]).double()
    for layer in (net.twin_in, net.twin_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(net(x, t, t), net(x, -t, -t))


def test_a_new_network_is_zero_and_labels_matter():
    x, t = torch.randn(4, 2), torch.rand(4)
    assert not MLP(2)(x, t, t).any() and not MLP(2)(x, -t, -t).any()
    net = mlp(classes=3)
    outputs = [net(x.double(), t.double(), t.double(), torch.full((4,), label)) for label in range(4)]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(outputs) for b in outputs[:i])


def test_wrong_use_says_what_is_allowed():
    x, t = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"takes \(B, 2\)"):
        MLP(2)(torch.zeros(3, 4), t, t)
    with pytest.raises(ValueError, match=r"t and r must have shape \(3,\)"):
        MLP(2)(x, torch.zeros(2), t)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\], got 0 to 5"):
        MLP(2, classes=2)(x, t, t, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="labels must be 3 whole numbers"):
        MLP(2, classes=2)(x, t, t, torch.zeros(3))
    with pytest.raises(ValueError, match="this network is conditional"):
        MLP(2, classes=2)(x, t, t)
    with pytest.raises(ValueError, match="takes no cond"):
        MLP(2)(x, t, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"t must lie in \[-1, 1\]"):
        MLP(2)(x, t - 1.5, t)
