"""Batches depend on nothing but the step; files of points, standardised and mapped back, or refused."""

import contextlib
import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
@given(st.integers(4, 12), st.integers(1, 15), st.integers(0, 5))
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
    assert source.shape == (3,) and source.batch(0)[1] is None
    x = source.table
    assert x.mean(0).abs().max() < 1e-3 and (x.std(0) - 1).abs().max() < 1e-3
    back = in_units(x, source.scaling)
    assert np.allclose(np.sort(back, 0), np.sort(raw, 0), rtol=1e-4, atol=1e-6)


def test_fresh_points_are_not_the_training_points_of_a_named_set():
    source = data.Points("moons", 64)
    assert not torch.equal(source.fresh(64)[0], source.batch(0)[0])
    assert not torch.equal(source.fresh(64, 0)[0], source.fresh(64, 1)[0])
    assert torch.equal(source.fresh(64, 1)[0], source.fresh(64, 1)[0])


def test_neighbours_of_a_named_set_are_as_many_as_asked_and_others_than_what_is_measured():
    source = data.Points("moons", 64)
    near, *others = (source.neighbours(5000), source.batch(0)[0], source.fresh(5000, 0)[0], source.fresh(5000, 1)[0])
    assert near.shape == (5000, 2) and torch.equal(near, source.neighbours(5000))
    assert not any((some[:, None] == near).all(2).any() for some in others)


def test_wrong_files_are_named_with_their_fault(tmp_path):
    """In one line, with the number of the file's own line, blank ones counted."""

    def refused(name, content, fault):
        path = tmp_path / name
        if isinstance(content, np.ndarray):
            np.save(path, content, allow_pickle=True)
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=fault) as error:
            data.Points(str(path), 4)
        assert str(error.value).startswith(str(path)) and len(str(error.value).splitlines()) == 1

    good = "1,2\n3,4\n5,7\n6,6\n"
    refused("missing.csv", None, "no such file")
    refused("empty.csv", "", "the file is empty")
    for name in ("a.txt", "a.tsv", "a.npz", "a.parquet", "a.csv.gz"):
        refused(name, good, "points are read from .npy, or from .csv with commas")
    refused("a.csv", "\n\n", "holds no numbers")
    refused("a.csv", "x,y\n", "holds no numbers")
    refused("a.csv", "1,2\n", "needs at least 4 samples, got 1")
    refused("a.csv", "x,y\n1,2\nthree,4\n", "line 3: 'three' is not a finite number$")
    refused("a.csv", "x,y\n\n1,2\n\nthree,4\n", "line 5: 'three' is not a finite number$")
    refused("a.csv", '"x\n1",y\n1,2\nm,s\n', "line 4: 'm' is not a finite number$")
    refused("a.csv", "x,y\nm,s\n1,2\n", "line 2: 'm' is not a finite number$")
    refused("a.csv", "1,2\n3\n", "line 2: 1 cells, but line 1 has 2")
    refused("a.csv", "1,2\n\n3\n", "line 3: 1 cells, but line 1 has 2")
    refused("a.csv", "a,b,c\n1,2\n", "line 2: 2 cells, but line 1 has 3")
    refused("a.csv", "1,2\n3,4,\n", "line 2: 3 cells, but line 1 has 2")
    for word in ("nan", "NaN", "inf", "-Infinity", "1e400"):
        refused("a.csv", f"1,2\n3,{word}\n" + good, f"line 2: '{word}' is not a finite number")
        refused("a.csv", f"1,{word}\n" + good, f"line 1: '{word}' is not a finite number")
    for line in ("7,", "7, "):
        refused("a.csv", line + "\n" + good, "line 1: an empty cell")
        refused("a.csv", good + line + "\n" + good, "line 5: an empty cell")
    refused("a.csv", ",7\n" + good, "line 1: the first cell is empty, as above row numbers: .*index=False")
    refused("a.csv", "x\n1\n\n2\n5\n7\n", "line 3: an empty cell")
    refused("a.csv", "\n1\n2\n5\n7\n", "line 1: an empty cell")
    refused("a.csv", 'x\n1\n""\n2\n5\n7\n', "line 3: an empty cell")
    refused("a.csv", "#1,2\n" + good, "line 1: '#1' is not a finite number$")
    refused("a.csv", good + "#1,2\n", "line 5: '#1' is not a finite number$")
    refused("a.csv", "1,2 # why\n" + good, "line 1: '2 # why' is not a finite number$")
    for line in ("1;2", "1,5;2,5", "x;y", "1\t2", "x\ty", "1,5\t2,5", "\t5"):
        refused("a.csv", f"{line}\n" * 9, "line 1: .*: commas separate cells, and numbers have a decimal point$")
    refused("a.csv", "1 2\n3 4\n", "line 2: '3 4' is not a finite number$")
    refused("a.csv", '"1,5","2"\n', "line 1: '1,5' is not a finite number$")
    refused("a.csv", '1,2\n"3"4,5\n', "line 2: ',' expected after")
    refused("a.csv", '1,2\n"3,5\n6,7', "line 2: unexpected end of data")
    refused("a.csv", "1,2\n3,4\n".encode("utf-16"), "no UTF-8 text$")
    refused("a.npy", good, "not a table of numbers .the magic string")
    refused("a.npy", np.zeros((1, 2)), "needs at least 4 samples, got 1")
    refused("a.npy", np.zeros(5), r"points are a table .n, D., got shape .5,. of float64")
    refused("a.npy", np.zeros((5, 3, 4, 4)), "points are a table .n, D., got shape .5, 3, 4, 4.")
    refused("a.npy", np.array([[{}, {}]] * 5, dtype=object), "not a table of numbers .Object arrays cannot be loaded")
    refused("a.npy", np.array([[1, 2], [3, np.nan], [5, 6], [7, 8]]), "row 1 holds NaN or infinity")
    refused("a.npy", np.ones((5, 2)) * [1, 2], "column 0 is constant")
    for dtype in (complex, "datetime64[D]", "timedelta64[s]", str, bool, np.longdouble):
        refused("a.npy", np.array([[1, 2], [3, 5], [4, 2]] * 3).astype(dtype), "samples are real numbers of at most 64")
    refused("a.npy", np.zeros((5, 2), [("point", float)]), "samples are real numbers of at most 64 bits, got .*point")
    np.save(tmp_path / "a.npy", np.random.rand(9, 2))
    whole = (tmp_path / "a.npy").read_bytes()
    for length in range(1, len(whole), 7):
        refused("a.npy", whole[:length], "not a table of numbers")
    with pytest.raises(ValueError, match="unknown data set 'blobs': choose from"):
        data.Points("blobs", 4)


def test_names_and_row_numbers_of_programs_are_told_or_refused(tmp_path, capsys):
    """What pandas writes by itself: names that count, and rows that count; other names are said, once."""

    def write(text, name="a.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    for text, match in [
        ("0,1\n5,6\n7,8\n9,4\n1,1\n", "line 1: counts 0, 1 ... as a program names columns: remove it, or write 0.0"),
        (",a,b\n0,5,6\n1,7,8\n2,9,4\n3,1,1\n", "line 1: the first cell is empty, as above row numbers: .*index=False"),
        (",0,1\n0,5,6\n1,7,8\n2,9,4\n3,1,1\n", "line 1: the first cell is empty, as above row numbers: .*index=False"),
        ("id,a\n0,5\n1,8\n2,9\n3,1\n", "a.csv: column 'id' counts 0, 1, 2 ... as row numbers do: .*index=False"),
    ]:
        with pytest.raises(ValueError, match=match):
            data.read_points(write(text))
    assert capsys.readouterr().err == ""
    path = write("length [m],# width\n0.0,5\n1,8\n3,9\n2,1\n")
    for _ in range(2):
        assert data.read_points(path).tolist() == [[0, 5], [1, 8], [3, 9], [2, 1]]
    assert capsys.readouterr().err == f"{path}: line 1 is taken for names: length [m], # width\n"
    assert data.read_points(write("0.0,1\n5,6\n")).tolist() == [[0, 1], [5, 6]]
    assert data.read_points(write("0,3\n1,6\n")).tolist() == [[0, 3], [1, 6]], "numbers without names are data"
    for name in ("B.CSV", "b.Csv"):
        assert data.Points(write("1,2\n3,4\n5,7\n6,6\n", name), 4).shape == (2,)
    assert capsys.readouterr().err == ""


EXAMPLES = int(os.environ.get("TINYTWINFLOW_FUZZ", 100))  # 2,000 where there is time
values = st.floats(-1e9, 1e9) | st.integers(-(10**6), 10**6).map(float) | st.sampled_from([1e39, -1e300, 0.1, 1e-300])
wrong = st.sampled_from(
    ["", " ", "nan", "NA", "inf", "-", "x", "1;2", "1 2", "#1", "1e999", '"', '"1,5"', "\t", "\0", "ß"]
)


@st.composite
def tables(draw):
    """A .csv as other programs write one.  -> bytes, the numbers in it, and whether anything is wrong with it"""
    width, rows = draw(st.integers(1, 4)), draw(st.integers(0, 8))
    x = draw(hnp.arrays(float, (rows, width), elements=values))
    write = draw(st.sampled_from([repr, "{:.17g}".format, " {!r} ".format, '"{!r}"'.format]))
    lines = [[write(float(value)) for value in row] for row in x]
    if draw(st.booleans()):
        lines.insert(0, draw(st.sampled_from([["a"], ["a [m]"], ['"a, b"'], ["# x"], ["é"]])) * width)
    faults = draw(st.integers(0, 1)) if lines else 0
    for _ in range(faults):
        line = lines[draw(st.integers(0, len(lines) - 1))]
        line[draw(st.integers(0, width - 1))] = draw(
            wrong if width > 1 else wrong.filter(bool)
        )  # or it is a blank line
    comma, end = draw(st.sampled_from([",", ",", ",", ";", "\t"])), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = [comma.join(line) for line in lines]
    for _ in range(draw(st.integers(0, 2))):
        text.insert(draw(st.integers(0, len(text))), "")
    whole = draw(st.sampled_from(["", "\ufeff"])) + end.join(text) + end * draw(st.booleans())
    return whole.encode(), x, faults or (comma != "," and width > 1) or "" in text


@settings(max_examples=EXAMPLES)
@given(tables())
def test_a_table_is_read_as_it_was_written_or_refused_in_one_line(tmp_path_factory, table):
    content, x, doubtful = table
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    path.write_bytes(content)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            read = data.read_points(path)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        counted = [np.array_equal(some, np.arange(len(some))) for some in (x[:, 0], *x[:1])]
        assert doubtful or not len(x) or any(counted), error
    else:
        if np.array_equal(read, x):
            return
        names = said.getvalue().partition("is taken for names: ")[2]
        assert doubtful and names and np.array_equal(read, x[1:]), "only a line that is said may be left out"
    try:
        source = data.Points(str(path), 4)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
    else:
        back = in_units(source.table, source.scaling)
        assert np.allclose(back, read, rtol=1e-6, atol=1e-6 * read.std(0).max())
