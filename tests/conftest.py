"""Markers, the GPU record, and small data that several rooms' tests share."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

# Each of several processes has its share of the cores: if it has all of them, small operations wait for one another's
# threads. torch reads this when it is imported, and so do the programs that tests start.
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(processes))))

os.environ.setdefault("WANDB__SERVICE_WAIT", "300")  # seconds: W&B's service starts late on a busy machine

import torch
from hypothesis import HealthCheck, settings

from data_prep.convert import convert_digits
from lowrank_vit.common.files import write_whole
from lowrank_vit.common.locks import FolderLock
from lowrank_vit.data.sets.beton import Beton
from tests.device_path import on_cuda_path as on_cuda_path

# A suite in the background inherits signals that are ignored, and hands that on to what its tests start.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# A change is judged by the same examples each time; `--hypothesis-profile=search` looks for new ones.
# How long one takes says nothing on a busy machine; what a fixture gives may be used by all of them.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("same", settings.get_profile("any machine"), derandomize=True, database=None)
settings.register_profile("search", settings.get_profile("any machine"), derandomize=False)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, help="write device, versions, commit and test results as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, skip tests marked gpu, unless LRV_REQUIRE_GPU=1 wants them to fail; without two, drop two_gpus."""
    if torch.cuda.device_count() < 2:
        left_out = [item for item in items if "two_gpus" in item.keywords]
        items[:] = [item for item in items if "two_gpus" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available() or os.environ.get("LRV_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _gpu_there(request: pytest.FixtureRequest) -> None:
    if "gpu" in request.keywords and not torch.cuda.is_available():
        pytest.fail("LRV_REQUIRE_GPU=1, but torch sees no CUDA device")


@pytest.fixture(scope="session")
def _written_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.photos import write_sets  # it loads scikit-learn

    return write_sets(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def sets(_written_sets: dict[str, Path]) -> Generator[dict[str, Path]]:
    """The sets of `photos.write_sets`, for tests that only read them; what is written beside one is removed."""
    folder = _written_sets["jpeg"].parent
    there = set(folder.iterdir())
    yield _written_sets
    for path in set(folder.iterdir()) - there:
        path.unlink()


@pytest.fixture
def beton(sets: dict[str, Path], tmp_path: Path) -> Beton:
    """A set of JPEGs, alone in the test's own folder."""
    path = tmp_path / "train.beton"
    path.write_bytes(sets["jpeg"].read_bytes())
    return Beton(path)


@pytest.fixture(autouse=True)
def _wandb_forgets() -> Generator[None]:
    """W&B remembers the settings of its first use in a process; the next test may have others."""
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


_HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


@pytest.fixture(autouse=True)
def _folders_of_a_failure_are_unlocked(request: pytest.FixtureRequest) -> Generator[None]:
    """What a test that failed left locked, such as a run directory, would be a warning in another test."""
    taken, take = WeakSet[FolderLock](), FolderLock.__init__

    def noted(lock: FolderLock, *given: Any) -> None:
        take(lock, *given)
        taken.add(lock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderLock, "__init__", noted)
        yield
    if request.node.stash.get(_HAS_FAILED, False):
        for lock in list(taken):
            lock.release()


class _Record:
    """Outcome, duration and figures of every test, and why it failed or was skipped; on disk after each of them.

    So what is known outlasts a run that is cut off; tests that it did not reach are "not run". Under xdist the
    controller alone keeps one.
    """

    def __init__(self, path: Path) -> None:
        from lowrank_vit.run.directory import environment

        self._path, self._results = path, {}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._content = {"environment": environment(device), "exit_status": "cut off", "tests": self._results}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self._expect(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect([item.nodeid for item in session.items])

    def _expect(self, ids: list[str]) -> None:
        for name in ids:
            self._results.setdefault(name, {"outcome": "not run"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._results[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.user_properties:
                self._results[report.nodeid]["figures"] = dict(report.user_properties)
            if report.failed:
                self._results[report.nodeid]["message"] = report.longreprtext[-4000:]
            elif report.skipped and isinstance(report.longrepr, tuple):
                self._results[report.nodeid]["message"] = report.longrepr[2].removeprefix("Skipped: ")
            self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._results[report.nodeid] = {"outcome": "not collected", "message": report.longreprtext[-4000:]}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self._content["exit_status"] = int(exitstatus)
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self._content, indent=2) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--gpu-record")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Record(path), "gpu_record")


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels without a layout, which take most of a picture's time, until `monkeypatch.undo()`."""
    monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None)
    monkeypatch.setattr("matplotlib.figure.Figure.set_dpi", lambda figure, _: setattr(figure, "dpi", 40))


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton and val.beton of the handwritten digits."""
    folder = tmp_path_factory.mktemp("digits")
    convert_digits(folder)
    return folder
