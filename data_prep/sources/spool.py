"""Rows of a stream, kept on the disk until they are converted: their labels must be known before the first is written.

The file holds the images' bytes one after the other; FILE.rows has a line for each. After a killed run, rows count as
far as their bytes are there.
"""

from __future__ import annotations

import json
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.jpeg import BadImageError
from data_prep.sources.rows import read_at
from data_prep.sources.samples import Sample
from lowrank_vit.common.files import write_whole


def rows_path(path: Path) -> Path:
    """Where the rows of the spool `path` are listed."""
    return path.with_name(path.name + ".rows")


class Spool:
    """The rows so far; a context that appends to them."""

    def __init__(self, path: Path, key: str) -> None:
        """Resume the spool at `path` if its first line is `key`; else begin a new one. Raises `OSError`."""
        self._path, self._ends = path, array("q")
        self.labels: list[Any] = []
        self.paths: list[str | None] = []
        self.errors: dict[int, str] = {}
        """Why a row has no image, by row."""
        self._codes = array("Q")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._take_over(key)
        lines = [key, *(self._line(row) for row in range(len(self)))]
        write_whole(rows_path(path), "".join(f"{line}\n" for line in lines))
        with path.open("ab") as data:
            data.truncate(self._ends[-1] if self._ends else 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __enter__(self) -> Spool:
        self._data, self._lines = self._path.open("ab"), rows_path(self._path).open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
        self._lines.close()

    def append(self, content: bytes, path: str | None, label: Any, error: str) -> None:
        """Add a row: its image's bytes, the name of its file, its label, and why it has no image (or "")."""
        self._data.write(content)
        self._note(len(content), xxhash.xxh3_64_intdigest(content), path, label, error)
        self._lines.write(self._line(len(self) - 1) + "\n")

    def read(self, sample: Sample) -> bytes:
        """See `RowSource.read`."""
        start = self._ends[sample.row - 1] if sample.row else 0
        content = read_at(self._path, start, self._ends[sample.row] - start, sample.name)
        if xxhash.xxh3_64_intdigest(content) != self._codes[sample.row]:
            raise BadImageError(sample.name, f"is damaged in {self._path}: remove that file and begin again")
        return content

    def _note(self, size: int, code: int, path: str | None, label: Any, error: str) -> None:
        if error:
            self.errors[len(self)] = error
        self._ends.append((self._ends[-1] if self._ends else 0) + size)
        self._codes.append(code)
        self.paths.append(path)
        self.labels.append(label)

    def _line(self, row: int) -> str:
        size = self._ends[row] - (self._ends[row - 1] if row else 0)
        return json.dumps(
            [size, self._codes[row], self.paths[row], self.labels[row], self.errors.get(row, "")], default=str
        )

    def _take_over(self, key: str) -> None:
        with suppress(OSError, ValueError, TypeError):  # stop at a line that was cut off
            there = self._path.stat().st_size
            first, *lines = rows_path(self._path).read_text().split("\n")
            for line in lines[:-1] if first == key else ():
                size, *rest = json.loads(line)
                if (self._ends[-1] if self._ends else 0) + size > there:
                    return
                self._note(size, *rest)
