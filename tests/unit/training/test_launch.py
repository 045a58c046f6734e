"""An attempt finds the run directory of the attempts before it, and of no other launch."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.flags import parse
from lowrank_vit.ranks.world import World
from lowrank_vit.run.checkpoints import write_checkpoint
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.state import Position, RunState
from lowrank_vit.training import launch
from lowrank_vit.training.resume import Start, find_start, finished, open_run_dir


@pytest.fixture(autouse=True)
def another_process(monkeypatch):
    """Each attempt is a process of its own, and all are children of one agent."""
    pids = iter(range(10_000_000))
    monkeypatch.setattr(launch, "_process", lambda pid: f"agent {pid}" if pid == os.getppid() else f"{next(pids)}")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "the same for all")


def work_in(folder: Path, agents: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / launch.MARK).write_text(launch.mark(folder, agents))


def test_agents_may_come_and_go(tmp_path):
    def found(*agents: str) -> Path | None:
        return launch.earlier_folder(tmp_path, "", None, list(agents))

    assert found("a", "b") is None
    work_in(tmp_path / "run", ["a", "b"])
    assert found("b", "c") == tmp_path / "run"  # a is lost, c came instead
    work_in(tmp_path / "run", ["b", "c"])
    assert found("c") == tmp_path / "run"
    assert found("d", "e") is None  # another launch, of the same --rdzv-id
    assert found() is None  # no torchrun


def test_of_several_the_experiment_or_the_newest(tmp_path):
    for age, name in ((30, "one"), (20, "two"), (10, "three")):
        work_in(tmp_path / name, ["other" if name == "three" else "a"])
        os.utime(tmp_path / name / launch.MARK, (1e9 - age, 1e9 - age))
    (tmp_path / "latest").symlink_to("two")
    assert launch.earlier_folder(tmp_path, "", None, ["a"]) == tmp_path / "two"
    assert launch.earlier_folder(tmp_path, "one", None, ["a"]) == tmp_path / "one"
    assert launch.earlier_folder(tmp_path, "three", None, ["a"]) is None
    assert launch.earlier_folder(tmp_path, "no[*]", None, ["a"]) is None


def test_two_runs_of_one_process_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_process", lambda pid: "this one")
    work_in(tmp_path / "run", ["a"])
    assert launch.earlier_folder(tmp_path, "", None, ["a"]) is None


def test_two_trainings_that_one_command_of_torchrun_starts_are_two(tmp_path, monkeypatch):
    """Of one script, one after the other. After a restart each finds its own directory again, whichever is newer."""
    attempts = [Namespace(pid=-1), Namespace(pid=-2)]
    own_name = launch._process
    monkeypatch.setattr(launch, "_process", lambda pid: f"script {pid}" if pid < 0 else own_name(pid))
    one, two, three = ([f"--output={tmp_path}", "--data-dir", name] for name in ("a", "b", "c"))

    def train(command: list[str], script: Namespace) -> tuple[Start, RunDir]:
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        monkeypatch.setattr(launch, "launched", lambda: script)
        return attempt(tmp_path, *command[1:])

    _, first = train(one, attempts[0])
    save(first.path / "last.pth.tar", 5)
    start, second = train(two, attempts[0])
    assert start.resumed is None
    assert second.path != first.path
    save(second.path / "last.pth.tar", 3)
    os.utime(first.path / launch.MARK, (1, 1))
    start, found = train(one, attempts[1])
    assert (updates(start), found.path) == (5, first.path)
    start, found = train(two, attempts[1])
    assert (updates(start), found.path) == (3, second.path)
    start, found = train(three, attempts[1])
    assert start.resumed is None
    assert found.path not in (first.path, second.path)


def test_a_run_that_was_over_when_torchrun_began_again_is_not_the_next_one(tmp_path, monkeypatch):
    """The script's second training had not begun when it was killed."""
    scripts = {-1: "before", -2: "now"}
    monkeypatch.setattr(launch, "_process", lambda pid: scripts[pid])
    state = RunState(Position(epoch=99, num_updates=990)).state_dict()

    def command(*more: str) -> list[str]:
        line = [f"--output={tmp_path}", "--epochs=20", *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *line])
        return line[1:]

    monkeypatch.setattr(launch, "_agent", lambda: "an agent")
    monkeypatch.setattr(launch, "launched", lambda: Namespace(pid=-1))
    _, first = attempt(tmp_path, *command())
    save(first.path / "last.pth.tar", 990, state)
    monkeypatch.setattr("lowrank_vit.training.resume.check_state", lambda resumed: None)  # it is not a whole one
    monkeypatch.setattr("lowrank_vit.training.resume.check_counts", lambda resumed, updates: None)
    monkeypatch.setattr(launch, "launched", lambda: Namespace(pid=-2))
    start = find_start(parse([f"--output={tmp_path}", *command()]), World())
    assert start.resumed is not None
    assert finished(start, World()) is not None
    start, second = attempt(tmp_path, *command("--seed=7"))
    assert start.resumed is None
    assert second.path != first.path


def test_a_node_that_came_later_may_have_another_command_line(tmp_path, monkeypatch):
    """Its data are elsewhere, and it has rank 0 now."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir=/a"])
    work_in(tmp_path / "run", ["a", "b"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir=/b"])
    assert launch.earlier_folder(tmp_path, "", None, ["b", "c"]) == tmp_path / "run"


def test_processes_have_names_of_their_own(monkeypatch):
    monkeypatch.undo()
    names = {launch._process(pid) for pid in (os.getpid(), os.getppid(), 1)}
    assert len(names) == 3
    assert launch._process(os.getpid()) in names
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch.names(World()) == []


def test_a_process_whose_starter_is_hidden_has_no_agent(monkeypatch):
    """As in a container: its name is then that in the store alone."""
    monkeypatch.setattr(launch, "agent", lambda: None)
    assert launch.names(World(launch="of the store")) == ["of the store"]


def test_a_restart_is_known_by_the_name_in_the_store_alone(tmp_path, monkeypatch):
    """And by an agent that has stayed where the store was lost with its node."""
    monkeypatch.setattr(launch, "_agent", lambda: "")
    _, run_dir = attempt(tmp_path, launch="one")
    save(run_dir.path / "last.pth.tar", 5)
    assert updates(attempt(tmp_path, launch="one")[0]) == 5
    monkeypatch.setattr(launch, "_agent", lambda: "an agent")
    assert updates(attempt(tmp_path, launch="one")[0]) == 5
    assert updates(attempt(tmp_path, launch="another store")[0]) == 5
    monkeypatch.setattr(launch, "_agent", lambda: "another agent")
    start, other = attempt(tmp_path, launch="another launch")
    assert start.resumed is None
    assert other.path != run_dir.path


@pytest.mark.parametrize(
    "mark",
    [
        '{"agents": ["node/boot/12/34"], "process": "x", "found": null}',  # of an earlier version
        '{"agents": 5, "process": "x", "found": null}',
        '{"agents": null}',
        "[1]",
        "{",
    ],
)
def test_other_marks_are_read_without_harm(tmp_path, mark):
    run = tmp_path / "run"
    run.mkdir()
    (run / launch.MARK).write_text(mark)
    assert launch.earlier_folder(tmp_path, "", None, ["a"]) is None
    found = launch.earlier_folder(tmp_path, "", None, ["node/boot/12/34"])
    assert found == (run if "node" in mark else None)


def attempt(tmp_path: Path, *more: str, launch: str = "") -> tuple[Start, RunDir]:
    start = find_start(parse(["--output", str(tmp_path), *more]), World(launch=launch))
    run_dir = open_run_dir(start, "run")
    run_dir.close()
    return start, run_dir


def save(path: Path, updates: int, progress: dict[str, Any] | None = None) -> Path:
    import torch

    of_a_run = {"optimizer": {}, "progress": progress or {}, "data": {}, "step": {"num_updates": updates}}
    of_a_run["args"] = {"seed": 42}
    of_a_run[meaning.KEY] = meaning.now()
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(1)}, **of_a_run})
    return path


def updates(start: Start) -> int:
    assert start.resumed is not None
    return start.resumed.content["step"]["num_updates"]


def test_a_restart_goes_on_from_what_this_launch_has_saved(tmp_path):
    first, run_dir = attempt(tmp_path)
    assert first.resumed is None
    again, same = attempt(tmp_path)
    assert (again.resumed, same.path) == (None, run_dir.path)
    save(run_dir.path / "last.pth.tar", 5)
    assert updates(attempt(tmp_path)[0]) == 5
    assert updates(attempt(tmp_path)[0]) == 5


@pytest.mark.parametrize("name", ["last.pth.tar", "checkpoint-3.pth.tar"])
def test_with_resume_too(tmp_path, name):
    """First from the file of --resume, whatever last.pth.tar is there; then from this launch's own, not from there."""
    run = tmp_path / "elsewhere"
    run.mkdir()
    save(run / "last.pth.tar", 100)
    given = save(run / name, 30)
    options = "--output", str(tmp_path / "output"), "--resume", str(given)
    for _ in range(3):
        start, run_dir = attempt(tmp_path, *options)
        assert (updates(start), run_dir.path) == (30, run)
    save(run / "last.pth.tar", 40)
    for _ in range(2):
        assert updates(attempt(tmp_path, *options)[0]) == 40
    save(run / "last.pth.tar", 50)
    assert updates(attempt(tmp_path, *options)[0]) == 50


def test_a_rank_that_sees_another_file_says_so(tmp_path, monkeypatch):
    """Each node has a disk of its own."""
    config = parse(["--resume", str(tmp_path / "last.pth.tar")])
    given = iter([[], (config.run.resume, None), (1000, 12)])
    monkeypatch.setattr(World, "from_first", lambda self, value: next(given))
    monkeypatch.setattr(World, "gather_on_first", lambda self, value: None)
    monkeypatch.setattr(World, "gather", lambda self, value: [value])
    with pytest.raises(UserError, match=r"On .*last\.pth\.tar does not exist.* Rank 0 could read .* all nodes see"):
        find_start(config, World(rank=1, size=2))
    size = save(tmp_path / "last.pth.tar", 11).stat().st_size
    given = iter([[], (config.run.resume, None), (size, 12)])
    with pytest.raises(UserError, match=rf"is not the file .* \({size}, 11\) here and \({size}, 12\)"):
        find_start(config, World(rank=1, size=2))


@pytest.mark.parametrize(
    "foreign",
    [
        {"model": {"w": torch.zeros(1)}, "step": 1000},
        {"state_dict": {"w": torch.zeros(1)}, "step": None},
        {"state_dict": {"w": torch.zeros(1)}, "optimizer": {}, "progress": 0.5, "step": {}, "data": {}},
    ],
)
def test_a_file_of_another_program_is_refused_by_what_it_lacks(tmp_path, foreign):
    torch.save(foreign, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be resumed: it lacks `"):
        find_start(parse(["--resume", str(tmp_path / "w.pth")]), World())
