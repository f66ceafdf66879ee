"""The pieces of the report, on their small stand-ins: every row that they are to tell, and what they say they lack."""

import pytest
import torch
from conftest import write_mnist

from tinytwinflow.benchmarks import pieces, speed
from tinytwinflow.evaluation import features
from tinytwinflow.nets.dit import SIZES
from tinytwinflow.training import distributed
from tinytwinflow.training.loop import PRECISIONS


def eagerly(net, how):
    """In place of `compile_as`: graphs are made and counted, and no code is built."""
    if how != "none":
        net.compile(backend="eager")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "s", (64, 3, 2))
    for room in (speed, distributed):
        monkeypatch.setattr(room, "compile_as", eagerly)
    monkeypatch.setattr(speed, "matrix_peak", lambda device, dtype: 2e12)
    yield
    torch.compiler.reset()


def found(rows):
    """The rows of a piece by what they are of; each compares itself with one that was told before."""
    told = {}
    for row in rows:
        told[row["what"]] = row
        assert row.get("to") in (None, *told) and row.get("ms", 1) > 0
    return told


def test_dit_is_measured_eager_and_compiled():
    """The compiled one also says how long that took, and samples; the first block stands for all."""
    eager, compiled = found(pieces.dit_steps("cpu", 9)), found(pieces.dit_steps("cpu", 9, compile="default"))
    assert list(eager) == list(speed.STEPS) == list(compiled)[:4]
    assert list(compiled)[4:] == [f"sampling 16, {n} NFE" for n in (1, 2, 100)]
    assert compiled["sampling 16, 100 NFE"]["ms"] > 20 * compiled["sampling 16, 1 NFE"]["ms"]
    for told in (eager, compiled):
        beside = told["flow matching"]["beside"]
        assert "one block of dit-s-8" in beside[""] and "batch 16, float32" in beside[""]
        assert 0 < beside["share of the matrix peak"] < 1 and beside["that peak, TFLOP/s"] == 2
        assert all(told[name]["bytes"] > 2**20 for name in speed.STEPS)
    assert beside["graphs"] > 0 < beside["seconds to compile"] and "graphs" not in eager["flow matching"]["beside"]


def test_casts_are_one_a_call():
    """Of order 2: the gradient's call, two of the teacher for the jump, fakes, and both velocities at once."""
    told = list(pieces.casts("cpu", 9))
    assert told[2]["beside"] == {"calls": 5}
    assert told[2]["ms"] == pytest.approx(5 * told[1]["ms"]) and told[0]["to"] == told[1]["to"] == told[0]["what"]


def test_recipe_fashion_is_measured_in_each_precision_and_compiled():
    told = found(pieces.fashion_steps("cpu", 9))
    kinds = [f"{precision}, eager" for precision in PRECISIONS if precision != "tf32"] + ["bf16, compile default"]
    assert list(told) == [f"{method}, {kind}" for kind in kinds for method in pieces.METHODS]
    for kind in kinds:
        assert told[f"flow matching, {kind}"]["ms"] < told[f"twinflow, {kind}"]["ms"]
        assert ("seconds to compile" in told[f"flow matching, {kind}"]["beside"]) == ("compile" in kind)


def test_recipe_fashion_is_trained_by_three_methods(tmp_path, monkeypatch):
    """As many steps as the seconds allow: twice as many seconds, more steps. Without data it says what is missing."""
    whole = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", lambda data, device, shown: whole(data, 3, device=device))
    monkeypatch.setattr("tinytwinflow.data.readers.DEBIAN", {})
    monkeypatch.setattr(pieces, "SMALL", (*pieces.SMALL, f"data_dir={tmp_path / 'data'}"))
    with pytest.raises(ValueError, match="apt install dataset-fashion-mnist"):
        next(pieces.fashion_trained("cpu", 9))
    write_mnist(tmp_path / "data", n=60)
    told = found(pieces.fashion_trained("cpu", 1.5))
    assert list(told) == [f"Frechet distance, {what}" for what in (*pieces.METHODS, "real images")]
    for row in list(told.values())[:3]:
        assert row["beside"].keys() == {"steps", "seconds", "batch", "at 1 NFE", "at 4 NFE", "at 100 NFE"}
        assert row["beside"]["steps"] >= 10 and row["beside"]["at 1 NFE"] > 0
    longer = next(pieces.fashion_trained("cpu", 6))
    assert longer["beside"]["steps"] > told["Frechet distance, flow matching"]["beside"]["steps"] > 0


@pytest.mark.parametrize("name, training, rows", [("qwen-image", "in backward", 1), ("sana-1.6b", "adapters", 2)])
def test_backbones_are_measured(name, training, rows):
    pytest.importorskip("diffusers")
    told = found(pieces.backbone("cpu", 9, name=name, training=training, rows=rows))
    assert list(told) == ["a step, mean of 3", f"sampling {rows}, 1 NFE", f"sampling {rows}, 10 NFE"]
    step = told["a step, mean of 3"]
    assert step["bytes"] > 2**20 and step["beside"]["longest, ms"] >= step["ms"]
    assert step["beside"][""].endswith(f"x 16 x 16, batch {rows}") and step["beside"]["million parameters learn"] > 0


def test_on_a_gpu_counted_bytes_stand_beside_measured_ones(monkeypatch):
    measured = {"shape": (4, 8, 8), "step": [1.0, 3.0], "memory": 100, "sampling": {1: 0.5}, "parameters": 7}
    monkeypatch.setattr(pieces, "measure_backbone", lambda *_, **__: measured)
    monkeypatch.setattr(pieces, "needs_of_step", lambda name, loss, rows, training: {"peak": 1000 * rows})
    told = found(pieces.backbone("cuda", 9, name="qwen-image", training="adapters", rows=3))
    assert told["a step, mean of 2"]["ms"] == 2000 and told["a step, mean of 2"]["bytes"] == 100
    assert told["counted for such a step"] == {"what": "counted for such a step", "bytes": 3000}


TESTS = """
import pytest

@pytest.mark.gpu
def test_one():
    assert {}

def test_other():
    raise SystemExit("this one is not asked for")
"""


def test_the_tests_that_need_a_gpu_are_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^no GPU$"):
        next(pieces.gpu_tests("cpu", 9))
    with pytest.raises(ValueError, match="^no tests here$"):
        next(pieces.gpu_tests("cuda", 9))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS.format(True))
    (tmp_path / "tests" / "test_else.py").write_text("raise SystemExit('not even read')")
    (told,) = pieces.gpu_tests("cuda:0", 9)
    assert "1 passed" in told["what"] and "1 deselected" in told["what"]
    (tmp_path / "tests" / "test_it.py").write_text(TESTS.format(False))
    with pytest.raises(AssertionError, match="1 failed"):
        next(pieces.gpu_tests("cuda", 9))
    assert "assert False" in capsys.readouterr().err


def test_first_calls_are_made_until_nothing_compiles(monkeypatch):
    """Graphs come with the first and the third call here: three quiet ones follow. What compiles for ever is left."""
    counts, calls = iter([0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]), []
    monkeypatch.setattr(speed, "graphs_compiled", lambda: next(counts))
    assert speed.settle(lambda: calls.append(1), "cpu")[0] == len(calls) == 6
    for_ever = iter(range(1000))
    monkeypatch.setattr(speed, "graphs_compiled", lambda: next(for_ever))
    assert speed.settle(lambda: None, "cpu", most=7)[0] == 7
