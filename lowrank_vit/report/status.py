"""The progress of a run, from its newest checkpoint and its logs, and what to do next, as commands to paste."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.locks import is_locked
from lowrank_vit.common.program import pasteable_command
from lowrank_vit.report.language import tr


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run."""

    epochs: int
    """Finished epochs."""
    planned: int | None
    """Epochs to train in all; None where the run's arguments are missing."""
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
        done = {"n": self.epochs, "all": self.planned}
        if self.is_running:
            return tr("Still training: {n:,} of {all:,} epochs are done.", **done)
        if self.is_finished:
            return ""
        return tr("Stopped after update {at:,}: {n:,} of {all:,} epochs are done.", at=self.updates, **done)


def run_status(
    path: Path, args: Mapping[str, Any], epochs: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray]
) -> RunStatus:
    """The progress of the run in `path`; `epochs` and `train` are the rows of its summary and of its log."""
    saved_epochs, saved_updates = _saved(path / "last.pth.tar")
    done = [saved_epochs] + [
        int(np.nanmax(table["epoch"])) + more for table, more in ((epochs, 1), (train, 0)) if _has(table)
    ]
    updates = [saved_updates] + [int(table["update"][-1]) for table in (epochs, train) if "update" in table]
    counts = [args.get(name, 0) for name in ("epochs", "cooldown-epochs")]
    planned = sum(counts) if all(isinstance(count, int) for count in counts) and counts[0] else None
    return RunStatus(max(done), planned, max(updates), is_locked(path))


def _has(table: Mapping[str, np.ndarray]) -> bool:
    return "epoch" in table and bool(np.isfinite(table["epoch"]).any())


def _saved(path: Path) -> tuple[int, int]:
    """Finished epochs and updates of a checkpoint, without reading its weights; zeros without a readable one."""
    if not path.is_file():
        return 0, 0
    with contextlib.suppress(Exception):  # a damaged or foreign file fails in many ways inside torch
        content = _read(path)
        return int(content["progress"]["epoch"]), int(content["step"]["num_updates"])
    return 0, 0


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's content; its weights are memory-mapped where the file system supports that."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError):
        return torch.load(path, map_location="cpu", weights_only=True)


def better_weights(path: Path) -> str:
    """The weights of a checkpoint that scored higher in its epoch, "model" or "ema"; empty if unknown."""
    with contextlib.suppress(Exception):
        content = _read(path)
        return str(content.get("better") or ("ema" if content.get("state_dict_ema") else "model"))
    return ""


WIDTH = 76
"""Columns of a command; a longer one goes on in the next line."""


@dataclass(frozen=True)
class Step:
    """One thing to do."""

    what: str
    """A few words."""
    words: tuple[str, ...]
    """The command's words as they are typed; words that belong together are one."""

    def command(self, indent: str = "") -> str:
        """The command, on several lines where it is long."""
        lines = [indent]
        for word in self.words:
            if len(lines[-1]) + len(word) > WIDTH and lines[-1].strip():
                lines[-1] += "\\"
                lines.append(indent + "    ")
            lines[-1] += word + " "
        return "\n".join(line.rstrip() for line in lines)


def shown(path: Path) -> str:
    """A path to type in the current directory, without links like output/latest, which may point elsewhere later."""
    absolute = path.resolve()
    below = absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
    return shlex.quote(str(below))


def next_steps(
    run_dir: Path, args: Mapping[str, Any], *, is_finished: bool, is_drawn: bool = False, launcher: str = ""
) -> list[Step]:
    """Commands that make sense for the contents of a run directory.

    Args:
        run_dir: the run.
        args: its flags.
        is_finished: whether all epochs are done.
        is_drawn: whether there is a report without newer numbers.
        launcher: what stands before `-m lowrank_vit.train` if the run has several processes, such as "torchrun ...".
    """
    run, steps = shown(run_dir), list[Step]()
    train = f"{launcher} -m lowrank_vit.train" if launcher else pasteable_command("lowrank_vit.train")
    config = f"--config {run}/args.yaml"
    if not is_finished:
        if (run_dir / "last.pth.tar").exists():
            steps.append(Step(tr("Go on with it"), (train, config, f"--resume {run}/last.pth.tar")))
        else:
            steps.append(Step(tr("Nothing was saved yet: begin anew"), (train, config)))
    if not is_drawn:
        steps.append(Step(tr("Draw it"), (pasteable_command("lowrank_vit.report"), run)))
    if args.get("synthetic"):
        data = () if args.get("data-dir") else ("--data-dir DATA",)
        steps.append(Step(tr("Compare its img/s with those of your data"), (train, config, "--no-synthetic", *data)))
    elif (run_dir / "model_best.pth.tar").exists():
        best = f"--checkpoint {run}/model_best.pth.tar"
        ema = ("--use-ema",) if better_weights(run_dir / "model_best.pth.tar") == "ema" else ()
        steps += [
            Step(tr("Singular values of its weights"), (pasteable_command("lowrank_vit.analyze_spectrum"), *ema, best)),
            Step(tr("Score it again, with 95 % intervals"), (pasteable_command("lowrank_vit.validate"), *ema, best)),
            Step(tr("Classify images"), (pasteable_command("lowrank_vit.inference"), "IMAGE_OR_FOLDER", *ema, best)),
        ]
    if any(run_dir.glob("tensorboard/*/events.*")):
        steps.append(Step(tr("Watch it in TensorBoard"), ("tensorboard", f"--logdir {run}/tensorboard")))
    if (run_dir / "mlflow" / "mlflow.db").exists():
        steps.append(
            Step(tr("See it in MLflow"), ("mlflow ui", f"--backend-store-uri sqlite:///{run}/mlflow/mlflow.db"))
        )
    if any(run_dir.glob("wandb/offline-run-*")):
        steps.append(Step(tr("Send what was kept for Weights & Biases"), ("wandb sync", f"{run}/wandb/offline-run-*")))
    return steps
