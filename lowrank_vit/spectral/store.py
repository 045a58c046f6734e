"""The spectra on disk: one `update_00000100.npz` a refresh, holding "update" and a float64 array per "<kind>/<module>".

Kinds are "spec" (the model) and "spec_ema" (its moving average). A file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError


class StoredSpectra(NamedTuple):
    """One refresh: the update it was taken at, and "<kind>/<module>" to (K,) float64 singular values, descending."""

    update: int
    spectra: dict[str, np.ndarray]


def write_spectra(store_dir: Path, update: int, spectra: Mapping[str, np.ndarray]) -> Path:
    """Write one refresh, replacing an earlier one of the same update; return its path.

    Raises:
        UserError: the directory cannot be written (full, read-only, gone).
    """
    path = store_dir / f"update_{update:08d}.npz"
    partial = path.with_suffix(".npz.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, update=np.int64(update), **spectra)
            file.flush()
            os.fsync(file.fileno())  # a full or remote disk may report only here; better now than a torn file later
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot store the spectra of update {update} in {store_dir}: {error.strerror or error}. "
            "Free some space or choose a writable output directory, then resume."
        ) from error
    return path


def list_spectra(store_dir: Path) -> list[Path]:
    """The stored refreshes in the order of their updates; empty when there is no such directory."""
    return sorted(store_dir.glob("update_*.npz"), key=lambda path: (len(path.name), path.name))


def read_spectra(path: Path) -> StoredSpectra:
    """Read one refresh, modules in model order.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        # Opened here: np.load leaves the file open when it finds the archive damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            spectra = {key: stored[key] for key in stored.files if key != "update"}
            return StoredSpectra(int(stored["update"]), spectra)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the spectra in {path}: {error}") from error
