"""The report of finished, unfinished, damaged and diverged runs: whole, self-contained and honest about gaps."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from lowrank_vit.report import read_run as read_run_module
from lowrank_vit.report.__main__ import main, write_report
from lowrank_vit.report.numbers import final_numbers, headline, spectral_numbers
from lowrank_vit.report.read_run import read_run, series
from lowrank_vit.report.spectra_plots import spectra_plot, stable_rank_plot
from lowrank_vit.spectral.store import write_spectra

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = {"attn.qkv": 6, "attn.proj": 6, "mlp.fc1": 6, "mlp.fc2": 6}


def add_summary(run: Path, *, ema: bool = True) -> None:
    header = "epoch,update,train_loss,eval_loss,eval_top1,eval_top5"
    header += ",eval_ema_loss,eval_ema_top1,eval_ema_top5" if ema else ""
    rows = [header + ",lr,img_per_s,data_wait"]
    for epoch, top1 in enumerate([10.0, 61.25, 60.5]):
        averaged = f",2.5,{top1 + 1},88.0" if ema else ""
        rows.append(f"{epoch},{10 * epoch + 10},{3 - epoch},{2.9 - epoch},{top1},90.0{averaged},0.001,3210.0,0.02")
    (run / "summary.csv").write_text("\n".join(rows) + "\n")


def train_line(update: int, loss: float | None) -> str:
    event = {"kind": "train", "epoch": 0, "update": update, "loss": loss, "lr": 1e-4 * update}
    return json.dumps(event | {"img_per_s": 3000 + update, "data_wait": 0.01}) + "\n"


def add_metrics(run: Path, *, end: str = "") -> None:
    lines = [train_line(update, 5 / update) for update in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"kind": "eval", "epoch": 0}\n' + end)


def add_spectra(run: Path, refreshes: int = 3, *, scale: float = 1.0) -> None:
    (run / "spectra").mkdir(exist_ok=True)
    for i in range(refreshes):
        spectra = {
            f"{kind}/blocks.{block}.{name}": scale * np.linspace(1 + i + block, 0.1, k)
            for kind in ("spec", "spec_ema")
            for block in range(3)
            for name, k in KINDS.items()
        }
        write_spectra(run / "spectra", 10 * i, spectra)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "my experiment"
    path.mkdir()
    return path


def fill(run: Path) -> Path:
    add_summary(run)
    add_metrics(run)
    add_spectra(run)
    args = "model: vit_small_patch16_224\nscale: [0.35, 1.0]\nnote: <script>alert(1)</script>\n"
    (run / "args.yaml").write_text(args)
    (run / "environment.json").write_text(json.dumps({"torch": "2.14.1", "gpu": {"name": "none"}}))
    return run


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run with its report, made once; tests only read it."""
    run = tmp_path_factory.mktemp("runs") / "my experiment"
    run.mkdir()
    fill(run)
    main([str(run)])
    return run


def embedded_pictures(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_a_finished_run_gives_three_pictures_and_one_page_that_holds_them(reported: Path) -> None:
    pictures = {path.name: path.read_bytes() for path in (reported / "report").iterdir()}
    assert sorted(pictures) == ["spectra.png", "stable_rank.png", "training.png"]
    for png in pictures.values():
        assert png.startswith(PNG)
        width, height = struct.unpack(">II", png[16:24])
        assert width >= 1000
        assert height >= 500
    html = (reported / "report.html").read_text()
    assert embedded_pictures(html) == [pictures[name] for name in ("training.png", "spectra.png", "stable_rank.png")]
    for text in ("my experiment", "61.25", "62.25 %", "epoch 1", "vit_small_patch16_224", "0.35 1.0", "gpu.name"):
        assert text in html
    assert 'class="notes"' not in html


def test_the_page_needs_no_network_runs_no_script_and_names_no_path(reported: Path) -> None:
    html = re.sub(r"base64,[^\"]+", "base64,", (reported / "report.html").read_text())
    assert re.findall(r"https?:|//|@import|url\(|<link|<iframe", html) == []
    assert set(re.findall(r'(?:src|href|srcset)\s*=\s*"([^"]*)"', html)) == {"data:image/png;base64,"}
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert str(reported.parent) not in html
    assert "prefers-color-scheme: dark" in html
    assert '<meta name="viewport"' in html


def test_equal_runs_give_equal_pictures(reported: Path) -> None:
    assert stable_rank_plot(read_run(reported)) == (reported / "report" / "stable_rank.png").read_bytes()


def test_a_run_in_its_first_epoch_is_drawn_and_says_what_is_missing(run: Path) -> None:
    add_metrics(run, end='{"kind": "train", "upd')
    notes = write_report(run)
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
        ["top-1 accuracy (%)", "60.50", "61.25", "epoch 1"],
        ["top-5 accuracy (%)", "90.00", "90.00", "epoch 0"],
        ["eval loss", "0.9000", "0.9000", "epoch 2"],
        ["train loss, epoch mean", "1.0000", "1.0000", "epoch 2"],
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
        "summary.csv", "args.yaml", "environment.json", "update_00000010.npz",
    ]  # fmt: skip


def test_refreshes_of_another_model_are_left_out(run: Path) -> None:
    add_spectra(run)
    write_spectra(run / "spectra", 15, {"spec/blocks.0.attn.qkv": np.ones(99)})
    updates, modules = series(read_run(run), "spec")
    np.testing.assert_array_equal(updates, [0, 10, 20])
    assert modules["blocks.0.attn.qkv"].shape == (3, 6)


def test_many_refreshes_are_thinned_evenly_with_both_ends_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_run_module, "MAX_SNAPSHOTS", 3)
    add_spectra(run, refreshes=9)
    found = read_run(run)
    assert [stored.update for stored in found.spectra] == [0, 40, 80]
    assert any("3 of 9 stored spectra" in note for note in found.notes)


@pytest.mark.parametrize("scale", [float("nan"), 0.0], ids=["nan", "zero"])
def test_a_diverged_run_is_drawn_all_the_same(run: Path, scale: float) -> None:
    add_spectra(run, scale=scale)
    found = read_run(run)
    for draw in (spectra_plot, stable_rank_plot):
        png = draw(found)
        assert png is not None
        assert png.startswith(PNG)


def test_losses_that_became_nan_are_drawn_and_not_taken_for_the_best(run: Path) -> None:
    add_summary(run)
    text = (run / "summary.csv").read_text()
    (run / "summary.csv").write_text(text + "3,40,nan,,nan,nan,nan,nan,nan,0.001,3000,0.02\n")
    (run / "metrics.jsonl").write_text("".join(train_line(u, None if u > 5 else 1.0) for u in range(1, 10)))
    write_report(run)
    assert final_numbers(read_run(run)).rows[0] == ["top-1 accuracy (%)", "not measured", "61.25", "epoch 1"]


def test_a_wrong_path_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory at .*nowhere.*lowrank_vit\.train.*output/<experiment>"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"holds no run: expected some of summary\.csv"):
        main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_user_error(run: Path) -> None:
    add_summary(run)
    (run / "report").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(run)
