"""The one progress of trainer, bench and compare: what a terminal shows, and a file instead."""

from __future__ import annotations

import os
import sys

import pytest

from directclr_fast.progress import Progress


def lines_of(capsys, total, steps, **settings):
    with Progress(total, **settings) as progress:
        for step in steps:
            progress.to(step, "text", f"at {step}")
    return capsys.readouterr().out.splitlines()


def test_a_line_for_every_tenth_the_first_and_the_last(capsys):
    assert lines_of(capsys, 40, range(1, 41)) == [f"at {s}" for s in (1, *range(5, 41, 4), 40)]
    assert lines_of(capsys, 3, range(1, 4)) == ["at 1", "at 2", "at 3"]
    # A run that goes on, what stays where it is, and a banner.
    lines = lines_of(capsys, 40, [30, 30, 31, 39, 40, 40], start=29, banner="a run")
    assert lines == ["a run", "at 30", "at 39", "at 40"]
    assert lines_of(capsys, 40, range(1, 41), show=False, banner="a run") == []


def test_lines_go_where_they_are_sent(capsys):
    assert lines_of(capsys, 3, range(1, 4), file=sys.stderr) == []


def test_a_terminal_has_a_bar_and_no_lines(capsys, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    made = []

    class Bar(tqdm.tqdm):
        def __init__(self, **settings):
            made.append(self)
            super().__init__(**settings, file=open(os.devnull, "w"))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(40, 10, unit="run") as progress:
        progress.to(12, "a", "line")
        progress.to(11, "b", "line")  # of several at a time one may be heard late
        progress.say("line")
        assert (made[0].n, made[0].unit, made[0].postfix) == (12, "run", "b")
    assert made[0].disable and not capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "30")  # too narrow
    assert lines_of(capsys, 3, [3]) == ["at 3"] and len(made) == 1
