"""File systems that lack what others have: everything is written and read all the same."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.convert import convert_digits
from data_prep.verify import verify
from lowrank_vit.common import filesystem
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.files import link_whole, whole_folder, write_whole
from lowrank_vit.common.filesystem import free_bytes, hard_link, map_files, open_past_cache, rename, symbolic_link, sync
from lowrank_vit.common.locks import is_locked, lock_folder
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.report.status import better_weights
from lowrank_vit.run.checkpoints import LAST, CheckpointWriter
from lowrank_vit.run.directory import RunDir
from tests.sources import stage

O_DIRECT = os.O_DIRECT


def refusing(number: int, function: Callable = lambda *_: None, when: Callable[..., bool] = lambda *_, **__: True):
    """The function, which raises that error when it is called so."""

    def refused(*args, **options):
        if when(*args, **options):
            raise OSError(number, os.strerror(number))
        return function(*args, **options)

    return refused


def is_direct(_, flags: int, *__, **___) -> bool:
    return bool(flags & O_DIRECT)


def is_shared(*_, flags: int = 0, **__) -> bool:
    return flags == mmap.MAP_SHARED


def is_shared_at(_, __, flag: int, ___) -> bool:
    return flag == mmap.MAP_SHARED


def lack_everything(monkeypatch, number: int, of_links: int = errno.EPERM, of_maps: int = errno.ENODEV) -> None:
    for module, name, error, when in (
        (fcntl, "flock", number, lambda *_: True),
        (os, "fsync", number, lambda *_: True),
        (os, "link", of_links, lambda *_: True),
        (os, "symlink", of_links, lambda *_, **__: True),
        (os, "open", number, is_direct),
        (filesystem.mmap, "mmap", of_maps, is_shared),
        (filesystem, "_map_at", of_maps, is_shared_at),
    ):
        monkeypatch.setattr(module, name, refusing(error, getattr(module, name), when))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_all_is_written_and_read_where_everything_lacks(tmp_path, monkeypatch, number):
    lack_everything(monkeypatch, number)
    done, _ = convert_digits(tmp_path / "data")
    assert verify(done.beton, full=True).num_samples == 1437
    copy = stage(done.beton, tmp_path / "fast", lambda line: None)
    assert bytes(Beton(copy).sample(5)) == bytes(Beton(done.beton).sample(5))
    run_dir = RunDir.create(tmp_path / "output", "run", "")
    assert is_locked(run_dir.path)
    writer = CheckpointWriter(run_dir.path, torch.device("cpu"), pytest.fail)
    writer.save({"better": "ema"}, ("model_best.pth.tar", LAST))
    writer.close()
    run_dir.close()
    assert not is_locked(run_dir.path)
    assert better_weights(run_dir.path / LAST) == better_weights(run_dir.path / "model_best.pth.tar") == "ema"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_locks_without_flock(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    held = lock_folder(tmp_path)
    assert held is not None
    assert is_locked(tmp_path)
    assert lock_folder(tmp_path) is None
    held.release()
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV])
def test_links(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_text("a")
    monkeypatch.setattr(os, "link", refusing(number))
    monkeypatch.setattr(os, "symlink", refusing(number))
    assert not hard_link(tmp_path / "a", tmp_path / "b")
    assert not symbolic_link(tmp_path / "c", "a")
    link_whole(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        link_whole(tmp_path / "missing", tmp_path / "d")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_that_cannot_be_synced_is_written_and_a_failing_disk_is_told(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing(number))
    write_whole(tmp_path / "a", "a")
    sync(0)
    for failing in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        monkeypatch.setattr(os, "fsync", refusing(failing))
        with pytest.raises(OSError, match=os.strerror(failing)):
            write_whole(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("times", [1, 2])
def test_what_cannot_be_renamed_is_copied(tmp_path, monkeypatch, times):
    left = [times]

    def is_across(*_) -> bool:
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(os, "replace", refusing(errno.EXDEV, os.replace, is_across))
    (tmp_path / "b").write_text("old")
    write_whole(tmp_path / "b", "new")
    assert (tmp_path / "b").read_text() == "new"
    left[0] = times
    with whole_folder(tmp_path / "c") as folder:
        (folder / "d").write_text("d")
    assert (tmp_path / "c" / "d").read_text() == "d"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    monkeypatch.setattr(os, "replace", refusing(errno.EACCES))
    with pytest.raises(PermissionError):
        rename(tmp_path / "b", tmp_path / "e")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("count", [1, 3])
def test_mappings_are_private_where_they_cannot_be_shared(tmp_path, monkeypatch, number, count):
    contents = [os.urandom(5000 * n + 1) for n in range(1, count + 1)]
    paths = [tmp_path / str(n) for n in range(count)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    monkeypatch.setattr(filesystem.mmap, "mmap", refusing(number, mmap.mmap, is_shared))
    monkeypatch.setattr(filesystem, "_map_at", refusing(number, filesystem._map_at, is_shared_at))
    array, starts, *_ = map_files(paths, list(map(len, contents)))
    assert isinstance(array, np.ndarray)
    for start, content in zip(starts, contents, strict=True):
        assert array[start : start + len(content)].tobytes() == content


def pages_in_memory(array: np.ndarray, first: int = 0, count: int | None = None) -> int:
    """Of `count` pages of a mapped array, from number `first` on."""
    count = array.nbytes // mmap.PAGESIZE if count is None else count
    found, address = (ctypes.c_ubyte * count)(), array.ctypes.data + first * mmap.PAGESIZE
    size = ctypes.c_size_t(count * mmap.PAGESIZE)
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), size, found)
    return sum(page & 1 for page in found)


def test_what_is_read_as_a_whole_is_read_ahead_and_pieces_are_not(tmp_path):
    path, pages = tmp_path / "table", 4096
    with path.open("wb") as file:
        file.write(bytes(pages * mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    array, *_ = map_files([path], [0])
    if pages_in_memory(array):
        pytest.skip("files of this folder stay in memory")

    def touch(page: int) -> None:
        assert array[page * mmap.PAGESIZE] == 0

    filesystem.read_by_pieces(array)
    touch(pages // 4)
    assert pages_in_memory(array, pages // 4, 2) == 1
    half = array[: array.size // 2]
    filesystem.read_through(half.reshape(-1, 64)[:, 5])  # a column of a table
    assert pages_in_memory(half) == pages // 2
    filesystem.read_through(array[:0])
    maps = [f"{line} ".split(" ") for line in Path("/proc/self/smaps").read_text().splitlines()]
    of_file = [n for n, words in enumerate(maps) if str(path) in words]
    flags = [next(words for words in maps[n:] if words[0] == "VmFlags:") for n in of_file]
    assert flags
    assert all("rr" in words for words in flags), "random reads"


def test_a_set_that_cannot_be_mapped_at_all_is_to_be_staged(digits_dir, monkeypatch):
    beton = Beton(digits_dir / "train.beton")
    monkeypatch.setattr(filesystem.mmap, "mmap", refusing(errno.ENODEV))
    with pytest.raises(BetonError, match=r"train\.beton cannot be mapped .*No such device.*--stage-dir"):
        beton.sample(0)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_files_past_the_page_cache(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", refusing(number, os.open, is_direct))
    assert open_past_cache(tmp_path / "a", os.O_WRONLY | os.O_CREAT) is None


def test_a_disk_that_does_not_tell_its_room(tmp_path, monkeypatch):
    assert free_bytes(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", refusing(errno.ENOSYS))
    assert free_bytes(tmp_path) is None
    monkeypatch.setattr(os, "statvfs", refusing(errno.ENOSYS))
    assert free_bytes(Path("/nowhere")) is None


def test_a_place_is_the_same_for_processes_that_share_it(tmp_path, monkeypatch):
    """On one machine, or on several where the file system is one of a network; and whether it is there yet or not."""
    own, later = tmp_path / "own", tmp_path / "own" / "not" / "there"
    own.mkdir()
    here = [filesystem.place_of(path) for path in (own, later)]
    assert here == [filesystem.place_of(path) for path in (own, later)]
    assert here[0] != here[1] != filesystem.place_of(tmp_path / "own" / "not")
    monkeypatch.setattr(filesystem, "_machine", lambda: "another")
    assert [filesystem.place_of(path) for path in (own, later)] != here
    number = own.stat().st_dev
    mounted = f"36 35 {os.major(number)}:{os.minor(number)} / {tmp_path} rw - KIND server:/export rw\n"
    for kind, is_shared in (("nfs4", True), ("lustre", True), ("ext4", False), ("fuse.sshfs", False)):
        monkeypatch.setattr(Path, "read_text", lambda *_, kind=kind, **__: mounted.replace("KIND", kind))
        places = list[list[object]]()
        for machine in ("one", "another"):
            monkeypatch.setattr(filesystem, "_machine", lambda machine=machine: machine)
            places.append(filesystem.place_of(own))
        assert (places[0] == places[1]) == is_shared
