"""Pictures of cosines and vectors: of whole blocks where there are any, each number beside its own chance value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from lowrank_vit.report.read import read_run
from lowrank_vit.report.spectra.metrics import cosine_plot, ema_plot, profile_plot
from lowrank_vit.report.spectra.values import vectors_plot
from lowrank_vit.spectral.measures.subspaces import chance_cosines
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.watching.files import list_vectors, read_vectors
from lowrank_vit.spectral.watching.store import SpectraStore
from tests.reported import KINDS, add_monitor, solved


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A place for a run."""
    return tmp_path


def drawn(monkeypatch: pytest.MonkeyPatch, method: str) -> list[Any]:
    """What is passed first to a method of matplotlib's axes from now on."""
    found: list[Any] = []
    original = getattr(Axes, method)

    def record(axes: Axes, first: Any, *args: Any, **more: Any) -> Any:
        found.append(first)
        return original(axes, first, *args, **more)

    monkeypatch.setattr(Axes, method, record)
    return found


def test_each_kind_of_cosine_is_drawn_beside_its_own_chance(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean cosines of a run of an earlier version, mean squares and overlaps of one that knows blocks."""
    add_monitor(run)
    levels = drawn(monkeypatch, "axhline")
    assert ema_plot(read_run(run)) is not None
    # chance_u is 0.5 and a matrix 12x6, so there are three vectors.
    assert levels == [pytest.approx(np.mean(chance_cosines(3, 12)))] * len(KINDS)
    assert levels[0] < 0.45
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in lines:
        keys = {key.rpartition("/")[0] for key in event if key.startswith("spec/blocks.")}
        event |= {f"{key}/block_chance_u_mean_sq": 5 / 12 for key in keys}
        event |= {f"{key}/block_ema_cos_u_mean_sq": 0.9 for key in keys}
        event |= {f"{key}/block_{m}_{x}_overlap": 0.6 for key in keys for m in ("cos", "cos0") for x in "uv"}
        event |= {f"{key}/{m}": value for key in keys for m, value in (("block_energy", 0.95), ("turn_bound", None))}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    del levels[:]
    assert ema_plot(read_run(run)) is not None
    assert levels == [pytest.approx(5 / 12)] * len(KINDS)
    del levels[:]
    assert profile_plot(read_run(run)) is not None
    assert levels == [0]
    edges = drawn(monkeypatch, "pcolormesh")
    assert cosine_plot(read_run(run)) is not None
    assert sum(np.shape(one) == (4,) for one in edges) == 6 * len(KINDS)  # of three refreshes; others are colour bars


def test_vectors_between_the_recorded_ones_are_drawn_where_both_refreshes_have_them(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_block(seed: int) -> Solved:
        whole = solved(seed)
        return replace(whole, top=whole.top.pick([0, 2]), last=whole.last.pick([0, 2]), block=whole.top)

    add_monitor(run, refreshes=2)
    stored = SpectraStore(run / "spectra", 1e9)
    pictures = drawn(monkeypatch, "imshow")
    keys = [f"spec/blocks.0.{kind}" for kind in KINDS]
    for update, of in ((20, with_block), (30, with_block)):
        stored.save(update, {key: of(update + n) for n, key in enumerate(keys)})
    assert vectors_plot(replace(read_run(run), vectors=[read_vectors(p) for p in list_vectors(run / "spectra")[2:]]))
    assert {image.shape for image in pictures} == {(3, 3)}
    first = SpectraStore(run / "spectra", 1e9)
    first.save(10, {key: replace(with_block(n), block=None) for n, key in enumerate(keys)})
    del pictures[:]
    assert vectors_plot(replace(read_run(run), vectors=[read_vectors(p) for p in list_vectors(run / "spectra")[1:]]))
    assert {image.shape for image in pictures} == {(2, 2), (3, 3)}
