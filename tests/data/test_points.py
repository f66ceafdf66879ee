"""Batches depend on nothing but the step; files of points, standardised and mapped back, or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytwinflow.data import points as data
from tinytwinflow.data import toys
from tinytwinflow.data.given import in_units

names = st.sampled_from(toys.TOYS)


@settings(max_examples=20)
@given(names, st.integers(0, 50), st.integers(1, 9), st.integers(0, 5))
def test_a_batch_is_a_function_of_seed_and_step(name, step, batch_size, seed):
    first, second = (data.Points(name, batch_size, seed) for _ in range(2))
    first.batch(step + 3)
    assert torch.equal(first.batch(step)[0], second.batch(step)[0])
    assert not torch.equal(first.batch(step)[0], first.batch(step + 1)[0])
    assert not torch.equal(first.batch(step)[0], data.Points(name, batch_size, seed + 1).batch(step)[0])


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(1, 15), st.integers(0, 5))
def test_every_epoch_of_a_file_holds_every_point_once(tmp_path_factory, n, batch_size, seed):
    path = tmp_path_factory.mktemp("points") / "points.npy"
    np.save(path, np.arange(3 * n, dtype=np.float64).reshape(n, 3))
    source = data.Points(str(path), batch_size, seed)
    steps = 2 * n  # a whole number of epochs: 2 n batches are 2 * batch_size epochs
    x = torch.from_numpy(in_units(torch.cat([source.batch(i)[0] for i in range(steps)]), source.scaling))
    firsts = (x[:, 0] / 3).round().long().view(-1, n)
    assert (firsts.sort(1)[0] == torch.arange(n)).all()


def test_a_files_points_are_standardised_and_mapped_back(tmp_path):
    raw = np.random.default_rng(0).normal([5, -300, 0.1], [2, 50, 0.001], (500, 3))
    np.savetxt(tmp_path / "points.csv", raw, delimiter=",", header="a,b,c", comments="")
    source = data.Points(str(tmp_path / "points.csv"), 500)
    assert source.shape == (3,)
    x, label = source.batch(0)
    assert label is None
    assert x.mean(0).abs().max() < 1e-3 and (x.std(0) - 1).abs().max() < 1e-3
    back = in_units(x, source.scaling)
    assert np.allclose(np.sort(back, 0), np.sort(raw, 0), rtol=1e-4, atol=1e-6)


def test_fresh_points_are_not_the_training_points_of_a_named_set():
    source = data.Points("moons", 64)
    assert not torch.equal(source.fresh(64)[0], source.batch(0)[0])
    assert not torch.equal(source.fresh(64, 0)[0], source.fresh(64, 1)[0])
    assert torch.equal(source.fresh(64, 1)[0], source.fresh(64, 1)[0])


def test_wrong_files_are_named_with_their_fault(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    np.save(tmp_path / "one.npy", np.zeros((1, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "words.npy", np.array([["a", "b"], ["c", "d"]]))
    np.save(tmp_path / "constant.npy", np.ones((5, 2)) * [1, 2])
    np.save(tmp_path / "object.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    good = "1,2\n3,4\n"
    for path, fault in [
        (str(tmp_path / "missing.csv"), "no such file"),
        (write("empty.csv", b""), "empty"),
        (write("head.csv", b"x,y\n"), "needs at least 2 points|not a table"),
        (write("text.csv", b"x,y\n1,2\nthree,4\n"), "not a table of numbers"),
        (write("ragged.csv", b"1,2\n3\n"), "not a table of numbers"),
        (write("nan.csv", b"1,2\nnan,4\n5,6\n"), "row 1 holds NaN"),
        (write("inf.csv", b"1,2\n3,inf\n"), "row 1 holds NaN or infinity"),
        (write("one.csv", b"1,2\n"), "needs at least 2 points, got 1"),
        (write("fake.npy", good.encode()), "not a table of numbers"),
        (str(tmp_path / "one.npy"), "at least 2 points"),
        (str(tmp_path / "flat.npy"), r"must be a table \(n, D\)"),
        (str(tmp_path / "words.npy"), "not a table of numbers"),
        (str(tmp_path / "object.npy"), "not a table of numbers"),
        (str(tmp_path / "constant.npy"), "column 0 is constant"),
        (write("points.txt", good.encode()), ".npy or .csv"),
    ]:
        with pytest.raises(ValueError, match=fault):
            data.read_points(path)
    with pytest.raises(ValueError, match="unknown data set 'blobs': choose from"):
        data.Points("blobs", 4)
