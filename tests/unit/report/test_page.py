"""The report of finished, unfinished, damaged and diverged runs: whole, self-contained and honest about gaps."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.report import events as events_module
from lowrank_vit.report import read as read_module
from lowrank_vit.report.__main__ import main
from lowrank_vit.report.page import final_numbers, headline, spectral_numbers, write_report
from lowrank_vit.report.read import read_analysis, read_run, series
from lowrank_vit.report.spectra.metrics import cosine_plot, ema_plot, matrix_scalars, profile_plot, stable_rank_plot
from lowrank_vit.report.spectra.values import bulk_plot, spectra_plot, vectors_plot
from lowrank_vit.report.style import index_ticks
from lowrank_vit.spectral.watching.files import write_spectra
from tests.reported import KINDS, add_metrics, add_monitor, add_spectra, add_summary, analysis_file, fill, train_line

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = "training spectra bulk stable_rank cosines vectors ema profile".split()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "my experiment"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run with its report, made once; tests only read it."""
    run = tmp_path_factory.mktemp("runs") / "my experiment"
    run.mkdir()
    fill(run)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(run.parent)
        main([run.name])
    return run


def embedded_pictures(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_a_finished_run_gives_all_pictures_and_one_page_that_holds_them(reported: Path) -> None:
    pictures = {path.name: path.read_bytes() for path in (reported / "report").iterdir()}
    assert sorted(pictures) == sorted(f"{name}.png" for name in PICTURES)
    for png in pictures.values():
        assert png.startswith(PNG)
        width, height = struct.unpack(">II", png[16:24])
        assert width >= 1000
        assert height >= 500
    html = (reported / "report.html").read_text()
    assert embedded_pictures(html) == [pictures[f"{name}.png"] for name in PICTURES]
    assert "<td>meaning</td>" not in html
    for text in ("my experiment", "61.25", "62.25 %", "epoch 2", "vit_small_patch16_224", "0.35 1.0", "gpu.name"):
        assert text in html
    assert 'class="notes"' not in html


def test_the_page_needs_no_network_runs_its_own_script_alone_and_names_no_path(reported: Path) -> None:
    html = re.sub(r"base64,[^\"]+", "base64,", (reported / "report.html").read_text())
    html, packed = re.subn(r'(<script type="text/plain" id="packed-\w+">)[A-Za-z0-9+/=]+(?=</script>)', r"\1", html)
    assert re.findall(r"https?:|//|@import|url\(|<link|<iframe", html) == []
    assert set(re.findall(r'(?:src|href|srcset)\s*=\s*"([^"]*)"', html)) == {"data:image/png;base64,"}
    assert (packed, html.count("<script")) == (3, 4)
    assert "Content-Security-Policy" in html
    assert "default-src 'none'" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert str(reported.parent) not in html
    assert "prefers-color-scheme: dark" in html
    assert '<meta name="viewport"' in html


def test_equal_runs_give_equal_pictures(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sketched = stable_rank_plot(read_run(reported))
    monkeypatch.undo()
    laid_out = (reported / "report" / "stable_rank.png").read_bytes()
    assert stable_rank_plot(read_run(reported)) == laid_out != sketched


def test_a_run_in_its_first_epoch_is_drawn_and_says_what_is_missing(run: Path) -> None:
    add_metrics(run, end='{"kind": "train", "upd')
    _, notes = write_report(run)
    assert [path.name for path in (run / "report").iterdir()] == ["training.png"]
    html = (run / "report.html").read_text()
    assert len(embedded_pictures(html)) == 1
    for gap in ("summary.csv is not there yet", "last line of metrics.jsonl is half written", "There are no spectra"):
        assert any(gap in note for note in notes)
        assert gap in html
    assert "Final numbers" not in html


def test_spectra_alone_are_drawn_and_one_refresh_needs_no_time_axis(run: Path) -> None:
    add_spectra(run, refreshes=1)
    write_report(run)
    assert [path.name for path in (run / "report").iterdir()] == ["spectra.png"]


def test_a_run_with_one_refresh_shows_what_it_can(run: Path) -> None:
    add_monitor(run, refreshes=1)
    write_report(run)
    assert sorted(path.stem for path in (run / "report").iterdir()) == ["bulk", "profile", "spectra"]


def test_logged_scalars_are_read_without_aggregates_and_a_torn_line_is_left_out(run: Path) -> None:
    add_monitor(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "spec", "update": 30, "spec/blocks.0.attn.qkv/sigma_max": 4')
    found = read_run(run)
    np.testing.assert_array_equal(found.scalars["update"], [0, 10, 20])
    values = matrix_scalars(found, "spec", "sigma_max")
    assert list(values) == [f"blocks.{block}.{kind}" for block in range(3) for kind in KINDS]
    np.testing.assert_array_equal(values["blocks.2.mlp.fc2"], [1, 2, 3])
    assert "spec/blocks.0.attn.qkv/sv1" not in found.scalars
    assert np.isnan(matrix_scalars(found, "spec", "cos_u_mean")["blocks.0.attn.qkv"][0])
    assert [v.update for v in found.vectors] == [0, 10, 20]
    assert any("half written" in note for note in found.notes)


def test_many_spec_events_are_thinned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_SNAPSHOTS", 3)
    add_monitor(run, refreshes=9)
    np.testing.assert_array_equal(read_run(run).scalars["update"], [0, 40, 80])


@pytest.mark.parametrize("full", [False, True])
def test_an_analysis_is_reported_too(tmp_path: Path, full: bool) -> None:
    path = analysis_file(tmp_path, *(["--full"] if full else []))
    for given in (path, tmp_path):
        folder, notes = write_report(given)
        assert folder == tmp_path
        assert bool(notes) is not full
    drawn = sorted(p.stem for p in (tmp_path / "report").iterdir())
    assert drawn == (["bulk", "profile", "spectra"] if full else ["profile"])
    html = (tmp_path / "report.html").read_text()
    assert len(embedded_pictures(html)) == len(drawn)
    content = json.loads(path.read_text())
    values = matrix_scalars(read_analysis(path), "spec", "alpha")
    assert {n: v[0] for n, v in values.items()} == {n: layer["alpha"] for n, layer in content["layers"].items()}


def test_several_analyses_or_a_foreign_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "a_spectral.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read as an analysis.*analyze_spectrum"):
        write_report(tmp_path)
    (tmp_path / "b_spectral.json").write_text("{}")
    with pytest.raises(UserError, match=r"several analyses \(a_spectral\.json, b_spectral\.json\)"):
        write_report(tmp_path)


def test_a_picture_of_an_earlier_report_does_not_stay_when_its_data_are_gone(run: Path) -> None:
    (run / "args.yaml").write_text("model: vit\n")
    (run / "report").mkdir()
    (run / "report" / "spectra.png").write_bytes(PNG)
    write_report(run)
    assert list((run / "report").iterdir()) == []


def test_final_numbers_are_the_last_and_the_best_and_ema_columns_may_be_absent(run: Path) -> None:
    add_summary(run, ema=False)
    table = final_numbers(read_run(run))
    assert table.rows == [
        ["top-1 accuracy (%)", "60.50", "61.25", "epoch 2"],
        ["top-5 accuracy (%)", "90.00", "90.00", "epoch 1"],
        ["eval loss", "0.9000", "0.9000", "epoch 3"],
        ["train loss, epoch mean", "1.0000", "1.0000", "epoch 3"],
    ]
    assert dict(headline(read_run(run))) == {
        "best top-1": "61.25 %",
        "epochs": "3",
        "updates": "30",
        "median images / s": "3,210",
        "median data wait": "2.0 %",
    }


def test_spectral_numbers_are_means_over_the_blocks_of_a_type(run: Path) -> None:
    add_spectra(run)
    rows = {row[0]: row[1:] for row in spectral_numbers(read_run(run)).rows}
    assert list(rows) == [f"{name}{suffix}" for suffix in ("", ", EMA") for name in KINDS]
    assert rows["attn.qkv"][:2] == ["3", "2 → 4"]  # sigma_1 is 1 + refresh + block


def test_of_a_repeated_update_the_later_line_counts_and_lines_are_sorted(run: Path) -> None:
    lines = [train_line(1, 4.0), train_line(2, 3.0), train_line(3, 2.5), train_line(2, 3.5), "not json\n"]
    (run / "metrics.jsonl").write_text("".join([*lines, train_line(4, 2.0)]))
    found = read_run(run)
    np.testing.assert_array_equal(found.train["update"], [1, 2, 3, 4])
    np.testing.assert_array_equal(found.train["loss"], [4.0, 3.5, 2.5, 2.0])
    assert any("1 unreadable line(s), the first is line 5" in note for note in found.notes)


def test_damaged_files_are_left_out_with_a_note(run: Path) -> None:
    fill(run)
    (run / "spectra" / "update_00000010.npz").write_bytes(b"PK not really")
    (run / "spectra" / "update_00000020.npz.partial").write_bytes(b"")
    (run / "environment.json").write_text("{")
    (run / "args.yaml").write_text("a: [")
    with (run / "summary.csv").open("a") as file:
        file.write("3,")
    found = read_run(run)
    assert [stored.update for stored in found.spectra] == [0, 20]
    assert len(found.epochs["update"]) == 3
    assert [note.split()[0] for note in found.notes] == [
        "args.yaml", "summary.csv", "environment.json", "update_00000010.npz",
    ]  # fmt: skip


def test_refreshes_of_another_model_are_left_out(run: Path) -> None:
    add_spectra(run)
    write_spectra(run / "spectra", 15, {"spec/blocks.0.attn.qkv": np.ones(99)})
    updates, modules = series(read_run(run), "spec")
    np.testing.assert_array_equal(updates, [0, 10, 20])
    assert modules["blocks.0.attn.qkv"].shape == (3, 6)


def test_many_refreshes_are_thinned_evenly_with_both_ends_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "MAX_SNAPSHOTS", 3)
    add_spectra(run, refreshes=9)
    found = read_run(run)
    assert [stored.update for stored in found.spectra] == [0, 40, 80]
    assert any("3 of 9 stored spectra" in note for note in found.notes)


@pytest.mark.parametrize("scale", [float("nan"), 0.0], ids=["nan", "zero"])
def test_a_diverged_run_is_drawn_all_the_same(run: Path, scale: float) -> None:
    add_monitor(run)
    add_spectra(run, scale=scale)
    text = (run / "metrics.jsonl").read_text().replace(": 0.9", ": null").replace(": 3", ": null")
    (run / "metrics.jsonl").write_text(text)
    found = read_run(run)
    for draw in (spectra_plot, stable_rank_plot, bulk_plot, cosine_plot, ema_plot, profile_plot, vectors_plot):
        png = draw(found)
        assert png is not None
        assert png.startswith(PNG)


def test_losses_that_became_nan_are_drawn_and_not_taken_for_the_best(run: Path) -> None:
    add_summary(run)
    text = (run / "summary.csv").read_text()
    (run / "summary.csv").write_text(text + "3,40,nan,,nan,nan,nan,nan,nan,0.001,3000,0.02\n")
    (run / "metrics.jsonl").write_text("".join(train_line(u, None if u > 5 else 1.0) for u in range(1, 10)))
    write_report(run)
    assert final_numbers(read_run(run)).rows[0] == ["top-1 accuracy (%)", "not measured", "61.25", "epoch 2"]


def test_a_wrong_path_names_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(
        UserError, match=r"file\.txt is a file, but not one of a run.*output/<experiment>.*_spectral\.json"
    ):
        write_report(tmp_path / "file.txt")
    with pytest.raises(UserError, match=r"no run directory at .*nowhere.*lowrank_vit\.train.*output/<experiment>"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"holds no run: expected some of summary\.csv"):
        main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written_is_a_user_error(run: Path) -> None:
    add_summary(run)
    (run / "report").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(run)


def test_a_report_goes_to_another_folder_but_never_over_another_runs(run: Path, tmp_path: Path) -> None:
    (run / "args.yaml").write_text("model: vit\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.yaml").write_text("model: vit\n")
    for _ in range(2):
        main([str(run), "--no-png", "--out", str(tmp_path / "new" / "place")])
    assert (tmp_path / "new" / "place" / "report.html").exists()
    assert not (run / "report.html").exists()
    with pytest.raises(UserError, match=r"other holds another run \(args\.yaml\)"):
        main([str(run), "--no-png", "--out", str(other)])
    main([str(run), "--no-png", "--out", str(run)])
    (run / "report.html").unlink()
    (run / "report").rmdir()
    (run / "report").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the report into .*--out DIR"):
        main([str(run)])


def test_dark_pictures_stand_beside_the_light_ones_and_go_with_the_next_report(run: Path) -> None:
    from PIL import Image

    add_summary(run)
    main([str(run), "--dark"])
    corners = {}
    for name in ("training.png", "training_dark.png"):
        with Image.open(run / "report" / name) as image:
            corners[name] = image.convert("RGB").getpixel((2, 2))
    assert corners == {"training.png": (255, 255, 255), "training_dark.png": (27, 36, 44)}
    main([str(run)])
    assert [path.name for path in (run / "report").iterdir()] == ["training.png"]


def test_axes_of_vector_maps_are_numbered_by_index() -> None:
    assert [index_ticks(k) for k in (1, 5, 8, 16, 64)] == [
        [1], [1, 2, 3, 4, 5], [1, 2, 4, 6, 8], [1, 5, 10, 15], [1, 20, 40, 60],
    ]  # fmt: skip
