"""The report: what is done is kept, what fails fails alone, and the table says what the file does."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import WARM
from hypothesis import given
from hypothesis import strategies as st
from test_commands import fails

from tinytwinflow.benchmarks.report import HEADER, PIECES, report, shown
from tinytwinflow.cli.commands import main


@pytest.fixture(autouse=True, scope="module")
def warm():
    """The process that others are forked from, with what the tests of this worker need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    first = context.Process()
    first.start(), first.join()


def measured(device, seconds, path, rows=2):
    """A piece of some rows; each time that it runs leaves a line."""
    with open(path, "a") as file:
        file.write(f"{device} {seconds > 0}\n")
    for i in range(rows):
        yield {"what": f"row {i}", "ms": 10.0 * (i + 1), "to": "row 0"}


def failing_once(device, seconds, path):
    first = not path.exists()
    yield from measured(device, seconds, path, rows=1)
    if first:
        raise RuntimeError("it broke\nin two lines")


def crashing(device, seconds):
    yield {"what": "before the crash"}
    os._exit(3)


def lacking(device, seconds):
    raise ValueError("no data here: install them")
    yield


def endless(device, seconds, path):
    """A piece that never ends, and a process of its own that writes on and on."""
    code = "import sys, time\nwhile True:\n    open(sys.argv[1], 'a').write('.')\n    time.sleep(0.02)"
    subprocess.Popen([sys.executable, "-c", code, path])
    yield {"what": "the beginning"}
    time.sleep(600)


def rows_in(text):
    """The lines of a Markdown table as dicts by column, the piece's name filled in."""
    found, piece = [], None
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| piece")):
            cells = dict(zip(HEADER, (cell.strip() for cell in line.strip("|").split("|"))))
            piece = cells["piece"] = cells["piece"] or piece
            found.append(cells)
    return found


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path, capsys):
    out, lines = tmp_path / "new" / "figures.json", [tmp_path / "steady", tmp_path / "shaky"]
    todo = {"steady": (9, 0, partial(measured, path=lines[0])), "shaky": (9, 0, partial(failing_once, path=lines[1]))}
    report("cpu", 1, out, todo)
    first = json.loads(out.read_text())["pieces"]
    assert first["steady"]["outcome"] == "done" and [row["ms"] for row in first["steady"]["rows"]] == [10, 20]
    assert first["shaky"]["outcome"] == "failed: RuntimeError: it broke" and len(first["shaky"]["rows"]) == 1
    assert "| shaky | row 0 | 10 | 1.00 |" in capsys.readouterr().out
    report("cpu", 1, out, todo | {"shaky": (9, 9, crashing)})
    waiting = json.loads(out.read_text())["pieces"]["shaky"]
    assert waiting == {"rows": first["shaky"]["rows"], "outcome": "no time left (needs about 9 min)"}
    capsys.readouterr()
    report("cpu", 1, out, todo)
    again = json.loads(out.read_text())["pieces"]
    assert again["steady"] == first["steady"] and again["shaky"]["outcome"] == "done"
    assert [path.read_text() for path in lines] == ["cpu True\n", 2 * "cpu True\n"]
    printed = capsys.readouterr().out
    assert printed.startswith(out.with_suffix(".md").read_text()) and "failed" not in printed


def test_pieces_that_end_badly_are_named_and_the_others_run(tmp_path, capfd):
    """One that crashes, one that lacks something, one killed when the time is over, with all that it has started, and
    one for which too little was left; what they told before stands in the table."""
    out, dots = tmp_path / "report.json", tmp_path / "dots"
    todo = {
        "crashing": (9, 0, crashing),
        "lacking": (9, 0, lacking),
        "long": (0, 9, partial(measured, path=tmp_path / "long")),
        "good": (9, 0, partial(measured, path=tmp_path / "good")),
        "endless": (9, 0, partial(endless, path=dots)),
        "late": (9, 0.001, partial(measured, path=tmp_path / "late")),
    }
    report("cpu", 0.1, out, todo)
    length = dots.stat().st_size
    found = {name: entry["outcome"] for name, entry in json.loads(out.read_text())["pieces"].items()}
    assert found["endless"].startswith("no time left (needs more than 0.")
    del found["endless"]
    assert found == {
        "crashing": "failed: its process ended with status 3",
        "lacking": "no data here: install them",
        "long": "no time left (needs about 9 min)",
        "good": "done",
        "late": "no time left (needs about 0.001 min)",
    }
    table = {(cells["piece"], cells["what"]) for cells in rows_in(capfd.readouterr().out)}
    assert table >= {*found.items()} - {("good", "done")} | {("good", "row 1"), ("endless", "the beginning")}
    assert ("crashing", "before the crash") in table and not (tmp_path / "long").exists()
    time.sleep(0.2)
    assert dots.stat().st_size == length > 0, "what a piece has started ends with it"


def test_a_report_that_is_killed_leaves_nothing_running(tmp_path):
    dots = tmp_path / "dots"
    todo = {"endless": (9, 0, partial(endless, path=dots))}
    whole = multiprocessing.get_context("forkserver").Process(target=report, args=("cpu", 1, tmp_path / "a.json", todo))
    whole.start()
    while not dots.exists():
        time.sleep(0.05)
    whole.kill()
    whole.join()
    time.sleep(0.5)
    length = dots.stat().st_size
    time.sleep(0.2)
    assert dots.stat().st_size == length


figures = st.floats(1e-3, 1e5)


@given(st.lists(figures, min_size=1, max_size=4), figures, st.integers(1, 2**37))
def test_the_table_says_what_the_file_does(ms, share, size):
    """Ratios are of the milliseconds; what a row does not have is left blank."""
    rows = [{"what": f"row {i}", "ms": value, "to": "row 0"} for i, value in enumerate(ms)]
    rows += [{"what": "last", "bytes": size, "beside": {"": "in words", "share": share}}]
    content = {"device": "a card", "torch": "2.11.0", "CUDA": "12.8"}
    content |= {"pieces": {"one": {"rows": rows, "outcome": "done"}, "two": {"rows": [], "outcome": "failed: so"}}}
    text = shown(content, ["one", "two"])
    *lines, last, failed = rows_in(text)
    for line, value in zip(lines, ms, strict=True):
        assert line["piece"] == "one" and float(line["ms"].replace(",", "")) == pytest.approx(value, rel=1e-3)
        assert float(line["ratio"]) == pytest.approx(value / ms[0], rel=1e-6, abs=0.00501)
        assert line["GiB"] == line["beside it"] == ""
    assert float(last["GiB"]) == pytest.approx(size / 2**30, abs=0.0501) and last["ms"] == last["ratio"] == ""
    words, number = last["beside it"].split("; share ")
    assert words == "in words" and float(number.replace(",", "")) == pytest.approx(share, rel=1e-3)
    assert failed == {"piece": "two", "what": "failed: so"} | dict.fromkeys(HEADER[2:], "")
    assert text.startswith("a card, torch 2.11.0, CUDA 12.8\n") and "stand-ins" in shown(content, ["one"], gpu=False)


def test_figures_of_another_machine_are_not_mixed_in(tmp_path, capsys):
    out = tmp_path / "report.json"
    report("cpu", 1, out, {"late": (9, 9, crashing)})
    here = json.loads(out.read_text())
    assert here.keys() == {"device", "torch", "CUDA", "Python", "pieces"}
    capsys.readouterr()
    command = ["report", "--minutes", "0.001", "--out", out]
    for key in ("device", "torch"):
        out.write_text(json.dumps({**here, key: "another"}))
        before = out.read_bytes()
        fails(
            capsys, ["report", "--out", out], f"was made with {key} another, here is {here[key]}: choose another --out"
        )
        assert out.read_bytes() == before
    out.write_text("{")
    fails(capsys, command, "no JSON, so no report")


def test_wrong_words_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for minutes in ("0", "-1", "nan", "inf"):
        fails(capsys, ["report", "--minutes", minutes], f"--minutes must be a positive number, got {float(minutes)}")
    fails(capsys, ["report", "--minutes", "many"], "--minutes", "'many'")
    fails(capsys, ["report", "--minutes", "0.001", "--out", "table.md"], "--out takes FILE.json, got table.md")
    fails(capsys, ["report", "--device", "abacus"], "device 'abacus'")
    assert not any(tmp_path.iterdir())


def test_with_no_time_all_pieces_are_named(tmp_path, capsys):
    """The command itself, in a thousandth of a minute."""
    assert main(["report", "--minutes", "0.001", "--out", str(tmp_path / "report.json")]) == 0
    found = rows_in(capsys.readouterr().out)
    assert [cells["piece"] for cells in found] == list(PIECES)
    assert all(cells["what"].startswith("no time left (needs about ") for cells in found)
