"""Arrays as they are given: real numbers alone, in float64 until they are of spread one; some rows held out."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tinytwinflow as ttf
from tinytwinflow.cli.commands import main
from tinytwinflow.data.given import Stream, Table, in_units
from tinytwinflow.data.points import Points
from tinytwinflow.evaluation.tables import SEEN

QUICK = {"steps": 300, "width": 32, "depth": 2, "batch_size": 64, "lr": 1e-2, "eval_samples": 60, "warmup_steps": 50}
SCALES = {  # where float32 would tell nothing or little apart: seconds of a clock, metres of a map, sizes beyond it
    "clock": 1.7e9 + np.arange(100) / 2,
    "map": 4.6e6 + np.random.default_rng(0).permutation(100) / 4,
    "large": 1e39 * (1 + np.arange(100)),
    "small": 1e-120 * (1 + np.arange(100)),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("ending", ["csv", "npy", "array"])
def test_numbers_of_any_size_are_told_apart_and_come_back(tmp_path, name, ending):
    """The 100 standardised values are as far apart as the 100 given, and mapped back they are what was given."""
    x = np.stack([SCALES[name], np.sin(np.arange(100))], 1)
    if ending == "csv":
        np.savetxt(tmp_path / "x.csv", x, "%.17g", ",")
    np.save(tmp_path / "x.npy", x)
    table = Table(x, 8) if ending == "array" else Points(str(tmp_path / f"x.{ending}"), 8)
    column = table.table[:, 0].double().numpy()
    assert table.table.dtype == torch.float32 and len(np.unique(column)) == 100
    assert np.allclose(column, (SCALES[name] - SCALES[name].mean()) / SCALES[name].std(ddof=1), atol=1e-5)
    back = in_units(table.table, table.scaling)
    assert back.dtype == np.float64 and np.abs(back - x).max(0)[0] < 1e-6 * SCALES[name].std()


def test_samples_of_large_numbers_lie_among_them(tmp_path):
    """Of `fit` and of the command line: half a minute in 1.7e9 seconds, not one value, nor those of a float32."""
    x = np.stack([1.7e9 + np.random.default_rng(0).uniform(0, 50, 300)] * 2, 1) + [0, 1e6]
    np.savetxt(tmp_path / "x.csv", x, "%.17g", ",")
    model = ttf.fit(tmp_path / "x.csv", out=tmp_path / "run", **QUICK)
    assert main(["sample", str(tmp_path / "run"), "--n", "300", "--out", str(tmp_path / "y.npy")]) == 0
    for y in (model.sample(300, seed=0), np.load(tmp_path / "y.npy")):
        assert y.dtype == np.float64 and len(np.unique(y[:, 0])) > 290
        assert (np.abs(y.mean(0) - x.mean(0)) < 15).all() and (5 < y.std(0)).all() and (y.std(0) < 30).all()


@pytest.mark.parametrize(
    "column, match",
    [
        (1e300 * np.arange(9), "column 1 spreads too far: its squares are beyond float64"),
        (1.7e308 * np.linspace(-1, 1, 9), "column 1 spreads too far: its squares are beyond float64"),
        (np.full(9, 3.0), "column 1 is constant, as far as float64 tells"),
        (np.array([0.3, 0.1 + 0.2] * 5)[:9], "column 1 is constant, as far as float64 tells"),
        (1e16 + 2 * (np.arange(9) % 2), "column 1 is constant, as far as float64 tells"),
    ],
)
def test_a_column_without_a_spread_that_float64_holds_is_refused(column, match):
    """A spread below the rounding of the numbers themselves is none: it is what a sum in another order leaves."""
    with pytest.raises(ValueError, match=match):
        Table(np.stack([np.arange(9.0), column], 1), 4)


def test_rounding_is_that_of_the_type_given():
    """Half a minute in 1.7e9 is noise in float32, whose next number is 128 away, and none in whole numbers."""
    seconds = np.stack([1_700_000_000 + np.arange(200)] * 2, 1)
    assert np.array_equal(in_units(Table(seconds, 4).table, Table(seconds, 4).scaling), seconds)
    for x in (seconds.astype(np.float32), torch.from_numpy(seconds).float()):
        with pytest.raises(ValueError, match="column 0 is constant, as far as float32 tells"):
            Table(x, 4)


good = np.random.default_rng(0).normal(3, 2, (30, 2))


@pytest.mark.parametrize("dtype", [">f8", ">f4", "<i2", ">i8", "u1", "f2"])
def test_numbers_in_any_order_of_bytes_come_back_in_their_type(dtype):
    x = (10 * good + 50).astype(dtype)
    table = Table(x, 4)
    back = in_units(table.table, table.scaling)
    assert back.dtype == np.dtype(dtype).newbyteorder("=") and np.allclose(
        back.astype(float), x.astype(float), rtol=2e-3
    )


@pytest.mark.parametrize("dtype", ["complex128", "datetime64[s]", "timedelta64[s]", "U9", "S9", "O", "f4,f4", "g"])
def test_what_is_no_real_number_is_refused_as_samples_and_as_labels(dtype):
    """Nothing is made a number, and no part of one is lost."""
    wrong = (100 * good).astype(int).astype(dtype)
    for data in (wrong, (good, wrong[:, 0]), [wrong] * 3, [(good, wrong[:, 0])] * 3, (good, wrong)):
        with pytest.raises(
            ValueError, match="real numbers of at most 64 bits|labels are whole numbers.* 64 bits"
        ) as error:
            ttf.fit(data, **QUICK)
        assert "\n" not in str(error.value)


def test_of_torch_and_numpy_too_what_would_be_lost_is_refused():
    tensor = torch.from_numpy(good)
    for data, match in [
        (tensor + 1j, "samples are real numbers of at most 64 bits, got torch.complex128"),
        (tensor > 0, "samples are real numbers of at most 64 bits, got torch.bool"),
        (good > 0, "samples are real numbers of at most 64 bits, got bool"),
        ((tensor, tensor[:, 0] + 1j), "labels are whole numbers.*, got torch.complex128"),
        (np.ma.masked_greater(good, 4), "samples are real numbers, some are masked"),
    ]:
        with pytest.raises(ValueError, match=match):
            ttf.fit(data, **QUICK)
    assert ttf.fit((good, good[:, 0] > 3), **QUICK | {"steps": 6, "warmup_steps": 0}).net.classes == 2, (
        "two labels are plain"
    )


def rows_of(table, x):
    """Which rows of the table some standardised samples are; its first column counts them."""
    return in_units(x, table.scaling)[:, 0].round().astype(int).tolist()


@settings(max_examples=25)
@example(239, None, 0, 50)
@example(240, None, 0, 50)
@example(439, 10, 0, 50)
@example(440, 10, 0, 50)
@given(st.integers(4, 700), st.sampled_from([None, 2, 10]), st.integers(0, 9), st.integers(1, 400))
def test_rows_that_are_measured_against_are_not_trained_on(n, classes, seed, many):
    """One in twenty, from 12 of them on; of too few all are trained on, which is said. Both halves are alike."""
    x = np.stack([np.arange(n), np.random.default_rng(seed).normal(size=n)], 1)
    labels = None if classes is None else np.arange(n) % classes
    table = Table(x, 1, seed, labels=labels)
    trained = {row for step in range(n) for row in rows_of(table, table.batch(step)[0])}
    (one, label), (other, _) = table.fresh(many, 0), table.fresh(many, 1)
    halves = rows_of(table, one), rows_of(table, other)
    assert len(halves[0]) == len(halves[1]) and len({*halves[0], *halves[1]}) == 2 * len(halves[0])
    enough = n // 20 >= 12 and (classes is None or n // 20 // 2 > classes)
    apart = set(range(n)) - trained
    assert table.held_out == enough and len(apart) == (n // 20 if enough else 0)
    assert len(halves[0]) == min(many, (len(apart) if enough else n) // 2)
    assert not enough or {*halves[0], *halves[1]} <= apart
    assert label is None or label.tolist() == [row % classes for row in halves[0]]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([8, 60, 239, 240, 700]), st.integers(1, 1000), st.integers(0, 99))
def test_neighbours_are_rows_trained_on_or_of_few_rows_those_of_draw_0(n, many, seed):
    """Each once, from anywhere in the table, and never those of draw 1, which real data's own figure is taken of."""
    table = Table(torch.arange(n).double()[:, None], 4, seed)
    near, rows = (set(x.flatten().tolist()) for x in (table.neighbours(many), table.table))
    zero, one, trained = (set(x.flatten().tolist()) for x in (
        table.fresh(n, 0)[0], table.fresh(n, 1)[0], table.table[table.rows]))  # fmt: skip
    assert near <= (trained if table.held_out else zero) and not near & one
    assert len(near) == len(table.neighbours(many)) == min(many, len(trained) if n >= 240 else n // 2)
    if 20 <= many < 0.8 * n and n >= 240:
        assert max(near) > sorted(rows)[int(0.8 * n)] and min(near) < sorted(rows)[int(0.2 * n)]


def test_what_is_held_out_is_of_every_kind_and_the_same_for_every_run():
    """Rows that come in turns are not taken by turns: each of twenty labels is trained on and measured against."""
    x, labels = np.random.default_rng(0).normal(size=(4000, 2)), np.arange(4000) % 20
    first, second = Table(x, 64, 0, labels=labels), Table(x, 64, 5, labels=labels)
    assert torch.equal(first.apart, second.apart) and len(first.apart) == 200
    for rows in (first.rows, first.apart):
        assert set(labels[rows]) == set(range(20))
    rare = np.zeros(4000, int)
    rare[first.apart[0]] = 1  # the only one of its class
    assert Table(x, 64, labels=rare).held_out is False and Table(x, 64, labels=np.roll(rare, 1)).held_out


@pytest.mark.parametrize("dtype, column", [("float16", [900.0, 901.5]), ("bfloat16", [1.0, 1.015625])])
def test_numbers_that_a_coarse_type_tells_apart_are_not_constant(dtype, column):
    x = torch.tensor(column * 50).to(getattr(torch, dtype))
    table = Table(torch.stack([x, torch.arange(100.0).to(x)], 1), 4)
    assert len(table.table[:, 0].unique()) == 2


def test_what_was_trained_on_and_measured_against_is_said(capsys, tmp_path):
    quick = QUICK | {"steps": 2, "warmup_steps": 0}
    many = np.random.default_rng(0).normal(size=(400, 2))
    for data, held_out, samples in [
        (many, True, 10),
        (many[:100], False, 50),
        ([many] * 3, False, 60),
        ("moons", True, 60),
    ]:
        result = ttf.fit(data, **{k: v for k, v in quick.items() if k != "batch_size"}).evaluate(nfes=(1,))
        assert (result["held_out"], result["samples"]) == (held_out, samples)
        said = capsys.readouterr().out
        assert (SEEN in said) == (not held_out) and f"measured on {samples} samples and as many real ones" in said
    pixels = torch.randint(0, 256, (480, 1, 8, 8), dtype=torch.uint8)
    table = Table(pixels, 8, labels=torch.arange(480) % 10)
    assert table.held_out and len(table.fresh(99)[0]) == 12
    assert not Stream([many]).held_out
    with pytest.raises(ValueError, match="needs at least 4 samples, got 3"):
        Table(many[:3], 4)


@pytest.mark.parametrize(
    "kinds, missing", [([1, 2, 3], 0), ([0, 5], 1), ([0, 1, 3], 2), ([10**9, 10**9 + 1], 0), ([0, 2**62], 1)]
)
def test_labels_with_gaps_are_refused_before_a_class_is_made_for_each(kinds, missing):
    """Nothing would be trained on the missing one. What the message says to do is right."""
    y = np.array(kinds)[np.arange(30) % len(kinds)]
    told = rf"labels run from 0 to {max(kinds)}, but {missing} is missing: np.unique\(y, return_inverse=True\)\[1\] num"
    for data in ((good, y), (torch.from_numpy(good), torch.from_numpy(y))):
        with pytest.raises(ValueError, match=told):
            ttf.fit(data, **QUICK)
    table = Table(good, 4, labels=np.unique(y, return_inverse=True)[1])
    assert table.classes == len(kinds) and table.labels.unique().tolist() == [*range(len(kinds))]
    assert Stream([(good[:15], np.arange(15) % 2 * 5)]).classes == 6, "of a stream, others may come later"


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_whole_numbers_that_float64_does_not_tell_apart_are_refused(make, dtype):
    """2^53 and 2^53 + 1 are one number there. Less a constant they are what they were."""
    kind, far = getattr(torch if make is torch.tensor else np, dtype), 2**53
    told = r"whole numbers must lie between -2\^53 and 2\^53 to be told apart: subtract a constant first"
    rows = [[far + 3 * i, i] for i in range(30)]
    for step in (1, 2):
        with pytest.raises(ValueError, match=told):
            Table(make(rows[::step], dtype=kind), 4)
    nearer = make([[far - 1 - 3 * i, i] for i in range(30)], dtype=kind)
    assert in_units(Table(nearer, 4).table, Table(nearer, 4).scaling).tolist() == nearer.tolist()
    stream = Stream([nearer] * 17 + [make(rows, dtype=kind)])
    with pytest.raises(ValueError, match=told):
        for step in range(18):
            stream.batch(step)


def test_sparse_tensors_are_refused_as_samples_and_as_labels():
    x, y, told = (
        torch.from_numpy(good),
        torch.arange(30) % 2,
        r"in a dense tensor, got torch.sparse_coo: x.to_dense\(\)",
    )
    for data in (x.to_sparse(), (x.to_sparse(), y), [x.to_sparse()] * 3):
        with pytest.raises(ValueError, match=f"samples are real numbers {told} is one"):
            ttf.fit(data, **QUICK)
    with pytest.raises(ValueError, match=f"labels are whole numbers, other conditions numbers {told}"):
        ttf.fit((x, y.to_sparse()), **QUICK)
