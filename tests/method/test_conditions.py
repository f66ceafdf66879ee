"""Laws of conditions: what holds for the rows of a tensor holds for those of a dict of tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow.method import conditions

one_of_each_kind = st.sampled_from(["none", "label", "tensor", "image", "dict"])


def made(kind, n, seed=0):
    """A condition of n rows of a kind."""
    draw = torch.Generator().manual_seed(seed)
    label, tensor = torch.randint(5, (n,), generator=draw), torch.randn(n, 3, generator=draw)
    image = torch.randn(n, 2, 2, 2, generator=draw)
    kinds = {"none": None, "label": label, "tensor": tensor, "image": image, "dict": {"a": label, "b": image}}
    return kinds[kind]


def parts(cond):
    return [] if cond is None else list(cond.values()) if isinstance(cond, dict) else [cond]


def same(a, b):
    assert type(a) is type(b) and (not isinstance(a, dict) or a.keys() == b.keys())
    assert len(parts(a)) == len(parts(b)) and all(map(torch.equal, parts(a), parts(b)))


@given(one_of_each_kind, st.integers(0, 5), st.permutations(range(5)))
def test_what_is_cut_and_joined_is_whole(kind, cut, order):
    """For slices and for lists of rows; in another order it is the other order."""
    cond = made(kind, 5)
    same(conditions.join(conditions.take(cond, slice(0, cut)), conditions.take(cond, slice(cut, 5))), cond)
    moved = conditions.take(cond, torch.tensor(order))
    assert all(torch.equal(a, b[order]) for a, b in zip(parts(moved), parts(cond)))
    same(conditions.join(cond), cond)
    same(conditions.join(*[conditions.take(cond, [i]) for i in order]), moved)


@given(one_of_each_kind, st.integers(1, 5))
def test_rows_are_counted_in_every_tensor(kind, n):
    cond = made(kind, n)
    conditions.check_rows(cond, n)
    conditions.check_rows({"none": None}, n)
    if cond is not None:
        name = "cond" if torch.is_tensor(cond) else next(iter(cond))
        with pytest.raises(ValueError, match=f"^{name} has {n} rows, x has {n + 1}$"):
            conditions.check_rows(cond, n + 1)
        with pytest.raises(ValueError, match=f"last has {n} rows, x has {n - 1}"):
            conditions.check_rows({"first": None, "last": parts(cond)[0]}, n - 1)


@given(st.sampled_from(["label", "tensor", "image", "dict"]), st.integers(1, 6), st.lists(st.booleans(), min_size=6))
def test_null_stands_for_any_number_of_rows_and_takes_the_place_of_some(kind, n, dropped):
    """A null of one row is that row for all; one of n rows is itself; no other number is taken for either."""
    cond, null, each = made(kind, n), made(kind, 1, seed=1), made(kind, n, seed=2)
    rows = torch.tensor(dropped[:n])
    spread = conditions.repeat(null, n)
    assert all(torch.equal(a, torch.cat([b] * n)) for a, b in zip(parts(spread), parts(null)))
    same(conditions.repeat(each, n), each)
    for one in (null, each):
        for found, kept, other in zip(
            *map(parts, (conditions.replace(cond, one, rows), cond, conditions.repeat(one, n)))
        ):
            assert all(torch.equal(found[i], other[i] if rows[i] else kept[i]) for i in range(n))
    if n > 2:
        with pytest.raises(ValueError, match=rf"null has shape \({n}.*x has {n - 1} rows: it needs 1 or as many"):
            conditions.repeat(each, n - 1)
        with pytest.raises(ValueError, match=r"null has shape \(2"):
            conditions.repeat(made(kind, 2), n)
    with pytest.raises(ValueError, match=r"null has shape \(\), but x has 4 rows"):
        conditions.repeat(torch.tensor(3), 4)


@given(one_of_each_kind, st.integers(1, 6), st.data())
def test_rows_of_what_stands_for_none_are_those_of_it_spread_over_all(kind, n, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
    for null in (made(kind, 1), made(kind, n)):
        some = conditions.repeat(conditions.take_null(null, rows), len(rows))
        same(some, conditions.take(conditions.repeat(null, n), rows))


@given(st.lists(st.sampled_from(["null", "own", "both", "kept"]), min_size=1, max_size=4), st.integers(1, 3))
def test_none_is_what_a_row_brings_then_what_null_says_then_the_row_itself(ways, n):
    """For each name on its own; what a row brings for that, no network is shown, and doing it again changes nothing.
    The row itself counts for the picture to edit alone."""
    names = {"source" if way == "kept" else "abcd"[i]: way for i, way in enumerate(ways)}
    whole = {name: made("tensor", n, seed=i) for i, name in enumerate(names)}
    null = {name: made("tensor", 1, seed=10 + i) for i, name in enumerate(names) if names[name] in ("null", "both")}
    own = {name: made("tensor", n, seed=20 + i) for i, name in enumerate(names) if names[name] in ("own", "both")}
    cond, none = conditions.apart({**whole, **{f"null_{name}": value for name, value in own.items()}}, null)
    same(cond, whole)
    assert none.keys() == names.keys()
    for name in names:
        assert torch.equal(none[name], own.get(name, null.get(name, whole[name])))
    again, still = conditions.apart(cond, none)
    same(again, cond), same(still, none)
    for name in null.keys() - own.keys():
        with pytest.raises(ValueError, match=f"null says nothing of {name}, and only source is kept"):
            conditions.apart(whole, {key: value for key, value in {**null, **own}.items() if key != name})


@given(one_of_each_kind)
def test_conditions_and_nulls_that_are_no_dicts_stay_as_they_are(kind):
    cond, one = made(kind, 3), torch.ones(1, 3)
    for null in (None, one, made("dict", 1)):
        found = conditions.apart(cond, null)
        assert found[0] is cond or kind == "dict"
        assert found[1] is null or kind == "dict" and isinstance(null, dict)


@given(one_of_each_kind)
def test_a_condition_moves_to_a_device_whole(kind):
    """To one without memory, which shows each tensor's move."""
    cond = made(kind, 3)
    moved = conditions.move(cond, "meta")
    assert type(moved) is type(cond) and [m.device.type for m in parts(moved)] == ["meta"] * len(parts(cond))
    assert [m.shape for m in parts(moved)] == [c.shape for c in parts(cond)]
