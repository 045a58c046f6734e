"""What W&B wrote to its own file of a run: a log of protobuf records in the format of LevelDB's logs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from tests.waiting import wait_until

_BLOCK, _PREFIX_BYTES = 32768, 7
_HEADER = struct.Struct("<IHB")
"""Checksum, length, and whether the piece is a whole record (1), its first (2), middle (3) or last part (4)."""


def run_files(wandb_dir: Path, count: int = 1) -> list[Path]:
    """The files of so many offline runs that have ended, once they are whole, in the order of the runs.

    W&B's service, a process of its own, is told of a run's end and writes the rest after that.
    """

    def are_whole() -> list[Path]:
        found = sorted(wandb_dir.glob("offline-run-*/run-*.wandb"))
        assert len(found) <= count
        whole = [path for path in found if any(one.WhichOneof("record_type") == "exit" for one in _records(path))]
        return whole if len(whole) == count else []

    return wait_until(are_whole, "the end of W&B's files")


def logged_rows(wandb_dir: Path) -> list[dict[str, Any]]:
    """The rows that one offline run logged, with the axes that W&B put in, without its own `_step` and the like."""
    (path,) = run_files(wandb_dir)
    rows = []
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def _records(path: Path) -> Iterator[Any]:
    """Those that are whole."""
    content, position, piece = path.read_bytes(), _PREFIX_BYTES, b""
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        if position + length > len(content):
            return
        piece += content[position : position + length]
        position += length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(piece)  # type: ignore[attr-defined]  # made at import
            piece = b""
