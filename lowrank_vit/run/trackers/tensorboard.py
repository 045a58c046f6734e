"""TensorBoard: event files in the run directory, without an account or a server."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_vit.run.trackers.tracker import About, Tracker

FOLDER = "tensorboard"
_FLUSH_S = 10
"""Largest delay in seconds until a row is in its file."""


class EventFiles(Tracker):
    """Event files in `tensorboard/epoch`, `tensorboard/update` and `tensorboard/spec_update`.

    Each axis has its own folder, since TensorBoard has one step axis per folder, and since a resumed run removes on
    each axis what was written after its checkpoint.
    """

    def __init__(self, about: About) -> None:
        """Write the configuration first, so that a folder that cannot be written is noticed at the start."""
        self._about, self._writers = about, dict[str, Any]()
        shown = json.dumps({**about.config, "tags": about.tags}, indent=2, default=str)
        text = "".join(f"    {line}\n" for line in shown.splitlines())  # a block of code in Markdown
        self._writer("update").add_text("config", text, about.goes_on_at.get("update", 0))

    def _writer(self, axis: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if axis not in self._writers:
            folder = str(self._about.run_dir / FOLDER / axis)
            purge_step = self._about.goes_on_at.get(axis)
            self._writers[axis] = SummaryWriter(folder, purge_step=purge_step, flush_secs=_FLUSH_S)
        return self._writers[axis]

    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Write one event with all values: separate events for thousands of values take twenty times as long."""
        protocol: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        one = protocol.Summary.Value
        points = [one(tag=name, simple_value=value) for name, value in values.items() if name != axis]
        self._writer(axis).file_writer.add_summary(protocol.Summary(value=points), int(values[axis]))

    def finish(self) -> None:
        """Write the remaining events."""
        for writer in self._writers.values():
            writer.close()


def start(about: About, resume_id: str, say: Callable[[str], object]) -> Tracker:
    """Start new event files beside the existing ones."""
    return EventFiles(about)
