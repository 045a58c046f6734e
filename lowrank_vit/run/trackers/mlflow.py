"""MLflow: a database in the run directory, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import importlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_vit.run.trackers.tracker import About, Tracker, paths

FOLDER = "mlflow"
_METRICS_A_CALL, _PARAMS_A_CALL = 1000, 100
"""MLflow's limits per call."""
_NAME_LENGTH = 250
_REFUSED = re.compile(r"[^/\w.\- :]")
"""Characters that MLflow refuses in a name."""


class MlflowRun(Tracker):
    """One MLflow run; `client` is an `MlflowClient`, whose calls return when the server or database has the data."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.id = client, run_id
        self._names, self._held = dict[str, str](), dict[str, set[int]]()

    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Send one row, in as many calls as needed."""
        metric: Any = importlib.import_module("mlflow.entities").Metric
        now, step = int(time.time() * 1000), int(values[axis])
        metrics = [metric(self._name(name), float(value), now, step) for name, value in values.items() if name != axis]
        for first in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self.id, metrics=metrics[first : first + _METRICS_A_CALL])

    def _name(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = accepted(name)
        return self._names[name]

    def holds(self, name: str, step: int) -> bool:
        """Look into the metric's history, which is fetched once per metric."""
        if name not in self._held:
            history = self._client.get_metric_history(self.id, accepted(name))
            self._held[name] = {point.step for point in history}
        return step in self._held[name]

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Send a new run's configuration as parameters, named by their paths; MLflow allows to set them once."""
        param: Any = importlib.import_module("mlflow.entities").Param
        params = [param(accepted(name), str(value)) for name, value in paths(config, "")]
        for first in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self.id, params=params[first : first + _PARAMS_A_CALL])

    def finish(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self.id)


def accepted(name: str) -> str:
    """The name without characters that MLflow refuses. MLflow reads names as paths."""
    path = posixpath.normpath(_REFUSED.sub("_", name)[: _NAME_LENGTH - 1].strip("/") or "_")
    if path.startswith(".."):
        return path.replace("..", "_")
    return "_" if path == "." else path


def start(about: About, resume_id: str, say: Callable[[str], object]) -> Tracker:
    """Start a run, or continue the one of `resume_id` if it still exists."""
    exceptions: Any = importlib.import_module("mlflow.exceptions")  # heavy: only if requested
    tracking: Any = importlib.import_module("mlflow.tracking")
    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)  # otherwise a line for each table of a new database
    folder = about.run_dir / FOLDER
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        if "?" in str(folder):  # SQLAlchemy would read options after it, and put the database elsewhere
            raise ValueError(f"the database cannot be in {folder} because of its `?`: set MLFLOW_TRACKING_URI")
        folder.mkdir(exist_ok=True)
        uri = f"sqlite:///{folder}/mlflow.db"
    client = tracking.MlflowClient(tracking_uri=uri)
    if resume_id:
        try:
            client.update_run(resume_id, status="RUNNING")
        except exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            return MlflowRun(client, resume_id)
    experiment = client.get_experiment_by_name(about.project)
    where = experiment.experiment_id if experiment else client.create_experiment(about.project)
    tags = {accepted(tag): "true" for tag in about.tags}
    run = MlflowRun(client, client.create_run(where, tags=tags, run_name=about.name).info.run_id)
    run.log_config(about.config)
    return run
