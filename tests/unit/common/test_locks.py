"""A lock is one process's, is waited for aloud, and is given back by a process that dies."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import LOCK, SOFT_LOCK, holder, is_locked, lock_folder, one_process_in, try_flock
from tests.waiting import LONG_S

HOLD = """
import sys
from pathlib import Path
from lowrank_vit.common.locks import lock_folder
held = lock_folder(Path(sys.argv[1]))
print(held is not None, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=[True, False], ids=["flock", "soft"])
def has_flock(request, monkeypatch) -> bool:
    if not request.param:

        def no_locks(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    return request.param


@pytest.mark.usefixtures("has_flock")
def test_one_holder_at_a_time(tmp_path):
    assert not is_locked(tmp_path)
    held = lock_folder(tmp_path)
    assert held is not None
    assert is_locked(tmp_path)
    assert lock_folder(tmp_path) is None
    assert holder(tmp_path).startswith("process ")
    held.release()
    held.release()
    assert not is_locked(tmp_path)
    again = lock_folder(tmp_path)
    assert again is not None
    again.release()


def test_another_process_holds_it_until_it_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        assert lock_folder(tmp_path) is None
        assert is_locked(tmp_path)
        assert holder(tmp_path).startswith(f"process {child.pid} on ")
        child.kill()
    held = lock_folder(tmp_path)
    assert held is not None
    held.release()


def test_a_soft_lock_of_a_dead_process_is_given_back(tmp_path):
    code = HOLD.replace("import sys\n", "import fcntl, sys\ndef no(*_): raise OSError(38, '')\nfcntl.flock = no\n", 1)
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        child.kill()
    assert (tmp_path / SOFT_LOCK).exists()
    with pytest.MonkeyPatch.context() as patch:

        def no_locks(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        patch.setattr(fcntl, "flock", no_locks)
        assert not is_locked(tmp_path)
        held = lock_folder(tmp_path)
        assert held is not None
        held.release()


@pytest.mark.usefixtures("has_flock")
def test_who_waits_says_so_once(tmp_path):
    said: list[str] = []
    waits, order = threading.Event(), list[int]()

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    def second() -> None:
        with one_process_in(tmp_path / "place", say, ""):
            order.append(2)

    thread = threading.Thread(target=second)
    with one_process_in(tmp_path / "place", pytest.fail, ""):
        thread.start()
        assert waits.wait(LONG_S)
        order.append(1)
    thread.join()
    assert order == [1, 2]
    assert len(said) == 1
    assert said[0].startswith("waiting for process ")
    assert said[0].endswith(f" to finish in {tmp_path / 'place'}")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    said = r"file/place cannot be written: Not a directory\. Give another\."
    with pytest.raises(UserError, match=said), one_process_in(tmp_path / "file" / "place", print, "Give another."):
        pass


def test_the_lock_is_given_back_on_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), one_process_in(tmp_path, print, ""):
        raise KeyboardInterrupt
    assert not is_locked(tmp_path)


@pytest.mark.usefixtures("has_flock")
def test_an_open_file(tmp_path, has_flock):
    path = tmp_path / LOCK
    with path.open("wb") as one, path.open("wb") as other:
        assert try_flock(one.fileno()) is (True if has_flock else None)
        assert try_flock(other.fileno()) is (False if has_flock else None)
    with path.open("wb") as third:
        assert try_flock(third.fileno()) is (True if has_flock else None)
