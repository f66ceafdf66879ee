"""Training inside backward: rounding right in the mean, the plain optimiser's numbers, no gradient kept."""

import gc
import io
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tinytwinflow as ttf
from tinytwinflow.training.in_backward import in_backward, stochastic_round

INF = float("inf")
BIG = float(torch.finfo(torch.bfloat16).max)
floats = st.floats(width=32, allow_nan=False, min_value=-BIG, max_value=BIG)
OPTIMIZERS = {
    "adafactor": torch.optim.Adafactor,
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.01),
}


def neighbours(value):
    """The bfloat16 numbers just below and just above a float, or twice the float itself; from its bits, by numpy."""
    towards_zero = (np.array([value], np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).astype(np.uint32)
    away = towards_zero + np.uint32(0x10000)
    ends = towards_zero.view(np.float32)[0], away.view(np.float32)[0]
    return (np.float32(value),) * 2 if ends[0] == np.float32(value) else tuple(sorted(ends))


def rounded(value, n, seed=0):
    return stochastic_round(torch.full((n,), value), torch.Generator().manual_seed(seed))


@given(floats)
def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(value):
    """mean over n draws = x within 5 standard errors; a draw spreads by at most half the neighbours' distance."""
    n, (low, high) = 4096, neighbours(value)
    drawn = rounded(value, n)
    assert drawn.dtype == torch.bfloat16
    drawn = drawn.double()
    assert ((drawn == float(low)) | (drawn == float(high))).all()
    if np.isinf([low, high]).any():
        return
    gap = float(high) - float(low)
    up = ((drawn - float(low)) / gap).mean() if gap else 0.0
    wanted = (float(np.float32(value)) - float(low)) / gap if gap else 0.0
    assert abs(up - wanted) <= 5 * 0.5 / n**0.5


@given(floats, st.integers(0, 2**31 - 1))
def test_rounding_is_odd(value, seed):
    plus, minus = rounded(value, 64, seed), rounded(-value, 64, seed)
    assert torch.equal(plus, -minus) and torch.equal(plus.signbit(), ~minus.signbit())


@given(floats)
def test_what_bfloat16_holds_stays(value):
    x = torch.tensor(value).bfloat16()
    assert torch.equal(rounded(float(x), 256).view(torch.int16), x.expand(256).contiguous().view(torch.int16))


def test_edges_of_rounding():
    """NaN and infinity stay, also a NaN whose bits are next to overflow; 0 and -0 stay; mantissas carry."""
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nan.repeat(100)).isnan().all()
    assert (rounded(INF, 100) == INF).all() and (rounded(-INF, 100) == -INF).all()
    assert (rounded(-0.0, 100) == 0).all() and rounded(-0.0, 100).signbit().all()
    past = rounded(torch.finfo(torch.float32).max, 1000)
    assert set(past.tolist()) == {INF} or set(past.tolist()) == {INF, BIG}
    assert set(rounded(1 - 2**-10, 1000).tolist()) == {1 - 2**-8, 1.0}, "the carry reaches the exponent"
    tiny = rounded(2.0**-149, 1 << 18)
    assert set(tiny.tolist()) == {0.0, 2.0**-133}, "so do subnormal numbers"
    with pytest.raises(ValueError, match="float32, got torch.float64"):
        stochastic_round(torch.zeros(2, dtype=torch.float64))


def test_rounding_leaves_its_input_and_the_global_generator_alone():
    x, state = torch.randn(100), torch.get_rng_state()
    before = x.clone()
    first = stochastic_round(x, torch.Generator().manual_seed(3))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, stochastic_round(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, stochastic_round(x, torch.Generator().manual_seed(4)))


def test_small_steps_of_bfloat16_weights_are_taken():
    """1,000 steps of 1e-5 from 1.0 come to 1.01; bfloat16 alone stays at 1.0, for its next number is 1.0078."""
    plain = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    sgd = torch.optim.SGD([plain], lr=1e-5)
    ours = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    in_backward([("w", ours)], lr=1e-5, make_optimizer=torch.optim.SGD)
    for _ in range(1000):
        plain.grad = torch.full_like(plain, -1.0)
        sgd.step()
        ours.sum().neg().backward()
    assert (plain == 1).all()
    # a step moves by one distance d with probability 1e-5 / d: the variance of 1,000 steps is at most 1e-2 d
    error = (1e-2 * 2**-7 / 4096) ** 0.5
    assert abs(ours.double().mean() - 1.01) < 5 * error
    assert ours.dtype == torch.bfloat16 and len(ours.unique()) >= 2


def small(dtype=torch.float32, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.SiLU(), nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)


def loss_at(net, step):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return (net(x.to(next(net.parameters()).dtype)).float() - x[:, :3].sin()).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_is_the_plain_optimiser_bit_for_bit(name):
    """Also when the learning rate changes on the way."""
    ours, theirs = small(), small()
    lean = in_backward(ours.named_parameters(), lr=1e-2, make_optimizer=OPTIMIZERS[name])
    plain = OPTIMIZERS[name](theirs.parameters(), lr=1e-2)
    first = loss_at(ours, 0).item()
    for step in range(8):
        lean.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 1e-2 / (1 + step)
        lean.zero_grad()
        loss_at(ours, step).backward()
        lean.step()
        plain.zero_grad()
        loss_at(theirs, step).backward()
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert loss_at(ours, 0) < first and lean.param_groups[0]["initial_lr"] == 1e-2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_convolution_steps_as_a_matrix(name, layout):
    """(out, in, 1, 1), (out, in, 3, 3) and one of groups: the plain optimiser's numbers on (out, in * kernel), whatever
    the layout in memory, and after two steps Adafactor's state is a number a row and a column."""
    for shape in ((24, 16, 1, 1), (6, 4, 3, 3), (8, 1, 3, 3)):
        torch.manual_seed(0)
        ours = nn.Parameter(torch.randn(shape).to(memory_format=layout))
        plain = nn.Parameter(ours.detach().flatten(1).clone())
        lean = in_backward([("conv", ours)], lr=1e-2, make_optimizer=OPTIMIZERS[name])
        optimizer = OPTIMIZERS[name]([plain], lr=1e-2)
        for step in range(2):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            (ours * gradient).sum().backward()
            plain.grad = gradient.flatten(1)
            optimizer.step()
            assert torch.equal(ours.flatten(1), plain) and ours.is_contiguous(memory_format=layout)
        if name == "adafactor":
            (state,) = lean.state_dict()["states"]["conv"]["state"].values()
            numbers = sum(value.numel() for value in state.values() if value.ndim)
            assert numbers == shape[0] + shape[1] * shape[2] * shape[3]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_is_one_float32_step_then_rounding(name):
    """After one step each weight is a neighbour of what float32 arithmetic on the same gradient gives."""
    net = small(torch.bfloat16)
    before = [p.detach().float().clone().requires_grad_() for p in net.parameters()]
    gradients = torch.autograd.grad(loss_at(net, 0), list(net.parameters()))
    in_backward(net.named_parameters(), lr=1e-2, make_optimizer=OPTIMIZERS[name])
    loss_at(net, 0).backward()
    plain = OPTIMIZERS[name](before, lr=1e-2)
    for p, gradient in zip(before, gradients):
        p.grad = gradient.float()
    plain.step()
    moved = 0
    for ours, exact in zip(net.parameters(), before):
        ends = torch.tensor(np.array([neighbours(value) for value in exact.detach().flatten().numpy()]))
        ours = ours.detach().float().flatten()
        assert ((ours == ends[:, 0]) | (ours == ends[:, 1])).all()
        moved += (ours != exact.detach().flatten().bfloat16().float()).sum()
    assert moved > 50, "rounding to nearest would move none"


def test_bfloat16_training_falls():
    net = small(torch.bfloat16)
    in_backward(net.named_parameters(), lr=2e-3, make_optimizer=torch.optim.AdamW)
    first = sum(loss_at(net, step).item() for step in range(10))
    for step in range(200):
        loss_at(net, step % 10).backward()
    assert sum(loss_at(net, step).item() for step in range(10)) < 0.5 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gradient_lives_at_a_time(dtype):
    """None is left after backward, nor a stand-in of any size; the most that is alive in the midst is one."""
    net = small(dtype)
    alive = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in net.parameters())))
    lean = in_backward(net.named_parameters(), lr=1e-2)
    loss_at(net, 0).backward()
    assert alive == [1] * len(list(net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert all(s.numel() == 0 and s.grad is None for s in lean.stand_ins)


@settings(max_examples=8)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(0, 2**31 - 1), st.sampled_from(sorted(OPTIMIZERS)))
def test_resume_is_bit_for_bit(before, after, seed, name):
    """Through a file read with weights_only=True; the seed and the learning rate come from the file."""

    def run(net, lean, steps):
        for step in steps:
            loss_at(net, step).backward()
        return [p.detach().view(torch.int16) for p in net.parameters()]

    whole = small(torch.bfloat16)
    wanted = run(
        whole,
        in_backward(whole.named_parameters(), lr=3e-2, make_optimizer=OPTIMIZERS[name], seed=seed),
        range(before + after),
    )
    first = small(torch.bfloat16)
    lean = in_backward(first.named_parameters(), lr=3e-2, make_optimizer=OPTIMIZERS[name], seed=seed)
    run(first, lean, range(before))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": lean.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = small(torch.bfloat16)
    second.load_state_dict(saved["net"])
    lean = in_backward(second.named_parameters(), lr=1.0, make_optimizer=OPTIMIZERS[name], seed=seed + 1)
    lean.load_state_dict(saved["optimizer"])
    assert lean.param_groups[0]["lr"] == lean.param_groups[0]["initial_lr"] == 3e-2
    found = run(second, lean, range(before, before + after))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_rounding_depends_on_seed_parameter_and_step():
    """Equal parameters with equal gradients round differently, and so does one parameter at each of its steps."""

    def run(seed, steps=1):
        net = nn.ParameterDict({name: torch.ones(512, dtype=torch.bfloat16) for name in "ab"})
        in_backward(net.named_parameters(), lr=2**-9, make_optimizer=torch.optim.SGD, seed=seed)
        moves = []
        for _ in range(steps):
            before = {name: p.detach().clone() for name, p in net.items()}
            sum(p.sum() for p in net.values()).backward()
            moves.append({name: p.detach() - before[name] for name, p in net.items()})
        return moves

    (one,), (same,), (other,) = run(0), run(0), run(1)
    assert torch.equal(one["a"], same["a"]) and torch.equal(one["b"], same["b"])
    assert not torch.equal(one["a"], one["b"]) and not torch.equal(one["a"], other["a"])
    first, second = run(0, 2)
    assert not torch.equal(first["a"] == 0, second["a"] == 0)


@pytest.mark.parametrize("later", [0, 2])
def test_a_gradient_that_is_not_finite_is_told_when_it_is_asked_for(later):
    """Some steps later too, once, and by the name of its parameter; of finite ones nothing is said."""
    net = small(torch.bfloat16)
    lean = in_backward(net.named_parameters(), lr=1e-2)
    loss_at(net, 0).backward()
    lean.check()
    hook = net[3].weight.register_hook(lambda grad: torch.where(torch.arange(len(grad))[:, None] == 1, INF, grad))
    loss_at(net, 0).backward()
    hook.remove()
    for _ in range(later):
        net[3].weight.data.zero_()
        loss_at(net, 0).backward()
    for _ in range(2):  # what was told once is not forgotten, but by a state that is loaded
        with pytest.raises(FloatingPointError, match=r"gradient of 3\.weight is not finite"):
            lean.check()
    lean.load_state_dict(lean.state_dict())
    lean.check()


def test_stopped_it_lets_go():
    """The backward pass is a plain one again, and the parameters are freed, which their hooks prevented."""
    net = small()
    lean, seen = in_backward(net.named_parameters(), lr=1e-2), weakref.ref(net[0].weight)
    loss_at(net, 0).backward()
    lean.stop()
    before = net[0].weight.detach().clone()
    loss_at(net, 1).backward()
    assert torch.equal(net[0].weight, before) and all(p.grad is not None for p in net.parameters())
    del net, lean
    gc.collect()
    assert seen() is None


def test_wrong_use():
    net = small()
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^0\.weight is frozen"):
        in_backward(net.named_parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"^0\.weight is torch\.float16"):
        in_backward(small(torch.float16).named_parameters(), lr=1e-2)
    saved = in_backward(small().named_parameters(), lr=1e-2).state_dict()
    with pytest.raises(ValueError, match="other parameters .first difference: 5.bias"):
        in_backward(list(small().named_parameters())[:-1], lr=1e-2).load_state_dict(saved)


def test_a_sharded_parameter_steps_by_its_piece():
    """Under FSDP2, here of one process, hooks of sharded parameters are called; a piece without rows is passed by."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, ours = small(), small()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(ours, mesh=mesh)
        in_backward(ours.named_parameters(), lr=1e-2, make_optimizer=torch.optim.AdamW)
        for step in range(3):
            loss_at(ours, step).backward()
            adamw.zero_grad()
            loss_at(plain, step).backward()
            adamw.step()
        for a, b in zip(ours.parameters(), plain.parameters()):
            assert torch.equal(a.to_local(), b) and a.grad is None
    finally:
        dist.destroy_process_group()
    for dtype in (torch.float32, torch.bfloat16):
        empty = nn.Parameter(torch.empty(0, 4, dtype=dtype))
        in_backward([("empty", empty)], lr=1e-2)
        empty.sum().backward()
        assert empty.grad is None


def test_a_twinflow_loss_falls_inside_backward():
    """The whole method with bfloat16 weights: the velocity towards one point is learnt, and no gradient is left."""
    torch.manual_seed(0)
    net = ttf.nets.DiT(size=4, channels=1, width=16, depth=1, heads=2, patch=2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net.bfloat16()
    lean = in_backward(net.named_parameters(), lr=3e-3, make_optimizer=torch.optim.AdamW)
    loss, x = ttf.TwinFlowLoss(order=1), torch.full((32, 1, 4, 4), 2.0)
    generator = torch.Generator().manual_seed(0)
    bases = []
    for _ in range(120):
        lean.zero_grad()
        out = loss(net, x, generator=generator)
        out.total.backward()
        lean.step()
        bases.append(out.base.item())
    assert np.mean(bases[-10:]) < 0.5 * np.mean(bases[:10])
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in net.parameters())
