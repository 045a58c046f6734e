"""The page of `analyze_spectrum --compare`, and analyses in a run's own folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank_vit.analyze_spectrum import main as analyze
from lowrank_vit.common.errors import UserError
from lowrank_vit.report.__main__ import main
from lowrank_vit.report.drift import drift_parts
from tests.browser import opened
from tests.reported import analysis_file, fill
from tests.spectra import tiny_vit


def drift_file(folder: Path) -> Path:
    """What `--compare` writes of two states of a tiny model."""
    for name, seed in (("before", 0), ("after", 1)):
        torch.manual_seed(seed)
        state = {key: (1 + seed * torch.rand(())) * value for key, value in tiny_vit().state_dict().items()}
        torch.save({"state_dict": state, "arch": "vit", "epoch": seed}, folder / f"{name}.pth")
    files = [str(folder / f"{name}.pth") for name in ("before", "after")]
    analyze(["--compare", *files, "--save-dir", str(folder), "--topk", "3"])
    return folder / "vit_drift.json"


def test_a_comparison_of_checkpoints_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = drift_file(tmp_path)
    main([str(path)])
    assert f"wrote {tmp_path}/vit_drift.html and {tmp_path}/vit_drift/*.png" in capsys.readouterr().out
    assert [one.name for one in (tmp_path / "vit_drift").iterdir()] == ["drift.png"]
    html = (tmp_path / "vit_drift.html").read_text()
    layers = json.loads(path.read_text())["layers"]
    for name, numbers in layers.items():
        assert f"<td>{name}</td><td>{numbers['update_rel']:.4g}</td>" in html
    name, most = max(((name, of["update_rel"]) for name, of in layers.items()), key=lambda one: one[1])
    assert f"The largest of a single matrix is {most:.3g} ({name}).</li>" in html
    assert ". The lowest of a single matrix is 1 (" in html
    assert html.count("<li>") == 4  # one says that there is no bound on the turn
    main([str(tmp_path), "--no-png"])  # the folder means it, too
    assert list((tmp_path / "vit_drift").iterdir()) == []
    with opened(tmp_path / "profile") as tab:
        tab.open(tmp_path / "vit_drift.html", width=420)
        tab.js("document.getElementById('fig-drift').scrollIntoView()")
        tab.wait("document.querySelector('#fig-drift .js-plotly-plot')?.data?.length > 0")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js("[...document.querySelectorAll('#fig-data button')].map((one) => one.dataset.table)") == [
            "matrices",
            "lines",
        ]
        assert tab.errors == []
    main([str(path), "--no-png", "--lang", "zh"])
    assert "单个矩阵的最大值为" in (tmp_path / "vit_drift.html").read_text()


def test_sentences_are_about_numbers_that_do_not_grow_with_the_matrix_and_order_every_type(tmp_path: Path) -> None:
    def of(relative: float, overlap: float) -> dict[str, float | None]:
        return {
            "update_normF": 100 * relative,
            "update_rel": relative,
            "turn_bound": None,
            "block_cos_u_overlap": overlap,
        }

    layers = {"blocks.0.mlp.fc1": of(0.5, 0.9), "blocks.1.mlp.fc1": of(0.7, 0.7), "blocks.0.attn.qkv": of(0.59, 0.2)}
    path = tmp_path / "x_drift.json"
    path.write_text(json.dumps({"meta": {"before": {}, "after": {}}, "types": {}, "layers": layers}))
    parts, _ = drift_parts(path, with_png=False)
    assert parts["said"] == [
        "Change relative to the weights, ‖ΔW‖ / ‖W‖, means by type, the largest first: mlp.fc1 0.6, attn.qkv 0.59. "
        "The largest of a single matrix is 0.7 (blocks.1.mlp.fc1).",
        "Overlap of the top left vectors before and after (1: the same, 0: chance), means by type, the lowest (most "
        "turned) first: attn.qkv 0.2, mlp.fc1 0.8. The lowest of a single matrix is 0.2 (blocks.0.attn.qkv).",
    ]
    (note,) = parts["notes"]
    assert note.startswith("The block's turn has no bound in 3 of 3 matrices (blocks.0.mlp.fc1 first)")
    for numbers in layers.values():
        del numbers["update_rel"]  # as files of earlier versions
    path.write_text(json.dumps({"meta": {"before": {}, "after": {}}, "types": {}, "layers": layers}))
    (only,) = drift_parts(path, with_png=False)[0]["said"]
    assert only.startswith("Overlap of")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"meta": {}, "layers": {}}', '{"meta": 3, "layers": [1]}'])
def test_what_is_no_comparison_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "x_drift.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read as a comparison of checkpoints"):
        main([str(tmp_path / "x_drift.json")])


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    content = {"meta": {"before": {}, "after": {}}, "types": {}, "layers": {"<b>": {"update_normF": None}}}
    (tmp_path / "x_drift.json").write_text(json.dumps(content))
    main([str(tmp_path / "x_drift.json")])
    html = (tmp_path / "x_drift.html").read_text()
    assert "No number in it is finite." in html
    assert "<b>" not in html


def test_an_analysis_in_a_runs_folder_leaves_the_runs_report_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    fill(run)
    analysis = analysis_file(run, "--full")
    main([str(run), "--no-png"])
    assert "61.25" in (run / "report.html").read_text()  # of the run, not of the analysis that lies there
    before = (run / "report.html").read_text()
    main([str(analysis), "--no-png"])
    assert (run / "report.html").read_text() == before
    assert (run / "vit_spectral.html").exists()
