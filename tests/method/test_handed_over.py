"""Conditions, batches and fields as users hand them over: what is plain works, the rest is one line."""

import numpy as np
import pytest
import torch
from conftest import seeds
from hypothesis import given
from hypothesis import strategies as st

import tinytwinflow as ttf
from tinytwinflow.method.conditions import as_pair, check_rows, count_rows, join, move, repeat, replace, take
from tinytwinflow.method.twin import check_field


@given(st.integers(2, 6), seeds)
def test_a_dict_is_its_tensors_and_what_is_none_stays_none(n, seed):
    """Each operation on a dict is that operation on each of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    text, mask = torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)
    cond, rows = {"text": text, "mask": mask, "image": None}, torch.randperm(n, generator=generator)[: n // 2]
    for function in (
        lambda c: take(c, rows),
        lambda c: join(c, c),
        lambda c: repeat(take(c, slice(0, 1)), n),
        lambda c: move(c, "cpu"),
        lambda c: replace(c, take(c, slice(0, 1)), mask.bool()),
    ):
        out = function(cond)
        assert out["image"] is None and function(None) is None
        assert torch.equal(out["text"], function(text)) and torch.equal(out["mask"], function(mask))
    assert torch.equal(replace(text, text[:1], mask.bool())[0], text[0])
    for i in range(n):
        assert torch.equal(replace(text, text[:1], mask.bool())[i], text[0] if mask[i] else text[i])


@pytest.mark.parametrize(
    "other, kind",
    [
        (None, "None"), (torch.zeros(2), "a tensor"), ({"a": torch.zeros(2)}, "a dict of a"),
        ({"b": torch.zeros(2), "a": None}, "a dict of b"),
    ],
)  # fmt: skip
def test_conditions_of_two_kinds_are_not_joined(other, kind):
    cond = {"b": torch.zeros(2), "a": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"^conditions must be of one kind, got a dict of a, b and {kind}$"):
        join(cond, other)
    with pytest.raises(ValueError, match=f"^conditions must be of one kind, got {kind} and a dict of a, b$"):
        join(other, cond)


@pytest.mark.parametrize("n", [1, 4])
def test_rows_are_counted_in_what_is_not_none(n):
    tensor = torch.zeros(n, 3)
    for cond in (tensor, {"a": tensor}, {"a": None, "b": tensor}, {"b": tensor, "a": None}):
        assert count_rows(cond) == n


def test_a_label_stands_for_no_condition_as_its_tensor_does():
    net, x, label = ttf.nets.MLP(2, 8, 1, classes=2), torch.randn(6, 2), torch.tensor([0, 1] * 3)
    torch.nn.init.normal_(net.out.weight)
    totals = []
    for null in (2, np.int64(2), torch.tensor(2), torch.tensor([2]), [2]):
        draw = torch.Generator().manual_seed(0)
        totals.append(ttf.TwinFlowLoss(guidance=1.0)(net, x, label, null=null, generator=draw).total.item())
    assert len(set(totals)) == 1


@pytest.mark.parametrize(
    "cond, name, got",
    [
        (3, "cond", "int"), ([0, 1, 2], "cond", "list"), (np.zeros(3), "cond", "ndarray"), ("cat", "cond", "str"),
        (torch.tensor(1), "cond", "a tensor of no axes"), ({"a": 3}, "a", "int"), ({"a": {"b": 1}}, "a", "dict"),
    ],
)  # fmt: skip
def test_a_condition_of_another_kind_is_one_line(cond, name, got):
    x = torch.zeros(3, 2)
    for call in (
        lambda: check_rows(cond, 3),
        lambda: ttf.TwinFlowLoss()(ttf.nets.MLP(2, 8, 1, classes=3), x, cond),
        lambda: ttf.sample(ttf.nets.MLP(2, 8, 1, classes=3), x, cond=cond),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be None or a tensor of 3 rows.*, got {got}$"):
            call()


def test_a_loss_takes_a_dict_with_none_in_it_and_a_null_of_its_kind():
    def net(x, t, r, cond):
        assert cond["image"] is None and len(cond["text"]) == len(x)
        return x * w + cond["text"]

    w = torch.ones((), requires_grad=True)
    cond, x = {"text": torch.randn(6, 2), "image": None}, torch.randn(6, 2)
    out = ttf.TwinFlowLoss(guidance=0.5)(net, x, cond, null={"text": torch.zeros(1, 2), "image": None})
    out.total.backward()
    assert w.grad.isfinite()
    for null in ({"image": None}, {"texts": torch.zeros(1, 2)}):
        with pytest.raises(ValueError, match="null says nothing of (text|image), and only source is kept"):
            ttf.TwinFlowLoss(guidance=0.5)(net, x, cond, null=null)


def test_words_are_no_condition():
    with pytest.raises(ValueError, match="a condition is of numbers, got list "):
        move({"text": ["cat"]}, "cpu")


def test_a_batch_is_x_or_a_pair():
    x, y = np.zeros((2, 2), np.float32), [0, 1]
    for item, (a, b) in [(x, (x, None)), ((x,), (x, None)), ([x], (x, None)), ((x, y), (x, y)), ([x, None], (x, None))]:
        pair = as_pair(item)
        assert len(pair) == 2 and pair[0] is a and pair[1] is b
    for item in (3, "x", None, (x, y, y), [1.0, 2.0], {"x": x}):
        with pytest.raises(ValueError, match="a batch is x or a pair"):
            as_pair(item)


@pytest.mark.parametrize(
    "net",
    [lambda x, t: x, lambda x: x, lambda x, t, r: x, torch.nn.Linear(2, 2), lambda x, t, *, cond: x],
    ids=["x t", "x", "x t r", "module of x", "named cond"],
)
def test_a_field_of_other_arguments_is_one_line(net):
    x = torch.zeros(3, 2)
    calls = [lambda: check_field(net), lambda: ttf.TwinFlowLoss()(net, x), lambda: ttf.sample(net, x)]
    if isinstance(net, torch.nn.Module):
        calls.append(lambda: ttf.fit(torch.arange(8.0).view(4, 2), net))
    for call in calls:
        with pytest.raises(ValueError, match=r"called as net\(x, t, r, cond\), this one cannot be: ") as error:
            call()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("answer", [lambda x: (x,), lambda x: type("Output", (), {"sample": x})(), lambda x: x.numpy()])
def test_an_answer_that_is_no_tensor_is_one_line(answer):
    def net(x, t, r, cond=None):
        return answer(x)

    x = torch.zeros(3, 2)
    for call in (
        lambda: ttf.TwinFlowLoss()(net, x),
        lambda: ttf.TwinFlowLoss(order=0, share=0.0)(net, x),
        lambda: ttf.sample(net, x, 2),
        lambda: ttf.generate(net, x),
        lambda: ttf.gap(net, x, x[:, 0]),
    ):
        with pytest.raises(ValueError, match="must be tensors, got ") as error:
            call()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "x, got",
    [
        (np.zeros((3, 2)), "ndarray"), ([[0.0, 1.0]], "list"), (torch.zeros(3), r"torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.long), r"torch.int64 of shape \(3, 2\)"),
        (torch.zeros(0, 2), r"torch.float32 of shape \(0, 2\)"),
    ],
)  # fmt: skip
def test_samples_and_noise_that_are_no_batch_are_one_line(x, got):
    net = ttf.nets.MLP(2, 8, 1)
    for call, name in ((lambda: ttf.TwinFlowLoss()(net, x), "x"), (lambda: ttf.sample(net, x), "z")):
        with pytest.raises(
            ValueError, match=rf"{name} must be a floating-point batch \(B, \*D\), a tensor, got {got}$"
        ):
            call()
