"""trackio: in its own folder of this machine (TRACKIO_DIR), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL point."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lowrank_vit.run.trackers.tracker import About, Tracker


class TrackioRun(Tracker):
    """One trackio run. It says by itself, as a Python warning, what it could not write or send."""

    def __init__(self, run: Any) -> None:
        """`run` is trackio's own, which a resumed run finds by its name."""
        self._run, self.id = run, run.name

    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Queue one row. Its axis is among the values, too, since trackio draws any of them over any other."""
        self._run.log(dict(values), step=int(values[axis]))

    def holds(self, name: str, step: int) -> bool:
        """Look into the database on this machine; of another one nothing is known."""
        with suppress(Exception):  # a module of trackio's own, which another version may not have
            storage: Any = importlib.import_module("trackio.sqlite_storage")
            run, points = self._run, storage.SQLiteStorage.get_metric_values
            return bool(points(run.project, run.name, name, step=step, run_id=run.id))
        return False

    def finish(self) -> None:
        """Write what is queued."""
        self._run.finish()


def start(about: About, resume_id: str, say: Callable[[str], object]) -> Tracker:
    """Start a run, or go on with the newest one called `resume_id`."""
    library: Any = importlib.import_module("trackio")  # heavy: only where asked for
    return TrackioRun(
        library.init(
            project=about.project,
            name=resume_id or about.name,
            config={**about.config, "tags": list(about.tags)},
            resume="allow" if resume_id else "never",
            embed=False,
            auto_log_gpu=False,  # the names are those that every tracker gets
            auto_log_cpu=False,
        )
    )
