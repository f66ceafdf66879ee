"""Bars: where stderr is no terminal, lines that a log file can hold and a reader can follow."""

import sys
import time

from tinytwinflow import bars


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    """Each says how far it is, how fast, how long it takes and the terms of the loss; none before its time."""
    monkeypatch.setattr(bars, "EVERY", 0.05)
    with bars.bar(None, "run", 1000, 100, "steps") as told:
        for step in range(4):
            time.sleep(0.06)
            bars.terms_in(told, {"step": step, "lr": 1.0, "total": 2.5, "gap": 0.25 * step})
            told.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:3]] == [f"run: {n} of 1000" for n in (110, 120, 130)]
    assert all(" steps/s, " in line and " left, total=2.5, gap=" in line for line in lines)
    assert not any(mark in line for line in lines for mark in ("\r", "|", "lr="))


def test_what_is_soon_over_says_nothing(capsys):
    assert list(bars.bar(range(3), "soon")) == [0, 1, 2]
    assert list(bars.bar(range(3), "hidden", hidden=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar_with_the_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bars.bar(None, "run", 3, unit="steps") as told:
        bars.terms_in(told, {"step": 1, "total": 2.5, "gap": 1.0})
        told.update(3)
    shown = capsys.readouterr().err
    assert "\rrun: 100%" in shown and "total=2.5" in shown and "gap" not in shown
