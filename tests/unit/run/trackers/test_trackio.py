"""trackio itself, where it is installed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About


@pytest.mark.filterwarnings("default")
def test_the_library_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    storage: Any = pytest.importorskip("trackio.sqlite_storage")
    ids: dict[str, str] = {}
    for last in (3, 5):  # killed after update 3, and resumed from update 1
        log = Trackers.start(["trackio"], About("p", "n", tmp_path, {"lr": 1.0}, ("b c",)), resume_ids=ids)
        for update in range(2 if ids else 1, last + 1):
            log.log({"update": update, "train/loss": 1.0 / update, "train/lr": math.nan}, "update")
        log.finish()
        ids = log.ids
    rows = storage.SQLiteStorage.get_logs("p", "n")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(update, 1.0 / update) for update in range(1, 6)]
