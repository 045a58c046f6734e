"""How far a run has come: read from its newest checkpoint and its logs, whichever is further on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.locks import is_locked


@dataclass(frozen=True)
class HowFar:
    """Where a run stands."""

    epochs: int
    """Finished ones."""
    planned: int | None
    """Epochs that it was told to train; None where its arguments are missing."""
    updates: int
    is_running: bool
    """Whether a process owns the directory now."""

    @property
    def is_finished(self) -> bool:
        """Whether all planned epochs are done."""
        return self.planned is not None and self.epochs >= self.planned

    @property
    def in_words(self) -> str:
        """A line for the reader; empty where too little is known."""
        if self.planned is None:
            return ""
        of_planned = f"{self.epochs:,} of {self.planned:,} epochs are done"
        if self.is_running:
            return f"Still training: {of_planned}."
        return "" if self.is_finished else f"Stopped after update {self.updates:,}: {of_planned}."


def how_far(
    path: Path, args: Mapping[str, Any], epochs: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray]
) -> HowFar:
    """Of the run in `path`; `epochs` and `train` are the rows of its summary and of its log."""
    saved_epochs, saved_updates = _saved(path / "last.pth.tar")
    done = [saved_epochs] + [
        int(np.nanmax(table["epoch"])) + more for table, more in ((epochs, 1), (train, 0)) if _has(table)
    ]
    updates = [saved_updates] + [int(table["update"][-1]) for table in (epochs, train) if "update" in table]
    counts = [args.get(name, 0) for name in ("epochs", "cooldown-epochs")]
    planned = sum(counts) if all(isinstance(count, int) for count in counts) and counts[0] else None
    return HowFar(max(done), planned, max(updates), is_locked(path))


def _has(table: Mapping[str, np.ndarray]) -> bool:
    return "epoch" in table and bool(np.isfinite(table["epoch"]).any())


def _saved(path: Path) -> tuple[int, int]:
    """Finished epochs and updates of a checkpoint, without reading its weights; zeros without a readable one."""
    if not path.is_file():
        return 0, 0
    import torch

    with contextlib.suppress(Exception):  # a damaged or foreign file fails in many ways inside torch
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["progress"]["epoch"]), int(content["step"]["num_updates"])
    return 0, 0


def better_weights(path: Path) -> str:
    """Of a checkpoint: "model" or "ema", whichever scored higher in its epoch; empty where it does not tell."""
    import torch

    with contextlib.suppress(Exception):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return str(content.get("better") or ("ema" if content.get("state_dict_ema") else "model"))
    return ""
