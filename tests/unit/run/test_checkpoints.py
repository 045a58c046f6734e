"""Checkpoints are written behind the run's back: what they hold is the state at the moment of saving."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Run
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.run import checkpoints as checkpoints_module
from lowrank_vit.run.checkpoints import IS_FINITE, LAST, Beside, Checkpoints, CheckpointWriter, write_checkpoint
from lowrank_vit.run.state import RunState
from tests.waiting import LONG_S

CPU = torch.device("cpu")


def content(value: float) -> dict:
    return {"state_dict": {"w": torch.full((3,), value)}, "optimizer": {"state": [{"m": torch.full((2,), value)}]}}


def value(path: Path) -> float:
    return float(read_checkpoint(path).content["state_dict"]["w"][0])


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, is_writing = threading.Event(), threading.Event()

    def slow(path, content):
        is_writing.set()
        assert may_write.wait(LONG_S)
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, CPU, print)
    state = content(1.0)
    writer.save(state)
    assert is_writing.wait(LONG_S)  # `save` has returned, the disk is at work
    assert writer.is_busy
    state["state_dict"]["w"].fill_(9.0)
    state["optimizer"]["state"][0]["m"].fill_(9.0)
    may_write.set()
    writer.close()
    assert value(tmp_path / LAST) == 1.0
    assert float(read_checkpoint(tmp_path / LAST).content["optimizer"]["state"][0]["m"][0]) == 1.0


def test_on_a_gpu_the_thread_fetches_a_copy_that_was_made_there(tmp_path, on_cuda_path):
    for name, way in (("cpu", nullcontext), ("cuda", on_cuda_path)):
        (tmp_path / name / "spectral").mkdir(parents=True)
        with way():
            writer = CheckpointWriter(tmp_path / name, CPU, print)
            state = content(0.3)
            writer.save(state, beside=Beside("spectral", "weights_00000007.pth", content(0.7)))
            state["state_dict"]["w"].fill_(9.0)
            writer.close()
    for file in (LAST, "spectral/weights_00000007.pth"):
        expected, found = (torch.load(tmp_path / name / file) for name in ("cpu", "cuda"))
        assert str(found) == str(expected)
    assert value(tmp_path / "cuda" / LAST) == pytest.approx(0.3)


def test_a_second_ctrl_c_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    may_write = threading.Event()

    def slow(path, content):
        assert may_write.wait(LONG_S)
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, CPU, print)
    checkpoints = Checkpoints(Run(), RunState(), lambda: content(1.0), writer)
    checkpoints.save()
    with pytest.raises(KeyboardInterrupt), checkpoints:
        raise KeyboardInterrupt
    assert writer.is_busy
    may_write.set()
    writer.close()


def test_one_file_has_all_its_names_and_old_ones_go(tmp_path):
    writer = CheckpointWriter(tmp_path, CPU, print)
    writer.save(content(1.0), ("model_best.pth.tar", "checkpoint-0.pth.tar", LAST))
    writer.save(content(2.0), ("checkpoint-1.pth.tar", LAST), obsolete=("checkpoint-0.pth.tar", "never.pth.tar"))
    writer.close()
    assert {path.name: value(path) for path in tmp_path.iterdir()} == {
        "model_best.pth.tar": 1.0,
        "checkpoint-1.pth.tar": 2.0,
        LAST: 2.0,
    }
    assert (tmp_path / LAST).samefile(tmp_path / "checkpoint-1.pth.tar")  # written once


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    writer = CheckpointWriter(tmp_path, CPU, print)
    writer.save(content(1.0), ("model_best.pth.tar", LAST))
    writer.close()
    assert {path.name: value(path) for path in tmp_path.iterdir()} == {"model_best.pth.tar": 1.0, LAST: 1.0}


def test_what_cannot_be_written_is_said_and_tried_again(tmp_path, monkeypatch):
    said: list[str] = []
    full = [False, True, False, True]

    def maybe(path, content):
        if full.pop(0):
            raise UserError(f"Checkpoint {path} cannot be written: disk full.")
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", maybe)
    writer = CheckpointWriter(tmp_path, CPU, said.append)
    for n in range(3):
        writer.save(content(n))
    writer.save(content(3.0), (LAST,), obsolete=(LAST,))
    with pytest.raises(UserError, match="disk full"):  # the newest is what counts
        writer.close()
    assert value(tmp_path / LAST) == 2.0  # and nothing is deleted for one that failed
    assert writer.settle() == [LAST, LAST]
    assert len(said) == 2
    assert said[-1] == "2 checkpoints could not be written; the first was reported above"
    assert said[0].startswith("warning: Checkpoint")


def test_a_bug_in_the_thread_reaches_the_user(tmp_path, monkeypatch):
    def broken(path, content):
        raise TypeError("cannot pickle that")

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", broken)
    writer = CheckpointWriter(tmp_path, CPU, lambda line: None)
    writer.save(content(0.0))
    with pytest.raises(UserError, match="TypeError: cannot pickle that"):
        writer.close()


@pytest.mark.parametrize("again_s", [0.0, 600.0])
def test_a_full_disk_is_said_once_until_there_is_room_again(tmp_path, monkeypatch, again_s):
    """And the same words not at once again: on a disk that is nearly full, small files succeed between large ones."""
    monkeypatch.setattr("lowrank_vit.common.errors._AGAIN_S", again_s)
    said: list[str] = []
    full = [True, True, False, True, True]

    def maybe(path, content):
        if full.pop(0):
            raise UserError("disk full.")
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", maybe)
    writer = CheckpointWriter(tmp_path, CPU, said.append)
    for n in range(5):
        writer.save(content(n), (f"{n}",))
    assert writer.settle() == ["0", "1", "3", "4"]
    assert writer.settle() == []
    assert said == ["warning: disk full. Training goes on."] * (1 if again_s else 2)


def test_only_names_that_were_not_written_are_lost(tmp_path, monkeypatch):
    link = checkpoints_module.link_whole

    def maybe(there, path):
        if path.name == "checkpoint-0.pth.tar":
            raise UserError("disk full.")
        link(there, path)

    monkeypatch.setattr(checkpoints_module, "link_whole", maybe)
    writer = CheckpointWriter(tmp_path, CPU, lambda line: None)
    writer.save(content(1.0), ("model_best.pth.tar", "checkpoint-0.pth.tar", LAST))
    assert writer.settle() == ["checkpoint-0.pth.tar", LAST]  # not `last`, which tells of both
    assert [path.name for path in tmp_path.iterdir()] == ["model_best.pth.tar"]


def test_a_state_that_is_not_finite_takes_no_files_place(tmp_path):
    said: list[str] = []
    writer = CheckpointWriter(tmp_path, CPU, said.append)
    writer.save({**content(1.0), IS_FINITE: torch.tensor(True)}, ("checkpoint-0.pth.tar", LAST))
    for _ in range(2):
        writer.save(
            {**content(float("nan")), IS_FINITE: torch.tensor(False)},
            ("model_best.pth.tar", LAST),
            obsolete=("checkpoint-0.pth.tar",),
        )
    with pytest.raises(UserError, match="has diverged"):
        writer.close()
    assert {path.name: value(path) for path in tmp_path.iterdir()} == {"checkpoint-0.pth.tar": 1.0, LAST: 1.0}
    assert len(said) == 1
    assert f"{tmp_path / LAST} has the state before" in said[0]
    assert "goes on" not in said[0]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), None])
def test_nothing_of_the_monitors_files_costs_a_checkpoint(tmp_path, monkeypatch, error):
    """A folder that cannot be looked into, or is a file."""
    said: list[str] = []
    exists = Path.exists

    def look(path):
        if error and "spectra" in path.parts:
            raise error
        return exists(path)

    (tmp_path / "spectra").write_text("")
    monkeypatch.setattr(Path, "exists", look)
    writer = CheckpointWriter(tmp_path, CPU, said.append)
    for n in range(2):
        writer.save(content(n), beside=Beside("spectra", f"weights_0000000{n}.pth", {"w": torch.zeros(1)}))
        assert writer.settle() == []
    writer.close()
    assert value(tmp_path / LAST) == 1.0
    reason = error.strerror if error else f"{tmp_path / 'spectra'} is a file: move it away"
    assert said == [
        "warning: the spectral monitor's state, needed after an interruption, could not be written to "
        f"{tmp_path / 'spectra'} ({reason}); checkpoints are not affected"
    ]


def test_only_older_files_of_the_same_kind_go(tmp_path):
    folder = tmp_path / "spectra"
    folder.mkdir()
    for name in ("weights_final.pth", "weights_00000001.pth", "weights_100000000.pth"):
        (folder / name).write_text("")
    writer = CheckpointWriter(tmp_path, CPU, print)
    writer.save(content(1.0), beside=Beside("spectra", "weights_00000002.pth", {"w": torch.zeros(1)}))
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["weights_00000002.pth", "weights_final.pth"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pth.tar"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(2)}})
    before = path.read_bytes()
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(UserError, match=r"last.pth.tar cannot be written: File too large\. The older"):
            write_checkpoint(path, {"state_dict": {"w": torch.zeros(1_000_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]


def test_a_full_disk_is_named(tmp_path):
    """A real one: a file system in memory, which takes the rights to mount it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        path = tmp_path / "last.pth.tar"
        write_checkpoint(path, {"state_dict": {"w": torch.zeros(2)}})
        with pytest.raises(UserError, match=r"cannot be written: No space left on device\. The older last.pth.tar is"):
            write_checkpoint(path, {"state_dict": {"w": torch.zeros(1_000_000)}})
        assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]
        assert len(read_checkpoint(path).content["state_dict"]["w"]) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_killed_in_the_middle_of_writing_the_old_file_is_there(tmp_path):
    code = f"""
import os, pathlib, signal, torch
from lowrank_vit.common import files
from lowrank_vit.run import checkpoints as checkpoint
path = pathlib.Path({str(tmp_path)!r}) / "last.pth.tar"
checkpoint.write_checkpoint(path, {{"state_dict": {{"w": torch.ones(3)}}}})
write = files._Output.write
def and_die(self, data):
    written = write(self, data)
    if self.tell() > 100_000:
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return written
files._Output.write = and_die
checkpoint.write_checkpoint(path, {{"state_dict": {{"w": torch.zeros(1_000_000)}}}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (unfinished,) = tmp_path.glob(".*.part")
    assert unfinished.stat().st_size > 100_000
    assert torch.equal(read_checkpoint(tmp_path / "last.pth.tar").content["state_dict"]["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("interval", "saved"),
    [
        ("", []),
        ("3", [3, 6, 9]),
        ("0.5m", [4, 8]),  # at the first line of the log that is so long after the one before
    ],
)
def test_a_checkpoint_is_due_by_updates_or_by_the_clock(monkeypatch, interval, saved):
    """An update takes 8 s, and there is a line of the log every other update."""
    now = [0.0]
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now[0])
    state, found = RunState(), []
    options = Run(checkpoint_interval=interval)
    checkpoints = Checkpoints(options, state, lambda: found.append(state.position.num_updates) or {}, None)
    for update in range(1, 10):
        now[0] += 8
        state.position.count_update()
        checkpoints.save_if_due(is_logged=update % 2 == 0)
    assert found == saved
