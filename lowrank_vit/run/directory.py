"""The run directory: created once, owned by one process at a time, with a record of its environment."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowrank_vit import __version__
from lowrank_vit.common import terminal
from lowrank_vit.common.devices import has_cuda
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import remove_leftovers, write_whole, writing
from lowrank_vit.common.filesystem import symbolic_link
from lowrank_vit.common.locks import LOCK, SOFT_LOCK, FolderLock, holder, lock_folder
from lowrank_vit.common.resources import available_cores, cpu_name
from lowrank_vit.spectral.watching.store import SpectraStore

PACKAGES = (
    *("torch", "torchvision", "timm", "ffcv", "nvidia-dali-cuda130", "spdl", "numba", "numpy", "pillow"),
    *("scikit-image", "scikit-learn", "wandb", "tensorboard", "trackio", "mlflow"),
)
"""Packages whose versions are recorded: for computing, decoding, the benches' photographs, and trackers."""


LAST = "last.pth.tar"
_LATEST = "latest"
"""Name of the link to the latest run, beside it."""
_EPOCHS_UNSAVED = 2
"""Epochs whose scores may be logged before the first checkpoint is written; the next checkpoint waits for it."""
_BEFORE_A_CHECKPOINT = {
    *(LOCK, SOFT_LOCK, ".launch", "args.yaml", "environment.json", "metrics.jsonl", "summary.csv", "spectra"),
    *("report", "report.html", "wandb", "tensorboard", "mlflow"),
}
"""Files that a run may leave before its first checkpoint."""


class RunDir:
    """A directory under `--output`, locked while its process lives."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        """`lock` None: the directory belongs to another process."""
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, output: Path, experiment: str, default_name: str) -> RunDir:
        """Make `output/experiment`, or a folder named by the time. Raises `UserError` if that directory has a run.

        Also raises `UserError` for the name of the link to the latest run. Files of an attempt that ended before its
        first checkpoint are removed, and a line reports it.
        """
        if experiment:
            path = output / experiment
            _refuse_name_of_link(path)
        else:
            path = _unused(output / f"{default_name}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The output directory {path} cannot be made: {error.strerror}. Choose --output."
            ) from error
        run_dir = cls(path, _lock(path))
        try:
            is_used = _holds_an_attempt(path)  # checked under the lock, so that no other process can start meanwhile
        except UserError:
            run_dir.close()
            raise
        if is_used:
            terminal.say(f"note: {path} has an attempt that ended before its first checkpoint; the run starts anew")
            run_dir.forget()
        run_dir._link_latest()
        return run_dir

    @staticmethod
    def require_free(output: Path, experiment: str) -> None:
        """Raise `UserError` if `create` would, as far as known now. Without `experiment` a free name is used."""
        path = output / experiment
        if experiment:
            _refuse_name_of_link(path)
        if experiment and path.exists():
            _holds_an_attempt(path)
            if (path / LOCK).exists():
                _lock(path).release()
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"The output directory {path} cannot be made: {existing} is not writable. Choose --output.")

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """Own an existing run directory, to continue it. Raises `UserError` while another process owns it."""
        run_dir = cls(path, _lock(path))
        run_dir._remove_unfinished()
        return run_dir

    def _link_latest(self) -> None:
        latest = self.path.parent / _LATEST
        with contextlib.suppress(OSError):
            if latest.is_symlink():
                latest.unlink()
        symbolic_link(latest, self.path.name, is_folder=True)  # a convenience only

    def write_text(self, name: str, text: str, say: Callable[[str], object] = terminal.say) -> None:
        """Write a small file atomically; a failure is only reported by `say`."""
        try:
            write_whole(self.path / name, text, through_link=False)
        except OSError as error:
            say(f"warning: {self.path / name} cannot be written ({error.strerror}). Training goes on.")

    def forget(self) -> None:
        """Remove the records of an attempt that ended before its first checkpoint, and files made from them.

        Folders may be links and have other files, which stay. Raises `UserError` if records cannot be removed.
        """
        with writing(self.path, "Choose another --experiment."):
            for name in ("metrics.jsonl", "summary.csv", "report.html"):
                (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            SpectraStore(self.path / "spectra", 0).forget()
        with contextlib.suppress(OSError):
            for picture in (self.path / "report").glob("*.png"):
                picture.unlink(missing_ok=True)
        for folder in (self.path / "wandb").glob("offline-run-*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for file in (*self.path.glob("tensorboard/*/events.*"), *self.path.glob("mlflow/mlflow.db*")):
                file.unlink(missing_ok=True)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for folder in (self.path, self.path / "spectra"):
            remove_leftovers(folder)

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            self._lock.release()


def _holds_an_attempt(path: Path) -> bool:
    """Whether a run directory has files that a run leaves before its first checkpoint.

    Raises `UserError` if it has a checkpoint, scores of an epoch, or files that are not a run's.
    """
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if checkpoints := sorted(name for name in names if name.endswith(".pth.tar")):
        resume = LAST if LAST in checkpoints else checkpoints[-1]
        raise UserError(
            f"The output directory {path} is in use: it has a run. Choose another --experiment, continue it with "
            f"--resume {path / resume}, or remove it."
        )
    foreign = sorted(name for name in names - _BEFORE_A_CHECKPOINT if not name.endswith(".part"))
    if foreign:
        raise UserError(
            f"The output directory {path} is in use: {foreign[0]} is not a run's file. Choose another --experiment, or "
            "remove it."
        )
    if records := _records_of_scores(path):
        raise UserError(
            f"The output directory {path} is in use: it has no checkpoint any more, but {records} has the scores of "
            "a run. Choose another --experiment, or remove that directory."
        )
    return bool(names - {LOCK, SOFT_LOCK})


def _records_of_scores(path: Path) -> str:
    """The name of a file with scores of a validated epoch, or one that cannot be read; empty if there is none.

    Scores of the first epochs do not count if a kill interrupted the first checkpoint, which is written after them.
    """
    is_cut_short = any(any(folder.glob(".*.pth*.part")) for folder in (path, path / "spectra"))
    for name, num_more, mark in (("summary.csv", 1, b","), ("metrics.jsonl", 0, b'"kind": "eval"')):
        try:
            with (path / name).open("rb") as file:
                if sum(mark in line for line in file) > num_more + (_EPOCHS_UNSAVED if is_cut_short else 0):
                    return name
        except FileNotFoundError:
            continue
        except OSError:
            return name
    return ""


def _refuse_name_of_link(path: Path) -> None:
    if path.name == _LATEST:
        raise UserError(
            f"--experiment {_LATEST}: this is the name of the link to the latest run. Choose another, or leave out "
            "--experiment for a name with the time."
        )


def _unused(path: Path) -> Path:
    candidate, n = path, 1
    while candidate.exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


def _lock(path: Path) -> FolderLock:
    try:
        lock = lock_folder(path)
    except OSError as error:
        raise UserError(f"The run directory {path} cannot be written: {error.strerror}. Choose another.") from error
    if lock is None:
        raise UserError(
            f"The run directory {path} is in use by another process ({holder(path)}). Wait for it, stop it, or choose "
            "another --experiment."
        )
    return lock


def environment(device: torch.device) -> dict[str, Any]:
    """The environment of a run or a measurement: device, driver, versions, commit, and the command as typed."""
    result: dict[str, Any] = {
        "lowrank_vit": __version__,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": available_cores(),
        "cpu": cpu_name(),
        "device": str(device),
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[package] = metadata.version(package)
    if has_cuda():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        result["cuda"] = torch.version.cuda
        result["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return result


def environment_json(device: torch.device) -> str:
    """`environment` as indented JSON."""
    return json.dumps(environment(device), indent=2) + "\n"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    root = str(Path(__file__).resolve().parents[2])
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    return commit + "+changes" if commit and _output("git", "-C", root, "status", "--porcelain") else commit
