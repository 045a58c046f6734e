"""What of a ViT-B's spectra is logged and sent, and how much that is, on a record with all of its keys."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lowrank_vit.run.metrics import RunLog
from lowrank_vit.run.spectral_records import (
    MEANS,
    Preparing,
    expected_held,
    expected_sizes,
    held_in_words,
    logged,
    sent,
    sizes_in_words,
    table_of,
)
from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings

TYPES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def watched(folder: Path, topk: int, *, ema: bool, **more: Any) -> tuple[dict[str, float], SpectralMonitor]:
    """The second record of a model with ViT-B's names, and its monitor; its matrices are small."""
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=12, num_heads=2, num_classes=10)
    moving = copy.deepcopy(model) if ema else None
    settings = SpectralSettings(topk=topk, **more)
    with SpectralMonitor(model, moving, store_dir=folder, every=1, settings=settings, circuits="raw") as monitor:
        for update in (0, 1):
            monitor.observe(update)
            monitor.wait()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
    return monitor.records()[-1].values, monitor


@pytest.fixture(scope="module")
def of_vit_b(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """All keys of ViT-B with EMA."""
    return watched(tmp_path_factory.mktemp("store"), 8, ema=True, updates=True)[0]


def names(values: dict[str, Any]) -> set[str]:
    return {key.rpartition("/")[0].partition("/")[2] for key in values}


def test_a_tracker_gets_fewer_than_a_thousand_numbers_of_vit_b(of_vit_b: dict[str, float]) -> None:
    assert len(of_vit_b) > 20_000
    asked_for = ("/dw_", "/opt_", "/circuit/")
    usual = {key: value for key, value in of_vit_b.items() if not any(part in key for part in asked_for)}
    found = sent(usual, "means")
    assert len(found) < 400
    assert len(sent(of_vit_b, "means")) < 1000
    assert len(MEANS) == 12
    for kind in ("spec", "spec_ema"):
        for block in range(12):
            for of in TYPES:
                assert {f"{kind}/blocks.{block}.{of}/{m}" for m in ("sigma_max", "block_cos_u_mean")} <= set(found)
    by_type = {key.split("/")[-1] for key in found if key.startswith("spec/type/attn.qkv/")}
    assert by_type == MEANS
    assert "spec/refresh/full" in found
    assert not any("/depth/" in key for key in found)


def test_more_is_sent_where_it_is_asked_for(of_vit_b: dict[str, float]) -> None:
    types, ends, every = (sent(of_vit_b, what) for what in ("types", "first-last", "all"))
    assert every == of_vit_b
    assert names(types) == {"refresh", "type/circuit", *(f"type/{of}" for of in TYPES)}
    assert "spec/type/mlp.fc1/mp_ks" in types
    assert names(ends) - names(types) == {
        f"{c}blocks.{n}{of}" for n in (0, 11) for c, of in [("circuit/", ""), *(("", f".{t}") for t in TYPES)]
    }
    for name in ("blocks.11.mlp.fc2", "circuit/blocks.0"):
        prefix = f"spec_ema/{name}/"
        assert {k for k in ends if k.startswith(prefix)} == {k for k in of_vit_b if k.startswith(prefix)}
    assert len(sent(of_vit_b, "means")) < len(types) < len(ends) < len(every) / 4


@pytest.mark.parametrize("what", ["means", "all"])
def test_the_log_has_means_or_everything(of_vit_b: dict[str, float], tmp_path: Path, what: Any) -> None:
    with RunLog(tmp_path, spec_log=what) as log:
        log.log("spec", 100, of_vit_b)
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text)
    assert (record.pop("kind"), record.pop("update")) == ("spec", 100)
    assert list(record) == list(logged(of_vit_b, what))
    if what == "all":
        assert list(record) == list(of_vit_b)
    else:
        assert len(text) < 20_000
        assert all(name.startswith(("type/", "refresh")) for name in names(record))


@pytest.mark.parametrize(("topk", "ema", "full_every"), [(8, True, 1), (4, True, 1), (8, False, 1), (8, True, 2)])
def test_the_sizes_that_are_said_come_true(tmp_path: Path, topk: int, ema: bool, full_every: int) -> None:
    values, monitor = watched(tmp_path, topk, ema=ema, full_every=full_every)
    usual = {key: value for key, value in values.items() if "/circuit/" not in key}
    of_run = monitor.matrices, 1 + ema, topk, 1
    scalars = sum(path.stat().st_size for path in tmp_path.glob("scalars_*1.npz"))
    for what in ("means", "all"):
        line = len(json.dumps(logged(usual, what)))  # of whole spectra with 1, and else of the others
        of_others = expected_sizes(*of_run, 1 if full_every == 1 else 10**9, what)
        assert of_others.line == pytest.approx(line, rel=0.3), what
    content = sum(
        path.stat().st_size for pattern in ("vectors", "update") for path in tmp_path.glob(f"{pattern}_*1.npz")
    )
    # Small matrices have names that count; those of ViT-B are a thousandth of a file.
    assert scalars + 0.3 * content < of_others.store < scalars + content


def test_what_is_said_at_the_start() -> None:
    shapes = {"attn.qkv": [2304, 768], "attn.proj": [768, 768], "mlp.fc1": [3072, 768], "mlp.fc2": [768, 3072]}
    matrices = {f"blocks.{n}.{of}": {"shape": shape} for n in range(12) for of, shape in shapes.items()}

    def said(refreshes: int, what: Any, limit_gb: float = 2.0) -> str:
        return sizes_in_words(expected_sizes(matrices, 2, 8, 1, 1, what), refreshes, 96, limit_gb, what)

    assert said(75_000, "means") == (
        "spectra: 75,000 refreshes of 96 matrices, about 38.6 MB each, thinned out in spectra/ to 2.00 GB "
        "(--spec-store-gb; all would be 2,893 GB); metrics.jsonl gets about 410 MB of them"
    )
    assert said(10, "all").startswith("spectra: 10 refreshes of 96 matrices, about 38.6 MB each, 386 MB in spectra/; ")
    assert said(10, "all").endswith("of them; --spec-log means is small")


def test_a_table_has_a_row_for_each_matrix_and_plain_cells(of_vit_b: dict[str, float]) -> None:
    table = table_of(5, of_vit_b)
    row = next(row for row in table.rows if row[:3] == [5, True, "blocks.3.mlp.fc1"])
    assert row[table.columns.index("sigma_max")] == of_vit_b["spec_ema/blocks.3.mlp.fc1/sigma_max"]
    assert row[table.columns.index("dw_top_u")] is None
    assert {type(cell) for row in table.rows for cell in row} == {int, bool, str, float, type(None)}


class Rows:
    """In place of a tracker's sender."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[tuple[str, float]], str]] = []

    def put(self, row: dict[str, float], axis: str) -> None:
        self.rows.append((list(row.items()), axis))


@pytest.mark.parametrize("what", ["means", "all"])
@pytest.mark.parametrize("send", ["means", "types", "first-last", "all"])
def test_a_prepared_record_is_written_and_sent_as_one_that_is_not(
    of_vit_b: dict[str, float], tmp_path: Path, what: Any, send: Any
) -> None:
    late = ("spec/refresh/skipped", "spec/refresh/failed")
    early = {key: value for key, value in of_vit_b.items() if key not in late}
    values = early | dict.fromkeys(late, 3.0) | {"spec/refresh/odd": math.nan}
    written, sent_rows = list[bytes](), list[list[tuple[list[tuple[str, float]], str]]]()
    for number, prepared in enumerate((None, Preparing(what, send)(100, early))):
        folder, sender = tmp_path / str(number), Rows()
        folder.mkdir()
        trackers: Any = Trackers([], {})
        trackers._senders = [sender]
        RunLog(folder, trackers=trackers, spec_log=what, wandb_spec=send).log_spectra(100, values, prepared)
        written.append((folder / "metrics.jsonl").read_bytes())
        sent_rows.append(sender.rows)
    assert written[0] == written[1]
    assert written[0].endswith(b"null}\n")
    assert str(sent_rows[0]) == str(sent_rows[1])
    assert sent_rows[0][0][0][0] == ("spec_update", 100)


def test_what_a_monitor_holds_is_known_from_the_shapes(tmp_path: Path) -> None:
    _, monitor = watched(tmp_path, 3, ema=True, interval=2)
    memory = monitor._worker._memory
    held = expected_held(monitor.matrices, 2, 4, 3, 2)
    copies = sum(one.matrices_NRC.nbytes for of in memory.weights.values() for one in of)
    assert held.copies == 2 * copies
    ends = [end for one in memory.last.values() for end in (one.top, one.last, one.block) if end]
    arrays = [array for end in ends for array in (end.u, end.v, end.s, end.certificate)]
    arrays += [array for one in memory.last.values() for array in (one.s, one.start) if array is not None]
    assert 0.7 * held.vectors < 4 * sum(array.nbytes for array in arrays) <= held.vectors
    shared = [expected_held(monitor.matrices, 2, 4, 3, 2, ranks=8, is_first=first) for first in (True, False)]
    assert shared[0].copies - shared[1].copies == held.copies
    assert held_in_words(held, held.copies, "cuda:0") == ""
    assert "--spec-targets" in held_in_words(held, held.copies - 1, "cuda:0")
