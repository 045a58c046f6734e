"""Files and folders are there whole or not at all, and only what killed processes have left is removed."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.common import files
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import (
    append_whole,
    link_whole,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_all,
    write_whole,
    writing,
)
from lowrank_vit.common.terminal import as_bytes, one_line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        assert len(names(tmp_path)) == 2
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


ANY_NAME = b"\xff\x1b \xed\xa0\x80 \xc3\xa4".decode("utf-8", "surrogateescape") + "\ud800\udfff"


def test_text_may_hold_any_name():
    assert as_bytes(ANY_NAME) == b"\xff\x1b \xed\xa0\x80 \xc3\xa4\\ud800\\udfff"
    assert one_line(ANY_NAME) == r"\xff\x1b \xed\xa0\x80 ä\ud800\udfff"
    name = os.fsdecode(bytes(range(1, 256)))
    assert os.fsdecode(as_bytes(name)) == name


def test_each_file_is_written_however_many_of_them_fail(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "folder").mkdir()

    def broken() -> bytes:
        raise RuntimeError("no fonts")

    contents = {"full": lambda: "a", "folder": lambda: "a", "picture": broken, "last": lambda: ANY_NAME}
    with pytest.raises(UserError) as caught:
        write_all({tmp_path / name: content for name, content in contents.items()})
    full, folder, picture = (f"{tmp_path / name} cannot be written: " for name in ("full", "folder", "picture"))
    reasons = "No space left on device.", "Is a directory.", "RuntimeError: no fonts."
    assert str(caught.value) == " ".join(map("".join, zip((full, folder, picture), reasons, strict=True)))
    assert (tmp_path / "last").read_bytes() == as_bytes(ANY_NAME)


def test_a_device_or_a_pipe_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "a")
    write_whole(Path(os.devnull), "a")
    assert os.read(reading, 9) == b"a"
    assert not Path(os.devnull).is_file()


def test_a_line_is_added_whole(tmp_path):
    append_whole(tmp_path / "a", "b\n")
    append_whole(tmp_path / "a", ANY_NAME)
    assert (tmp_path / "a").read_bytes() == b"b\n" + as_bytes(ANY_NAME)


def test_text_and_bytes(tmp_path):
    write_whole(tmp_path / "a", "ä\n")
    write_whole(tmp_path / "b", b"\xff")
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == "ä\n".encode() + b"\xff"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_step_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files.os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture
def full_disk():
    """Files end at 64 kB, which stands for a full disk: a write fails, with another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(bytes(1 << 20)),
        lambda file: [file.write(bytes(1000)) for _ in range(1000)],
        lambda file: np.savez(file, a=np.zeros(1 << 20)),
        lambda file: torch.save({"a": torch.zeros(1 << 20)}, file),  # makes a RuntimeError of it
    ],
)
def test_a_full_disk_is_an_os_error_whoever_writes(tmp_path, write):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(OSError, match="File too large"), whole_file(path) as file:
        write(file)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def test_what_is_read_back_is_what_numpy_and_torch_wrote(tmp_path):
    with whole_file(tmp_path / "a.npz") as file:
        np.savez(file, a=np.arange(5))
    with whole_file(tmp_path / "a.pt") as file:
        torch.save({"a": torch.arange(5)}, file)
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["a"].tolist() == torch.load(tmp_path / "a.pt")["a"].tolist() == list(range(5))


def test_a_folder_at_the_path_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "a"):
        pytest.fail("it begins all the same")


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        write_whole(tmp_path / folder / "a", "")
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "a", "")


def test_a_link_stays_or_is_replaced_as_asked(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")
    (tmp_path / "a").symlink_to(Path("there") / "a")
    write_whole(tmp_path / "a", "through")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "there" / "a").read_text() == "through"
    write_whole(tmp_path / "a", "replaced", through_link=False)
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "there" / "a").read_text() == "through"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_name(tmp_path, monkeypatch, has_links):
    if not has_links:

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", no_links)
    (tmp_path / "a").write_text("content")
    (tmp_path / "b").symlink_to("a")
    for _ in range(2):  # the second time both names are of one file already
        link_whole(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "content"
        assert not (tmp_path / "b").is_symlink()
        assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").samefile(tmp_path / "b") == has_links
    with pytest.raises(FileNotFoundError):
        link_whole(tmp_path / "c", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "set"

    def interrupted() -> None:
        with whole_folder(path) as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []
    with whole_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    assert names(tmp_path) == ["set"]
    with pytest.raises(OSError, match="not empty"), whole_folder(path):
        pass
    assert names(path) == ["a"]


CHILD = """
import os, signal, sys
from pathlib import Path
from lowrank_vit.common import files
def die(*_):
    if sys.argv[2] == "alive":
        print("here", flush=True)
        sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] in ("fsync", "alive"):
    files.os.fsync = die
elif sys.argv[2] == "rename":
    Path.replace = Path.rename = die
if sys.argv[3:]:
    with files.whole_folder(Path(sys.argv[1])) as folder:
        (folder / "b").write_bytes(b"new")
else:
    with files.whole_file(Path(sys.argv[1])) as file:
        file.write(b"new")
        file.flush()
        if sys.argv[2] == "write":
            die()
"""


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "folder"])
def test_what_a_killed_process_leaves_is_removed(tmp_path, step):
    path = tmp_path / "a"
    if step == "folder":
        arguments = ["fsync", "folder"]
    else:
        path.write_text("old")
        arguments = [step]
    assert subprocess.run([sys.executable, "-c", CHILD, path, *arguments]).returncode == -signal.SIGKILL
    assert len([name for name in names(tmp_path) if name.startswith(".a.")]) == 1
    assert step == "folder" or path.read_text() == "old"
    remove_leftovers(tmp_path, "b")
    assert len([name for name in names(tmp_path) if name.startswith(".a.")]) == 1
    remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == ([] if step == "folder" else ["a"])


@pytest.mark.parametrize("kind", [[], ["folder"]])
def test_what_a_living_process_writes_stays(tmp_path, kind):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "a"), "alive", *kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 1
        child.kill()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("age_s", [60, 7200])
def test_without_locks_age_tells_what_is_left(tmp_path, monkeypatch, age_s):
    monkeypatch.setattr(files, "try_flock", lambda _descriptor: None)
    left = tmp_path / ".a.0123abcd.part"
    left.write_text("")
    os.utime(left, (left.stat().st_mtime - age_s,) * 2)
    remove_leftovers(tmp_path)
    assert left.exists() == (age_s < 3600)
    write_whole(tmp_path / "a", "as without it")
    assert (tmp_path / "a").read_text() == "as without it"


LEFT = (
    *(".last.pth.tar.0123abcd.part", ".last.pth.tar.4711.part", ".args.yaml.part", ".a.beton.json.0123abcd.tmp"),
    *("update_00000100.npz.partial", "vectors_00000100.npz.partial", "index.json.partial", ".val-1-2.unfinished"),
)
KEPT = (
    *("last.pth.tar", ".a.beton.partial", ".a.beton.partial.journal", ".a.beton.partial.json", "a.part", "notes.tmp"),
    *("best.npz.partial", ".lock", ".part"),
)


def test_names_of_leftovers_of_this_version_and_of_earlier_ones(tmp_path):
    for name in (*LEFT, *KEPT):
        (tmp_path / name).mkdir() if name.endswith("unfinished") else (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(KEPT)
    remove_leftovers(tmp_path / "nowhere")


def test_why_something_cannot_be_written(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("kept")
    said = r"/a cannot be written: No space left on device\. Do this\."
    with pytest.raises(UserError, match=said) as told, writing(tmp_path / "a", "Do this."):
        raise error
    assert told.value.__notes__ == ["kept"]
