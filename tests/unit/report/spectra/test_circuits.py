"""The picture of circuits: what is drawn beside which chance value, of a run and of an analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from lowrank_vit.report.read import read_analysis, read_run
from lowrank_vit.report.spectra.circuits import circuits_plot
from lowrank_vit.spectral.measures.circuits import HeadWeights, as_arrays, circuits_of
from lowrank_vit.spectral.watching.files import CIRCUITS
from lowrank_vit.spectral.watching.store import SpectraStore


def stored(blocks: int, heads: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = [HeadWeights(*(rng.standard_normal((heads, 3, 9)) for _ in range(4))) for _ in range(blocks)]
    return {f"blocks.{i}": one for i, one in enumerate(circuits_of(weights))}


@pytest.mark.parametrize(("blocks", "bad"), [(1, False), (3, True), (14, False)])
def test_scores_are_drawn_over_their_chance_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, bad: bool
) -> None:
    """Of one block there are none; of a deep model evenly spaced blocks; a NaN is left out."""
    found = stored(blocks)
    if bad:
        found["blocks.1"].q_HG[0] = np.nan
    keyed = {f"{kind}/circuit/{block}": one for kind in ("spec", "spec_ema") for block, one in found.items()}
    SpectraStore(tmp_path / "spectra", 1e9, {CIRCUITS: "raw"}).save(4, {}, circuits=keyed)
    (tmp_path / "args.yaml").write_text("model: vit\n")
    maps: list[np.ndarray] = []
    original = Axes.imshow

    def record(axes: Axes, values: np.ndarray, **more: Any) -> Any:
        maps.append(values)
        return original(axes, values, **more)

    monkeypatch.setattr(Axes, "imshow", record)
    run = read_run(tmp_path)
    assert run.circuits.update == 4
    picture = circuits_plot(run)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert len(maps) == 2 * min(blocks - 1, 11)
    if blocks > 1:
        np.testing.assert_array_equal(maps[1], np.square(found["blocks.1"].k_HG) * 9)
        np.testing.assert_array_equal(maps[-2], np.square(found[f"blocks.{blocks - 1}"].q_HG) * 9)


@pytest.mark.parametrize(("circuits", "said"), [("raw", "without the weights of norms"), ("folded", "folded in")])
def test_an_analysis_has_the_file_beside_it_and_none_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuits: str, said: str
) -> None:
    """The heading says which circuits these are."""
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda _figure, title, **_: titles.append(title))
    (tmp_path / "vit_spectral.json").write_text(json.dumps({"meta": {"model": "vit"}, "layers": {}}))
    assert circuits_plot(read_analysis(tmp_path / "vit_spectral.json")) is None
    np.savez(tmp_path / "vit_circuits.npz", allow_pickle=False, **as_arrays(stored(2), circuits))
    assert circuits_plot(read_analysis(tmp_path / "vit_spectral.json")) is not None
    assert said in titles[-1]
    (tmp_path / "vit_circuits.npz").write_bytes(b"PK\x03\x04 cut short")
    assert circuits_plot(read_analysis(tmp_path / "vit_spectral.json")) is None
