"""What W&B wrote to its own file of a run: a log of protobuf records in the format of LevelDB's logs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _PREFIX_BYTES = 32768, 7
_HEADER = struct.Struct("<IHB")
"""Checksum, length, and whether the piece is a whole record (1), its first (2), middle (3) or last part (4)."""


def logged_rows(wandb_dir: Path) -> list[dict[str, Any]]:
    """The rows that one offline run logged, with the axes that W&B put in, without its own `_step` and the like."""
    (path,) = wandb_dir.glob("offline-run-*/run-*.wandb")
    content, position, piece, rows = path.read_bytes(), _PREFIX_BYTES, b"", []
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        piece += content[position : position + length]
        position += length
        if kind in (1, 4):
            record: Any = wandb_internal_pb2.Record.FromString(piece)  # type: ignore[attr-defined]  # made at import
            piece = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows
