"""Unfinished predictions, kept beside their output file, so that a command that was killed can continue.

`.NAME.partial` is a folder beside NAME with `rows.csv` and `rows.json` (the rows of these files so far), `skipped`,
`key` (everything that decides a row) and `journal`. A line of the journal is written after its rows and counts only if
they still have its checksum, so neither SIGKILL nor a power failure brings wrong rows into the finished file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import remove_leftovers, whole_file, write_whole, writing
from lowrank_vit.common.locks import lock_folder
from lowrank_vit.ranks.agree import Record, differences
from lowrank_vit.score.results import csv_header

_SKIPPED, _JOURNAL, _KEY = "skipped", "journal", "key"
_GO_ON = "Make room or mend it, and give the same command again: it continues from the rows that are kept there."


@dataclass
class Part:
    """The rows and counts that one batch adds."""

    num_images: int = 0
    num_found: int = 0
    rows: dict[str, bytes] = field(default_factory=dict)
    """By suffix: rows of a table, or items of a JSON list, each after a comma."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files that are not images, with the reason."""
    stats: str = ""
    """See `listing.digest_of_stats`."""
    shown: list[str] = field(default_factory=list)
    """Lines for the terminal."""


class Kept:
    """Rows that are appended as batches finish. Made by `keeping`."""

    def __init__(self, folder: Path, suffixes: Sequence[str]) -> None:
        self.folder, self.num_images, self.num_found = folder, 0, 0
        self._names = [*(f"rows{suffix}" for suffix in suffixes), _SKIPPED]
        self._files = {name: (folder / name).open("a+b", buffering=0) for name in [*self._names, _JOURNAL]}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def go_on(self, is_same: Callable[[int, list[str]], bool]) -> None:
        """Take over the rows that are whole, and cut off the rest.

        `is_same`: tells whether the batches from the given image on still have these `Part.stats`.
        """
        journal = self._files[_JOURNAL]
        journal.seek(0)
        ends, end = dict.fromkeys(self._names, 0), 0
        for file in self._files.values():
            file.seek(0)
        with os.fdopen(os.dup(journal.fileno()), "rb") as lines, suppress(ValueError, TypeError, KeyError):
            for line in lines:
                num_images, num_found, sizes, digest, stats = json.loads(line)
                contents = [self._files[name].read(sizes[name] - ends[name]) for name in self._names]
                is_whole = line.endswith(b"\n") and xxhash.xxh3_64_hexdigest(b"".join(contents)) == digest
                if not is_whole or not is_same(self.num_images, stats):
                    break
                self.num_images, self.num_found, ends = num_images, num_found, sizes
                end += len(line)
        for name, size in {**ends, _JOURNAL: end}.items():
            self._files[name].truncate(size)
            self._files[name].seek(size)

    def add(self, parts: Sequence[Part]) -> None:
        """Append some batches, in order. Raises `UserError` if that fails; earlier rows stay."""
        skipped = "".join(json.dumps(one) + "\n" for part in parts for one in part.skipped)
        contents = [b"".join(part.rows.get(name.removeprefix("rows"), b"") for part in parts) for name in self._names]
        contents[-1] = skipped.encode()
        num_images = self.num_images + sum(part.num_images for part in parts)
        num_found = self.num_found + sum(part.num_found for part in parts)
        with writing(self.folder, _GO_ON):
            for name, content in zip(self._names, contents, strict=True):
                _write(self._files[name], content)
            sizes = {name: self._files[name].tell() for name in self._names}
            digest, stats = xxhash.xxh3_64_hexdigest(b"".join(contents)), [part.stats for part in parts if part.stats]
            line = json.dumps([num_images, num_found, sizes, digest, stats]) + "\n"
            _write(self._files[_JOURNAL], line.encode())
        self.num_images, self.num_found = num_images, num_found

    def finish(self, outputs: Sequence[Path], columns: Sequence[str]) -> None:
        """Write the files. `columns`: the table's; without images only `file` is written. Raises `UserError`."""
        failures = list[str]()
        for path in outputs:
            remove_leftovers(path.parent, path.name)
            write = self._write_json if path.suffix == ".json" else self._write_csv
            try:
                with whole_file(path) as file:
                    write(file, columns)
            except OSError as error:
                failures.append(f"{path} cannot be written: {error.strerror or error}.")
        if failures:
            raise UserError(" ".join([*failures, _GO_ON]))

    def _write_csv(self, file: BinaryIO, columns: Sequence[str]) -> None:
        file.write(csv_header(columns if self.num_found else columns[:1]))
        with (self.folder / "rows.csv").open("rb") as rows:
            shutil.copyfileobj(rows, file)

    def _write_json(self, file: BinaryIO, columns: Sequence[str]) -> None:
        file.write(b'{\n "predictions": [')
        with (self.folder / "rows.json").open("rb") as rows:
            rows.read(1)  # the comma before the first
            shutil.copyfileobj(rows, file)
        file.write(b'\n ],\n "skipped": {' if self.num_found else b'],\n "skipped": {')
        before = b"\n  "
        for name, reason in self._skipped():
            file.write(before + f"{json.dumps(name)}: {json.dumps(reason)}".encode())
            before = b",\n  "
        file.write(b"}\n}\n" if before == b"\n  " else b"\n }\n}\n")

    def _skipped(self) -> Iterator[tuple[str, str]]:
        """Each skipped file once, ordered by first occurrence, with its last reason."""

        def lines() -> Iterator[tuple[int, str, str]]:
            with (self.folder / _SKIPPED).open("rb") as file:
                for line in file:
                    name, reason = json.loads(line)
                    yield xxhash.xxh3_64_intdigest(os.fsencode(name)), name, reason

        codes, counts = np.unique(np.fromiter((code for code, _, _ in lines()), np.uint64), return_counts=True)
        twice = set(codes[counts > 1].tolist())
        reasons = {name: reason for code, name, reason in lines() if code in twice} if twice else {}
        for code, name, reason in lines():
            if code not in twice:
                yield name, reason
            elif name in reasons:
                yield name, reasons.pop(name)


def _write(file: Any, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


@contextmanager
def keeping(
    outputs: Sequence[Path], key: Record, is_same: Callable[[int, list[str]], bool], note: Callable[[str], object]
) -> Generator[Kept]:
    """Yield the rows kept for the first of the outputs; they are removed on success, and else stay for the next start.

    `key`: everything that decides the rows; rows with another key are dropped, and `note` is called with the reason. If
    nothing can be written beside the output (a pipe, a read-only folder) a temporary folder is used, from which nothing
    can be continued. Raises `UserError`.
    """
    target = outputs[0].resolve()
    can_stay = os.access(target.parent, os.W_OK) and (target.is_file() or not target.exists())
    folder = target.with_name(f".{target.name}.partial") if can_stay else Path(tempfile.mkdtemp())
    with writing(folder, "Give another --output."):
        folder.mkdir(exist_ok=True)
        lock = lock_folder(folder)
        if lock is None:
            raise UserError(f"another process is writing {outputs[0]}. Wait for it, or give another --output.")
        _begin_anew_where_changed(folder, key, outputs[0], note)
        kept = Kept(folder, sorted({path.suffix for path in outputs}))
    is_done = False
    try:
        with writing(folder, _GO_ON):
            kept.go_on(is_same)
        if kept.num_images:
            note(f"{kept.num_images:,} images were done before; continuing from there ({folder})")
        yield kept
        is_done = True
    except BaseException as error:
        if can_stay and kept.num_images:
            error.add_note(
                f"{kept.num_images:,} images are done and kept in {folder}; the same command continues from there. "
                "Remove that folder if you do not want that."
            )
        raise
    finally:
        kept.close()
        if is_done or not can_stay or not kept.num_images:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _begin_anew_where_changed(folder: Path, key: Record, output: Path, note: Callable[[str], object]) -> None:
    """Keep rows with the same key, remove others, and write the key of the rows that begin now."""
    ours: Mapping[str, list[str]] = {name: list(texts) for name, texts in key.items()}
    there: Any = None
    with suppress(OSError, ValueError):
        there = json.loads((folder / _KEY).read_bytes())
    if there == ours:
        return
    for name in (_JOURNAL, _SKIPPED, "rows.csv", "rows.json"):
        (folder / name).unlink(missing_ok=True)
    if isinstance(there, dict):
        note(
            f"the rows of {output} that an earlier start left are of other inputs, so it begins anew: "
            f"{differences(ours, there)}"
        )
    write_whole(folder / _KEY, json.dumps(ours))
