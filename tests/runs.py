"""What the tests read of a run directory, and how they stop a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank_vit.model import weights
from lowrank_vit.model.weights import Checkpoint
from lowrank_vit.spectral.watching.scalars import ScalarHistory
from lowrank_vit.training.trainer import Trainer


def records(run: Path, kind: str) -> list[dict]:
    """The lines of one kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def spectral_records(run: Path) -> list[dict]:
    """The lines of kind spec, each with all scalars that the store has of its refresh, numbers alone."""
    history, lines = ScalarHistory(run / "spectra"), records(run, "spec")
    return [line | (history.read(u).named() if (u := line["update"]) in history.updates else {}) for line in lines]


def losses(run: Path) -> dict[int, float]:
    """By the number of updates, as logged."""
    found = [(record["update"], record["loss"]) for record in records(run, "train")]
    assert len(found) == len(dict(found))  # no update is logged twice
    return dict(found)


def at_update(trainer: Trainer, update: int, do: Callable[[], object]) -> None:
    """Have something happen at the end of an update."""
    step_update = trainer.setup.scheduler.step_update

    def and_do(num_updates: int, metric: float | None = None) -> None:
        step_update(num_updates, metric)
        if num_updates == update:
            do()

    trainer.setup.scheduler.step_update = and_do


def stop_after(trainer: Trainer, update: int) -> None:
    """Have the run stop as if a signal came during this update."""
    at_update(trainer, update, lambda: trainer.stop.ask(signal.SIGTERM))


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits: weights, EMA and optimizer."""
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    states = first["optimizer"]["state"], second["optimizer"]["state"]
    return (
        all(
            torch.equal(first[key][name], second[key][name])
            for key in ("state_dict", "state_dict_ema")
            for name in first[key]
        )
        and all(torch.equal(states[0][n][k], states[1][n][k]) for n in states[0] for k in states[0][n])
        and first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    )


def checkpoint_of(args: dict[str, Any], **content: Any) -> Checkpoint:
    """A run's checkpoint by its options alone: all parts are there, and empty."""
    return Checkpoint(Path("last.pth.tar"), {**{name: {} for name in weights._OF_A_RUN}, "args": args, **content})
