"""The trackers' libraries as far as they are called, in place of the real ones: they note, raise or hang."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import wandb

NAMES = ("wandb", "tensorboard", "trackio", "mlflow")


class Library:
    """What one library was told. `failing` and `hangs` are by what it does: start, log or finish."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failing = dict[str, BaseException]()
        self.hangs = dict[str, threading.Event]()
        self.rows: list[dict[str, Any]] = []
        """Each with its place on its axis as `step`, where the library is told that."""
        self.begun: list[dict[str, Any]] = []
        """What runs were started with."""
        self.tables: list[Any] = []
        self.is_finished = False

    def meet(self, what: str) -> None:
        """Something is asked of it."""
        if what in self.hangs:
            self.hangs[what].wait()
        if what in self.failing:
            raise self.failing[what]

    def begin(self, **told: Any) -> str:
        """A run is started, or goes on under the id that is asked for; its id."""
        self.meet("start")
        self.begun.append(told)
        return told.get("id") or "abc123"

    def take(self, row: dict[str, Any], step: int | None = None) -> None:
        """A row comes."""
        self.meet("log")
        self.rows.append(row if step is None else {"step": step, **row})

    def finish(self) -> None:
        """The run ends."""
        self.meet("finish")
        self.is_finished = True


def fake(name: str, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put a fake in the place of the library of that name."""
    library = Library(name)
    {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio, "mlflow": _mlflow}[name](library, monkeypatch)
    return library


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def _wandb(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**told: Any) -> Any:
        run_id = library.begin(**told)
        calls = {"define_metric": lambda *_, **__: None, "log_artifact": library.tables.append}
        return SimpleNamespace(id=run_id, log=library.take, finish=library.finish, **calls)

    monkeypatch.setattr(wandb, "init", init)


def _tensorboard(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    class SummaryWriter:
        def __init__(self, folder: str, **options: Any) -> None:
            library.begin(folder=folder, **options)
            self.file_writer = SimpleNamespace(add_summary=self.add_summary)

        def add_text(self, tag: str, text: str, step: int) -> None:
            library.begun[-1] |= {"config": text}

        def add_summary(self, summary: Any, step: int) -> None:
            library.take({one.tag: one.simple_value for one in summary.value}, step)

        def close(self) -> None:
            library.finish()

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", SummaryWriter)


def _trackio(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*, project: str, name: str, resume: str, **told: Any) -> Any:
        known = {"id": name} if resume == "allow" else {}
        run_id = library.begin(project=project, name=name, **known, **told)
        return SimpleNamespace(id="7", name=run_id, project=project, log=library.take, finish=library.finish)

    def get_metric_values(project: str, run: str, name: str, step: int, run_id: str) -> list[Any]:
        return [row for row in library.rows if row["step"] == step and name in row]

    _module(monkeypatch, "trackio", init=init)
    storage = SimpleNamespace(get_metric_values=get_metric_values)
    _module(monkeypatch, "trackio.sqlite_storage", SQLiteStorage=storage)


def _mlflow(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    class MlflowException(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    class MlflowClient:
        def __init__(self, tracking_uri: str) -> None:
            self.uri = tracking_uri

        def get_experiment_by_name(self, name: str) -> Any:
            self.project = name

        def create_experiment(self, name: str) -> str:
            return "1"

        def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
            run_id = library.begin(project=self.project, name=run_name, tags=list(tags), uri=self.uri, config={})
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

        def update_run(self, run_id: str, status: str) -> None:
            if run_id == "not there":
                raise MlflowException(f"No run {run_id}")
            library.begin(id=run_id)

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(metrics) <= 1000
            assert len(params) <= 100
            if params:
                library.begun[-1]["config"] |= {one.key: one.value for one in params}
            for step in {one.step for one in metrics}:
                library.take({one.key: one.value for one in metrics}, step)

        def get_metric_history(self, run_id: str, key: str) -> list[Any]:
            return [SimpleNamespace(step=row["step"]) for row in library.rows if key in row]

        def set_terminated(self, run_id: str) -> None:
            library.finish()

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, step=step)

    _module(monkeypatch, "mlflow")
    _module(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)
    _module(monkeypatch, "mlflow.exceptions", MlflowException=MlflowException)
    param = lambda key, value: SimpleNamespace(key=key, value=value)  # noqa: E731
    _module(monkeypatch, "mlflow.entities", Metric=metric, Param=param)
