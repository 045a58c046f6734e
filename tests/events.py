"""What TensorBoard's own reader finds in the event files of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def _read(run_dir: Path, axis: str) -> Any:
    # Sizes of 0: everything is kept.
    reader = EventAccumulator(str(run_dir / "tensorboard" / axis), {"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def scalars(run_dir: Path, axis: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each metric, in the order in which they are drawn."""
    reader = _read(run_dir, axis)
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def texts(run_dir: Path, axis: str) -> list[str]:
    """The texts of all tags."""
    reader = _read(run_dir, axis)
    events = (event for tag in reader.Tags()["tensors"] for event in reader.Tensors(tag))
    return [event.tensor_proto.string_val[0].decode() for event in events]
