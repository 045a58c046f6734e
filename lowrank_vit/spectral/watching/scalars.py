"""The scalars of a run's refreshes, from the store's files or from lines of `metrics.jsonl` that hold all scalars.

Runs of earlier versions have only such lines, and runs with `--spec-log all` have both.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.watching.files import StoredScalars, is_full, list_scalars, read_scalars, update_of

LOG = "metrics.jsonl"
_LINE = re.compile(rb'\{"kind": "spec", "update": (\d+)')
_OF_MATRIX = re.compile(rb'"spec(?:_ema)?/(?!type/|depth/|refresh/)')
_FIRST_ALONE = b'"spec/refresh/full": 0.0'


class ScalarHistory:
    """The refreshes whose scalars were there when this was made; the numbers are read when they are asked for."""

    def __init__(self, store_dir: Path) -> None:
        """`store_dir`: the store; if it is `spectra/` of a run, the run's `metrics.jsonl` is read as well."""
        self.path = store_dir
        self._files = {update_of(file): file for file in list_scalars(store_dir)}
        self._log = store_dir.parent / LOG if store_dir.name == "spectra" else None

    @cached_property
    def _lines(self) -> dict[int, tuple[int, bool]]:
        """The lines with scalars of each matrix, by update: where the line begins, and whether its spectra are whole.

        The last line of an update counts.
        """
        found: dict[int, tuple[int, bool]] = {}
        with contextlib.suppress(OSError):
            if self._log is not None:
                with self._log.open("rb") as file:
                    at = 0
                    for line in file:
                        head = _LINE.match(line)
                        if head and line.endswith(b"}\n") and _OF_MATRIX.search(line):
                            found[int(head[1])] = at, _FIRST_ALONE not in line
                        at += len(line)
        return found

    @property
    def updates(self) -> list[int]:
        """The updates whose scalars are there, ascending."""
        return sorted({*self._files, *self._lines})

    @property
    def full_updates(self) -> list[int]:
        """The `updates` at which the whole spectra were computed, ascending."""
        return [u for u in self.updates if (is_full(self._files[u]) if u in self._files else self._lines[u][1])]

    def read(self, update: int) -> StoredScalars:
        """The scalars of one refresh. Raises `UserError` if there are none, or if they are gone or damaged."""
        if update not in self._files and update not in self._lines:
            some = ", ".join(map(str, self.updates[:8])) or "none"
            raise UserError(f"{self.path} has no scalars of update {update}. There are {some}.")
        try:
            if update in self._files:
                return read_scalars(self._files[update])
        except UserError:
            if update not in self._lines:
                raise
        return self._read_line(update)

    def _read_line(self, update: int) -> StoredScalars:
        assert self._log is not None
        at, full = self._lines[update]
        try:
            with self._log.open("rb") as file:
                file.seek(at)
                record: dict[str, Any] = json.loads(file.readline())
            values = {name: value for name, value in record.items() if "/" in name}
            return StoredScalars.of(update, values, full=full)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read the line of update {update} in {self._log}: {error}") from error


def columns_of(refreshes: Iterable[StoredScalars], metrics: Collection[str] = ()) -> dict[str, np.ndarray]:
    """One table of several refreshes, by column: a row for each of their rows, in order.

    Args:
        refreshes: any number of them; their rows and columns may differ.
        metrics: the metrics wanted; default: all.

    Returns:
        "update" int64; "ema" bool, whether the row is of the moving average; "name" of the matrix, or "type/attn.qkv",
        "depth/3", "circuit/blocks.0"; and each metric float64, NaN where a row has none.
    """
    found = list(refreshes)
    names = dict.fromkeys(m for one in found for m in one.metrics if not metrics or m in metrics)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for one in found:
        at = {metric: column for column, metric in enumerate(one.metrics)}
        for name, columns in parts.items():
            columns.append(one.values_NM[:, at[name]] if name in at else np.full(len(one.keys), np.nan))
    kinds = [key.partition("/") for one in found for key in one.keys]
    keys: dict[str, np.ndarray] = {
        "update": np.repeat(np.array([one.update for one in found], np.int64), [len(one.keys) for one in found]),
        "ema": np.array([kind == "spec_ema" for kind, _, _ in kinds], bool),
        "name": np.array([name for *_, name in kinds], str),
    }
    return keys | {name: np.concatenate(columns) for name, columns in parts.items()}
