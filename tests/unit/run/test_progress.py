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


@pytest.mark.parametrize("columns", [60, 80, 100, 101, 160])
def test_the_live_line_fits_the_terminal(monkeypatch, columns):
    def console(**_) -> Console:
        return Console(file=io.StringIO(), width=columns, force_terminal=True, highlight=False)

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
