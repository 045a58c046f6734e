"""A published index is that of its files as they are, or is not taken; whoever opens a set has the same arrays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.formats import tables
from data_prep.formats.beton import ALLOCATION
from data_prep.formats.sidecars import manifest_path, read_manifest
from data_prep.formats.tables import COLUMNS
from data_prep.verify import verify
from lowrank_vit.common import filesystem
from lowrank_vit.common.errors import BetonError
from lowrank_vit.data.sets import index, published
from lowrank_vit.data.sets.beton import Beton
from tests.sources import stage


def published_file(beton: Path) -> Path:
    (found,) = beton.parent.glob(f".{beton.name}*.index2-{os.geteuid()}")
    return found


def arrays(beton: Beton) -> dict[str, list[int]]:
    return {name: getattr(beton, name).tolist() for name in COLUMNS}


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Files whose tables this process has read, as it goes."""
    found: list[Path] = []
    real = tables._read_blocks
    monkeypatch.setattr(tables, "_read_blocks", lambda of, *more: found.append(of.path) or real(of, *more))
    return found


def test_the_second_opening_reads_no_tables(beton, reads, monkeypatch):
    first = Beton(beton)
    assert len(reads) == len(first.parts)
    second = Beton(beton)
    assert len(reads) == len(first.parts)
    monkeypatch.setattr(published, "PUBLISHED_FROM", 1 << 20)
    published_file(beton).unlink()
    private = Beton(beton)
    assert len(reads) == 2 * len(first.parts)
    assert arrays(first) == arrays(second) == arrays(private)
    assert first._index.summary == second._index.summary == private._index.summary
    assert np.array_equal(first._index.first_ids, private._index.first_ids)
    assert [second.sample(i).tobytes() for i in (0, 25, 999)] == [private.sample(i).tobytes() for i in (0, 25, 999)]
    for column in second._index.columns.values():
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    assert not list(beton.parent.glob("*.lock"))
    assert not list(beton.parent.glob(".*.lock"))


def test_only_its_owner_reads_it(beton):
    Beton(beton)
    assert published_file(beton).stat().st_mode & 0o777 == 0o600


def spoil(content: bytes, how: str) -> bytes:
    if how == "version":
        return content[:8] + b"\x01" + content[9:]
    if how == "header":
        return content[:40] + bytes([content[40] ^ 1]) + content[41:]
    if how == "half written":
        return content[: len(content) // 2]
    if how == "nothing":
        return b""
    if how == "longer":
        return content + b"\0"
    return content.replace(b'"key": "', b'"kez": "')


@pytest.mark.parametrize("how", ["version", "header", "half written", "nothing", "longer", "key"])
def test_what_is_damaged_is_made_anew(beton, reads, how):
    expected = arrays(Beton(beton))
    path = published_file(beton)
    intact = path.read_bytes()
    path.write_bytes(spoil(intact, how))
    reads.clear()
    assert arrays(Beton(beton)) == expected
    assert reads
    assert path.read_bytes() == intact


@pytest.mark.parametrize("how", ["wider", "another", "link"])
def test_what_others_may_have_written_is_not_opened(beton, reads, how, tmp_path, monkeypatch):
    expected = arrays(Beton(beton))
    path = published_file(beton)
    if how == "wider":
        path.chmod(0o644)
    elif how == "another":
        monkeypatch.setattr(published.os, "geteuid", lambda: os.getuid() + 1)
        path.rename(path.with_name(f"{path.name[: path.name.rindex('-')]}-{os.getuid() + 1}"))
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    reads.clear()
    assert arrays(Beton(beton)) == expected
    assert reads
    if how == "another":
        assert Beton(beton)._index.why_private
    else:
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["time", "inode", "manifest", "no manifest", "converted"])
def test_a_changed_set_makes_it_stale(beton, made, reads, change):
    before = Beton(beton)
    part = before.parts[-1]
    reads.clear()
    if change == "time":
        os.utime(part)
    elif change == "inode":
        stat = part.stat()
        shutil.copyfile(part, part.with_suffix(".copy"))
        os.utime(part.with_suffix(".copy"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        part.with_suffix(".copy").replace(part)
    elif change == "manifest":
        manifest_path(part).write_bytes(manifest_path(part).read_bytes() + b"\n")
    elif change == "no manifest":
        manifest_path(part).unlink()
    else:
        with part.open("r+b") as file:  # as a damaged disk, or a copy onto it, would
            file.seek(2106 + 1)
            file.write(b"\0\0")
        with pytest.raises(BetonError, match="sample 0 has no pixels"):
            Beton(beton)
        return
    assert arrays(Beton(beton)) == arrays(before)
    assert reads
    reads.clear()
    Beton(beton)
    assert not reads


def test_where_it_cannot_be_written_each_process_keeps_its_own(beton, tmp_path, monkeypatch):
    expected = arrays(Beton(beton))
    published_file(beton).unlink()

    def refused(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refused)
    full = Beton(beton)  # as a /dev/shm of 64 MB
    assert arrays(full) == expected
    assert "No space left" in full._index.why_private
    assert not list(beton.parent.glob(".*.part"))
    assert not full.unshared
    monkeypatch.setattr("lowrank_vit.data.sets.beton._MUCH_BYTES", 1000)
    assert "train.beton: each process keeps 33.0 kB of index, since it could not be written" in full.unshared


def test_the_next_place_is_taken_in_a_folder_that_is_not_writable(beton, tmp_path, monkeypatch, reads):
    names = [beton.with_name(".x.index"), tmp_path / "shm" / "x.index"]
    monkeypatch.setattr(published, "_places", lambda path, parts: names)
    (tmp_path / "shm").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != beton.parent and real(path, mode))
    expected = arrays(Beton(beton))
    assert names[1].stat().st_mode & 0o777 == 0o600
    reads.clear()
    assert arrays(Beton(beton)) == expected
    assert not reads


def test_what_cannot_be_trusted_afterwards_does_not_stay(beton, monkeypatch):
    def refused(*args: object) -> None:  # as where a file system shows other permissions, or another owner
        raise PermissionError("it is not this user's alone")

    monkeypatch.setattr(published, "_map", refused)
    assert "cannot be trusted (it is not this user's alone)" in Beton(beton)._index.why_private
    assert not list(beton.parent.glob(".*"))


def test_another_users_pipe_is_not_written_to(beton, monkeypatch):
    place, parts = beton.with_name(".x.index"), Beton(beton).parts
    os.mkfifo(place)
    reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)  # without one, writing would wait for ever
    try:
        monkeypatch.setattr(published.os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(PermissionError, match="another user's file"):
            published._publish(place, beton, index.read_layouts(beton, parts))
    finally:
        os.close(reader)


def test_nothing_is_published_beside_a_link_to_another_disk(made, tmp_path, monkeypatch, reads):
    """Machines number disks differently, so one would replace what the other has mapped."""
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    monkeypatch.setattr(published, "PUBLISHED_FROM", 1)
    monkeypatch.setattr(published.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "set").mkdir()
    beton = tmp_path / "set" / "train.beton"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        shutil.copytree(made / "one", other, dirs_exist_ok=True)
        for path in (beton, manifest_path(beton)):
            path.symlink_to(Path(other) / path.name)
        expected = arrays(Beton(beton))
        assert sorted(path.name for path in beton.parent.iterdir()) == [beton.name, manifest_path(beton).name]
        assert len(list((tmp_path / "temporary").iterdir())) == 1
        reads.clear()
        assert arrays(Beton(beton)) == expected
        assert not reads


@pytest.mark.parametrize("lacking", ["temporary folder", "room for its name"])
def test_a_set_opens_where_there_is_no_place(made, tmp_path, monkeypatch, lacking):
    beton = tmp_path / f"{'n' * (240 if lacking[0] == 'r' else 1)}.beton"
    shutil.copyfile(made / "one" / "train.beton", beton)

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    if lacking == "temporary folder":
        monkeypatch.setattr(published.tempfile, "gettempdir", none)
    assert Beton(beton).num_samples == 1000


def test_a_file_system_without_maps_that_are_shared(beton, monkeypatch):
    expected = arrays(Beton(beton))
    monkeypatch.setattr(
        filesystem.mmap, "mmap", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(19, "No device"))
    )
    assert arrays(Beton(beton)) == expected


_OPENS = """
import os, sys
from pathlib import Path
from data_prep.formats import tables
from lowrank_vit.data.sets import published
from lowrank_vit.data.sets.beton import Beton
published.PUBLISHED_FROM = 1
real, path, mark = tables._read_blocks, Path(sys.argv[1]), Path(sys.argv[2])
def read(*arguments):
    with mark.open("a") as file:
        print(os.getpid(), file=file)
    if len(sys.argv) > 3:
        os.kill(os.getpid(), 9)
    return real(*arguments)
tables._read_blocks = read
print(int(Beton(path).pointers.sum()))
"""


def opening(beton: Path, mark: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _OPENS, str(beton), str(mark), *more], stdout=subprocess.PIPE, text=True
    )


def test_of_processes_that_open_at_once_one_computes(made, tmp_path):
    shutil.copytree(made / "many", tmp_path / "set")
    beton, mark = tmp_path / "set" / "train.beton", tmp_path / "mark"
    running = [opening(beton, mark) for _ in range(2)]
    said = {process.communicate(timeout=300)[0] for process in running}
    assert len(said) == 1
    assert len(set(mark.read_text().split())) == 1
    assert len(mark.read_text().split()) == 40


def test_a_killed_publisher_is_followed_by_another(made, tmp_path):
    shutil.copytree(made / "many", tmp_path / "set")
    beton, mark = tmp_path / "set" / "train.beton", tmp_path / "mark"
    killed = opening(beton, mark, "die")
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert list(beton.parent.glob(".*.part"))
    following = opening(beton, mark)
    assert following.communicate(timeout=300)[0]
    assert not list(beton.parent.glob(".*.part"))
    assert published_file(beton).exists()


def test_it_is_no_part_of_the_set(beton, tmp_path):
    """Nor staged, nor an error of `verify`, nor in the way of the same set under another name."""
    opened = Beton(beton)
    name = published_file(beton).name
    copy = stage(beton, tmp_path / "stage", lambda line: None)
    assert name not in {path.name for path in copy.parent.iterdir()}
    assert arrays(Beton(copy)) == arrays(opened)
    assert stage(beton, tmp_path / "stage", lambda line: None) == copy
    assert verify(opened.parts[0]).num_samples == read_manifest(opened.parts[0]).num_samples


def test_facts_are_those_of_all_samples(beton):
    opened = Beton(beton)
    pixels = opened.heights.astype(np.int64) * opened.widths
    assert opened.stored_bytes == opened.sizes.sum()
    assert opened.decoded_bytes == 3 * pixels.sum()
    assert (opened.num_jpeg, opened.is_raw, opened.is_uniform) == (1000, False, False)
    sides = (np.percentile(side, index.LARGE, method="higher") for side in (opened.heights, opened.widths))
    assert opened.large_sides == tuple(map(int, sides))
    assert opened.is_ascending == bool((np.diff(opened.pointers) >= 0).all())
    told = [json.loads(manifest_path(part).read_bytes())["reasons"] for part in opened.parts]
    assert opened.reasons == {name: sum(one[name] for one in told) for name in told[0]}


def test_percentiles_are_numpys():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 99, 100, 101, 102, 1000):
        values = rng.integers(0, 50, count)
        assert index._percentile(np.bincount(values)) == np.percentile(values, index.LARGE, method="higher")
    assert index._percentile(np.zeros(9, int)) == 0


def test_one_file_in_order_is_its_own_index(made, beton):
    """Nothing of the size of the set is published, unless its allocation table has another order, as FFCV leaves it."""
    if len(Beton(beton).parts) > 1:
        assert published_file(beton).stat().st_size > 1000 * 33
        return
    expected = arrays(Beton(beton))
    own = published_file(beton).stat().st_size
    manifest_path(beton).unlink()  # which tells the checksum of the order before
    content = bytearray(beton.read_bytes())
    start = len(content) - 1000 * ALLOCATION.itemsize
    table = np.frombuffer(content, ALLOCATION, offset=start)
    table[:] = table[::-1].copy()
    beton.write_bytes(content)
    assert arrays(Beton(beton)) == expected
    assert published_file(beton).stat().st_size > own + 1000 * 20
    assert arrays(Beton(beton)) == expected


def test_too_many_samples_in_all_parts(beton, monkeypatch):
    monkeypatch.setattr("data_prep.formats.tables.MAX_SAMPLES", 999)
    with pytest.raises(BetonError, match=r"train.beton holds 1,000 samples, more than the 999"):
        Beton(beton)
