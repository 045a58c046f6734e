"""`report RUN_A RUN_B`: what differs, which runs are seeds of one configuration, one axis, and a folder of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.__main__ import main
from lowrank_vit.report.compare.curves import layer_figure, line_of, moment, score_figure, type_figure
from lowrank_vit.report.compare.groups import COLORS, MARKS, Group, read_compared
from lowrank_vit.report.compare.page import comparison_tables, draw_comparison, headline
from lowrank_vit.report.language import in_language
from lowrank_vit.spectral.watching.files import write_spectra
from tests.browser import opened
from tests.reported import add_metrics, add_monitor, add_spectra, add_summary, analysis_file, fill

EVIL = '<img src=x onerror="document.title=1">$a_1$'


def make(
    folder: Path, name: str, *, per_epoch: int = 10, refreshes: int = 3, scale: float = 1.0, **args: object
) -> Path:
    """A run of three epochs with spectra."""
    run = folder / name
    run.mkdir(parents=True)
    add_summary(run)
    summary = (run / "summary.csv").read_text()
    rows = [line.split(",") for line in summary.splitlines()]
    moved = [[row[0], str(per_epoch * (int(row[0]) + 1)), *row[2:]] for row in rows[1:]]
    (run / "summary.csv").write_text("\n".join(map(",".join, [rows[0], *moved])) + "\n")
    add_spectra(run, refreshes, scale=scale)
    options = {"model": "vit", "epochs": 3, "lr": 0.1, "experiment": name, "output": str(folder), "seed": 42} | args
    (run / "args.yaml").write_text(json.dumps(options))
    (run / "environment.json").write_text(json.dumps({"torch": "2.14.1", "command": name}))
    return run


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    seeds = [make(tmp_path, f"vit-seed{n}", seed=n) for n in (0, 1)]
    other = make(tmp_path, "sgd", lr=0.2)
    nameless = make(tmp_path, "nameless")
    (nameless / "args.yaml").unlink()
    compared = read_compared([seeds[0], other, seeds[1], nameless])
    assert [(group.name, group.at) for group in compared.groups] == [
        ("vit (seeds 0, 1)", [0, 2]),
        ("sgd", [1]),
        ("nameless", [3]),
    ]
    options = compared.options_that_differ
    assert options["seed"] == ["0, 1", "42", "–"]
    assert options["lr"] == ["0.1", "0.2", "–"]
    assert not options.keys() & {"experiment", "output"}
    assert compared.environment_that_differs == {}


def test_names_that_are_alike_have_their_folders(tmp_path: Path) -> None:
    runs = [make(tmp_path / folder, "run") for folder in "ab"]
    assert read_compared(runs).names == ["a/run", "b/run"]


def test_the_axis_counts_updates_unless_epochs_have_other_numbers_of_them(tmp_path: Path) -> None:
    runs = [make(tmp_path, name, per_epoch=n) for name, n in (("a", 10), ("b", 10), ("c", 20))]
    assert read_compared(runs[:2]).axis == "update"
    compared = read_compared([runs[0], runs[2]])
    assert compared.axis == "epoch"
    figure = score_figure(compared)
    assert figure
    for line in figure.first["all"][0].lines:
        np.testing.assert_allclose(line.x_T, [1, 2, 3])
    shutil.rmtree(runs[2] / "spectra")
    (runs[2] / "summary.csv").unlink()
    assert read_compared([runs[0], runs[2]]).axis == "update"


def test_spectra_are_compared_at_the_last_moment_that_all_have_reached(tmp_path: Path) -> None:
    short, long = make(tmp_path, "short", refreshes=2), make(tmp_path, "long", lr=1, refreshes=5, scale=2.0)
    compared = read_compared([long, short])
    assert compared.end == 10
    (row,) = (one for one in comparison_tables(compared)[2].rows if one[0] == "σ₁ of attn.qkv, EMA")
    assert row[1:] == ["6", "3"]  # `add_spectra`: 1 + refresh + block, the mean over three blocks
    figure = layer_figure(compared)
    assert figure
    assert list(figure.views) == ["model", "EMA"]
    spectrum = figure.views["EMA"]["blocks.0.attn.qkv"][0]
    assert spectrum.title == "spectrum, update 10"
    np.testing.assert_allclose(spectrum.lines[0].y_T, 2 * spectrum.lines[1].y_T)
    of_types = type_figure(compared)
    assert of_types
    lines = of_types.views["EMA"]["largest singular value σ₁"][0].lines
    assert [line.x_T[-1] for line in lines] == [40, 10]
    assert "Spectra are compared at update 10, the last moment of short." in draw_comparison([long, short], None).notes


def test_the_line_of_seeds_is_their_mean_where_all_have_a_value() -> None:
    group, nan = Group("g", [0, 1], 0), np.nan
    line = line_of(
        group, [(np.array([1.0, 2, 3]), np.array([4.0, nan, 8])), (np.array([1.0, 2, 3, 4]), np.array([6.0, 1, 8, 9]))]
    )
    assert line
    assert line.deviation_T is not None
    np.testing.assert_allclose(line.x_T, [1, 3])
    np.testing.assert_allclose(line.y_T, [5, 8])
    np.testing.assert_allclose(line.deviation_T, [np.sqrt(2), 0])
    assert line_of(group, [(np.array([1.0]), np.array([nan])), (np.array([1.0]), np.array([1.0]))]) is None
    crashed = (np.empty(0), np.empty(0))
    line = line_of(group, [crashed, (np.array([1.0]), np.array([2.0]))])
    assert line
    assert (line.y_T.tolist(), line.deviation_T) == ([2], None)


def test_tables_have_differences_first_and_means_of_seeds(tmp_path: Path) -> None:
    runs = [make(tmp_path, f"vit-seed{n}", seed=n) for n in (0, 1)]
    text = (runs[1] / "summary.csv").read_text()
    (runs[1] / "summary.csv").write_text(text.replace("60.5,", "62.5,"))
    tables = comparison_tables(read_compared([*runs, make(tmp_path, "other", lr=1)]))
    assert [one.title for one in tables][:4] == [
        "Options that differ", "Scores", "Scores of each run", "Spectra, update 20"
    ]  # fmt: skip
    scores = {row[0]: row[1:] for row in tables[1].rows}
    assert scores["top-1 accuracy (%), last epoch"] == ["61.50 ± 1.41", "60.50"]
    assert [row[0] for row in tables[0].rows] == ["--lr", "--seed"]


def test_the_headline_has_the_numbers_of_the_table_of_the_model_and_of_its_ema(tmp_path: Path) -> None:
    runs = [make(tmp_path, f"vit-seed{n}", seed=n) for n in (0, 1)]
    none = make(tmp_path, "none", lr=1)
    for run, top1s in ((runs[0], (60.0, 64.0)), (runs[1], (62.0, 50.0))):
        row = ["epoch,update,train_loss,eval_top1,eval_ema_top1", f"0,10,2.0,{top1s[0]},{top1s[1]}"]
        (run / "summary.csv").write_text("\n".join(row) + "\n")
    (none / "summary.csv").write_text("epoch,update,train_loss\n0,10,2.0\n")
    compared = read_compared([*runs, none])
    assert headline(compared) == [
        ("best top-1, vit (seeds 0, 1)", "61.00 ± 1.41 %"),
        ("best top-1, EMA, vit (seeds 0, 1)", "57.00 ± 9.90 %"),
    ]
    rows = {row[0]: row[1] for row in comparison_tables(compared)[1].rows}
    assert rows["top-1 accuracy (%), best epoch"] == "61.00 ± 1.41"
    assert rows["top-1 accuracy, EMA (%), best epoch"] == "57.00 ± 9.90"
    with in_language("zh"):
        texts = [cell for table in comparison_tables(read_compared(runs)) for row in table.rows for cell in row]
    assert "训练损失，整轮均值，最佳轮" in texts
    assert not any(re.search(r"[\u4e00-\u9fff], ", text) for text in texts)


def test_a_page_of_its_own_beside_the_runs_and_never_over_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make(tmp_path, "a"), make(tmp_path, "b", lr=0.3)
    (a / "report.html").write_text("a's own")
    main([str(a), str(b)])
    folder = tmp_path / "a-beside-b"
    assert sorted(path.name for path in folder.iterdir()) == ["comparison", "comparison.html"]
    assert sorted(path.name for path in (folder / "comparison").iterdir()) == ["layers.png", "scores.png", "types.png"]
    assert f"wrote {folder}/comparison.html" in capsys.readouterr().out
    main([str(a), str(b), "--no-png"])  # the same again
    assert list((folder / "comparison").iterdir()) == []
    main([str(b), "--against", str(a), "--no-png", "--out", str(tmp_path / "x" / "y")])
    assert (tmp_path / "x" / "y" / "comparison.html").exists()
    for taken in (a, b):
        with pytest.raises(UserError, match=r"holds a run or its report \((args.yaml|report.html)\)"):
            main([str(a), str(b), "--out", str(taken)])
    for inside in ("cmp", "spectra/x"):
        with pytest.raises(UserError, match=f"{inside} lies in the run {a}"):
            main([str(a), str(b), "--out", str(a / inside)])
    with pytest.raises(UserError, match="lies in the run"):
        main([str(a), str(b), "--out", str(a / "args.yaml")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        main([str(a), str(b), "--out", str(tmp_path / "file")])
    (tmp_path / "mine" / "comparison").mkdir(parents=True)
    (tmp_path / "mine" / "comparison" / "scores.png").write_text("mine")
    with pytest.raises(UserError, match="is no comparison"):
        main([str(a), str(b), "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "comparison" / "scores.png").read_text() == "mine"
    assert (a / "report.html").read_text() == "a's own"
    assert not (b / "report.html").exists()


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    link = tmp_path / "latest"
    link.symlink_to("a")
    compression = tmp_path / "compressed"
    compression.mkdir()
    (compression / "compression.json").write_text("{}")
    for line, words in (
        ([a, link], "latest is given twice"),
        ([a, b, a], "a is given twice"),
        ([a, compression], "compressed is a compression"),
        ([a, tmp_path / "none"], "no run directory at"),
        ([a, tmp_path / "none*"], r"no run directory at .*none\*"),
        ([a, tmp_path / "b" / "args.yaml"], "is a file, but no analysis"),
        ([a, tmp_path], "holds no run"),
        ([a, b, "--dark", "--no-png"], "--dark is about PNG files"),
        ([a, b, "--watch"], "--watch takes one run, but 2 are given"),
        ([a, b, "--against", b], "b is given twice"),
        ([a, "--against", tmp_path / "none"], "no run directory at"),
        ([a, "--against", b, "--watch"], "--watch takes one run, but 2 are given"),
        ([a, "--out", tmp_path / "x", "--watch"], "--out is the folder of a written page"),
        ([a, "--out", b], "holds another run .args.yaml."),
        ([a, "--dark", "--no-png"], "--dark is about PNG files"),
    ):
        with pytest.raises(UserError, match=words):
            main([str(word) for word in line])
    with pytest.raises(UserError, match="needs RUN"):
        main([])


def test_runs_of_five_minutes_damaged_ones_and_other_models_are_compared(tmp_path: Path) -> None:
    whole = fill_named(tmp_path / "whole")
    begun = tmp_path / "begun"
    begun.mkdir()
    add_metrics(begun, end='{"kind": "tra')
    one = tmp_path / "one refresh"
    one.mkdir()
    add_monitor(one, refreshes=1)
    diverged = make(tmp_path, "diverged")
    text = (diverged / "summary.csv").read_text()
    (diverged / "summary.csv").write_text(re.sub(r"(?m)^2,.*$", "2,30,nan,nan,nan,nan,nan,nan,nan,nan,nan,nan", text))
    add_spectra(diverged, scale=float("nan"))
    damaged = make(tmp_path, "damaged")
    for file in (damaged / "spectra").iterdir():
        file.write_bytes(b"no file of numpy's")
    drawn = draw_comparison([whole, begun, one, diverged, damaged], None)
    assert {name for name, png in drawn.pictures.items() if png} == {"scores.png", "types.png", "layers.png"}
    assert any(note.startswith("begun: summary.csv is not there yet") for note in drawn.notes)
    assert any("damaged: " in note and "is damaged, left out" in note for note in drawn.notes)
    assert "begun: there are no spectra." in drawn.notes
    assert "not measured" in drawn.html
    drawn = draw_comparison([begun, one], None)
    assert not drawn.pictures["scores.png"]


def test_runs_of_other_models_sizes_and_depths_are_compared_by_what_they_share(tmp_path: Path) -> None:
    vit, deep, other = make(tmp_path, "vit"), make(tmp_path, "deep", depth=24), make(tmp_path, "other", model="swin")
    for run, names in ((deep, [f"blocks.{i}.attn.qkv" for i in range(8)]), (other, ["layers.0.reduction"])):
        shutil.rmtree(run / "spectra")
        (run / "spectra").mkdir()
        for update in (0, 20):
            write_spectra(run / "spectra", update, {f"spec/{name}": np.linspace(9, 1, 20) for name in names})
    compared = read_compared([vit, deep, other])
    figure = layer_figure(compared)
    assert figure
    assert list(figure.first) == [f"blocks.{i}.attn.qkv" for i in range(3)]
    rows = {row[0]: row[1:] for row in comparison_tables(compared)[2].rows}
    assert rows["σ₁ of attn.qkv"] == ["4", "9", "not measured"]
    assert rows["σ₁ of reduction"] == ["not measured", "not measured", "9"]


def fill_named(path: Path) -> Path:
    path.mkdir()
    return fill(path)


def test_more_groups_than_colours_are_dashed_and_analyses_are_compared_too(tmp_path: Path) -> None:
    assert len(COLORS) == len(MARKS)
    runs = [make(tmp_path, f"run {n}", lr=n, refreshes=1) for n in range(9)]
    groups = read_compared(runs).groups
    assert [group.is_dashed for group in groups] == 8 * [False] + [True]
    assert len({(group.color, group.is_dashed) for group in groups}) == 9
    for name in "ab":
        (tmp_path / name).mkdir()
    analyses = [analysis_file(tmp_path / name, "--full") for name in "ab"]
    drawn = draw_comparison(analyses, tmp_path / "out", with_png=False)
    assert "Spectra, of the analyses" in drawn.html
    mixed = read_compared([runs[0], make(tmp_path, "longer", refreshes=3), analyses[0]])
    assert (mixed.axis, moment(mixed)) == ("update", "update 0")  # an analysis has no place in time


def test_a_browser_shows_it_and_names_are_text(tmp_path: Path) -> None:
    runs = [make(tmp_path, EVIL, lr=EVIL), *(make(tmp_path, f"b-seed{n}", seed=n) for n in (1, 2))]
    drawn = draw_comparison(runs, tmp_path / "out")
    assert EVIL not in drawn.html
    page = tmp_path / "page.html"
    page.write_text(drawn.html)
    with opened(tmp_path / "profile") as tab:
        tab.open(page, width=420)
        headings = tab.js("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
        assert headings[:3] == ["Options that differ", "Scores", "Scores over time"]
        sections = tab.js("[...document.querySelectorAll('section.interactive')].map((one) => one.id)")
        assert sections == ["fig-scores", "fig-types", "fig-layers", "fig-data"]
        files = tab.js("[...document.querySelectorAll('#fig-data button')].map((one) => one.textContent)")
        assert [text.split(" rows")[0] for text in files[:2]] == ["scores.csv: 42", "spectra.csv: 72"]
        tab.js("document.getElementById('fig-scores').scrollIntoView()")
        tab.wait("document.querySelector('#fig-scores .js-plotly-plot')?.data?.length === 4")  # two lines, one band
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        tab.choose("#fig-layers select[name=weights]", "EMA")
        tab.choose("#fig-layers select[name=view]", "blocks.2.mlp.fc2")
        tab.js("document.getElementById('fig-layers').scrollIntoView()")
        tab.wait("document.querySelector('#fig-layers .js-plotly-plot')?.data?.length === 4")
        assert tab.js("document.title").startswith("<img")
        assert tab.errors == []
