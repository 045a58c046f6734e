"""What a terminal shows while a run goes."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lowrank_vit.data.loader import LoaderStats
from lowrank_vit.run.progress import Display, Figures, in_words

LOADING = LoaderStats(1.8, 12.4, 31.0, 0)
FIGURES = Figures(6.906, 2.5e-4, 12_345.6, 0.031, 41.27, LOADING, mfu=0.389, grad_norm=1.2345)


def test_all_figures_where_there_is_room():
    assert in_words(FIGURES, 200) == (
        "loss 6.906 12,346 img/s wait 3% MFU 39% 41.3 GB lr 2.5e-04 |g| 1.2 queue 2 decode 12/31 ms"
    )


def test_of_several_ranks_the_one_that_waits_longest_is_named():
    assert " img/s wait 3% (rank 5) MFU" in in_words(replace(FIGURES, wait_rank=5), 200)


@pytest.mark.parametrize("width", range(10, 100, 7))
def test_the_first_figures_where_there_is_not(width):
    text = in_words(FIGURES, width)
    assert len(text) <= max(width, len("loss 6.906"))
    assert in_words(FIGURES, 200).startswith(text)


def test_what_is_not_known_is_left_out():
    assert "MFU" not in in_words(Figures(1.0, 0.1, 10.0, 0.0, 1.0, LoaderStats(0, 0, 0, 0)), 200)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 100, 101, 160])
def test_the_live_line_fits_the_terminal(monkeypatch, columns):
    def console(**_) -> Console:
        return Console(file=Terminal(), width=columns, highlight=False)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("lowrank_vit.run.progress.Console", console)
    with Display(75_000, 0) as display:
        display.update(12_345, "123/300", FIGURES)
        shown = console()
        shown.print(display._progress.get_renderable())
    assert isinstance(shown.file, io.StringIO)
    lines = shown.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 1
    assert "ETA" in lines[0]
    assert "12,346 img/s" in lines[0]
    assert "…" not in lines[0]


@pytest.mark.parametrize(("file", "term"), [(io.StringIO, "xterm-color"), (Terminal, "dumb")])
def test_lines_where_a_live_line_cannot_be_drawn(monkeypatch, file, term):
    """A notebook's pipe, for which colours are asked, and a terminal that cannot move its cursor."""
    out = file()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", out)
    with Display(100, 0) as display:
        display.update(10, "1/10", FIGURES)
        display.update(20, "2/10", FIGURES)
    assert "update 10/100" in out.getvalue()
    assert "\x1b[2K" not in out.getvalue()


def test_other_ranks_are_silent(capsys):
    with Display(10, 0, is_silent=True) as display:
        display.say("hello")
        display.update(5, "1/2", FIGURES)
    assert capsys.readouterr().out == ""


def test_what_is_said_stands_as_it_is(capsys):
    """Rich would take [brackets] for its own markup."""
    with Display(10, 0) as display:
        display.say("[enforce fail at file.cc:5] of [/tmp/run] [bold]")
    assert capsys.readouterr().out == "[enforce fail at file.cc:5] of [/tmp/run] [bold]\n"


def lines(capsys, updates, *, seconds: float, now: list[float], is_interval: bool = True) -> list[str]:
    """What is printed of these updates, which are this many seconds apart."""
    with Display(10_000, 0) as display:
        for update in updates:
            now[0] += seconds
            display.tick(update, "1/2")
            if update % 50 == 0:
                display.update(update, "1/2", FIGURES, is_interval=is_interval)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def now(monkeypatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr("lowrank_vit.common.terminal.time.monotonic", lambda: seconds[0])
    return seconds


def test_elsewhere_each_log_interval_is_a_line_with_the_time_left(capsys, now):
    first, *others = lines(capsys, range(1, 201), seconds=0.5, now=now)
    assert first == f"epoch   1/2  update 50/10,000  {in_words(FIGURES, 200)}  ETA 1:22:55"
    assert [line.split()[3] for line in others] == ["100/10,000", "150/10,000", "200/10,000"]


def test_elsewhere_long_intervals_have_a_line_a_minute(capsys, now):
    found = lines(capsys, range(1, 51), seconds=7.0, now=now)
    assert [line.split()[3] for line in found] == [
        "9/10,000",
        "18/10,000",
        "27/10,000",
        "36/10,000",
        "45/10,000",
        "50/10,000",
    ]
    assert ["loss" in line for line in found] == [False] * 5 + [True]
    assert found[0] == "epoch   1/2  update 9/10,000  ETA 19:25:37"


def test_elsewhere_a_long_run_of_short_intervals_has_not_too_many_lines(capsys, now):
    assert len(lines(capsys, range(50, 10_001, 50), seconds=1.0, now=now)) == 100 + 100 / 10
    assert lines(capsys, range(50, 101), seconds=0.1, now=now, is_interval=False) == []


def test_a_reader_that_goes_away_is_told_once_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr("lowrank_vit.run.progress.is_unread", lambda: True)
    with Display(10, 0) as display:
        display.say("a")
        display.say("b")
    assert capsys.readouterr().err.splitlines() == [
        "note: nobody reads the output any more; training goes on, and its files have all"
    ]


def test_a_long_validation_has_a_line_a_minute(capsys, now):
    with Display(10, 0) as display:
        steady = display.within(80)
        for n in range(1, 81):
            now[0] += 1.0
            steady.tell(n, "validation: batch")
    assert capsys.readouterr().out == "validation: batch 60/80  ETA 0:20\n"
