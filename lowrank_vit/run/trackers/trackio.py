"""trackio: in its own folder of this machine (TRACKIO_DIR), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL point."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lowrank_vit.run.trackers.tracker import About, Tracker


class TrackioRun(Tracker):
    """One trackio run. trackio itself reports failures to write or send, as Python warnings."""

    def __init__(self, run: Any) -> None:
        """`run` is trackio's own object; a resumed run finds it by name."""
        self._run, self.id = run, run.name

    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Queue one row, including its axis, since trackio can plot any value over any other."""
        self._run.log(dict(values), step=int(values[axis]))

    def holds(self, name: str, step: int) -> bool:
        """Look into this machine's database; False for a run on another machine."""
        with suppress(Exception):  # an internal module, which other versions may lack
            storage: Any = importlib.import_module("trackio.sqlite_storage")
            run, points = self._run, storage.SQLiteStorage.get_metric_values
            return bool(points(run.project, run.name, name, step=step, run_id=run.id))
        return False

    def finish(self) -> None:
        """Write what is queued."""
        self._run.finish()


def start(about: About, resume_id: str, say: Callable[[str], object]) -> Tracker:
    """Start a run, or continue the latest one named `resume_id`."""
    library: Any = importlib.import_module("trackio")  # heavy: only if requested
    return TrackioRun(
        library.init(
            project=about.project,
            name=resume_id or about.name,
            config={**about.config, "tags": list(about.tags)},
            resume="allow" if resume_id else "never",
            embed=False,
            auto_log_gpu=False,  # all trackers get the same names
            auto_log_cpu=False,
        )
    )
