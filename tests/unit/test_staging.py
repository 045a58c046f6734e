"""A set is copied to fast disk once, whole or not at all, and again when it or the copy has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from data_prep.errors import BetonError, UserError
from data_prep.manifest import manifest_path
from lowrank_vit.data import staging
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.staging import stage
from tests.photos import write_sets


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    return write_sets(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def source(sets, tmp_path) -> Path:
    """A set with its sidecars."""
    (tmp_path / "slow").mkdir()
    for path in sets["jpeg"].parent.glob("jpeg.beton*"):
        shutil.copy(path, tmp_path / "slow")
    return tmp_path / "slow" / "jpeg.beton"


class Said(list):
    def __call__(self, line: str) -> None:
        self.append(line)


def test_the_copy_is_the_set_with_its_sidecars(source, tmp_path):
    said = Said()
    copy = stage(source, tmp_path / "fast", said)
    assert copy.parent.parent == tmp_path / "fast"
    assert "copying jpeg.beton and 2 more files" in said[0]
    assert copy.read_bytes() == source.read_bytes()
    assert Beton(copy).classes == Beton(source).classes
    assert Beton(copy).describe(3) == Beton(source).describe(3).replace(str(source), str(copy))


def test_parts_are_copied_together(sets, tmp_path):
    copy = stage(sets["mixed"], tmp_path, Said())
    assert Beton(copy).num_samples == Beton(sets["mixed"]).num_samples
    assert [part.parent for part in Beton(copy).parts] == [copy.parent] * 2


def test_a_copy_is_used_again_until_the_set_changes(source, tmp_path):
    said = Said()
    first = stage(source, tmp_path / "fast", said)
    inode = first.stat().st_ino
    assert stage(source, tmp_path / "fast", said) == first
    assert first.stat().st_ino == inode
    assert said[-1] == f"jpeg.beton: the copy in {first.parent} is up to date"
    os.utime(source, ns=(1, 1))  # written anew
    second = stage(source, tmp_path / "fast", said)
    assert second != first
    assert not first.exists()  # room for the new one


@pytest.mark.parametrize("harm", ["cut", "touched", "unstamped", "file missing"])
def test_a_copy_that_does_not_match_is_made_anew(source, tmp_path, harm):
    copy = stage(source, tmp_path / "fast", Said())
    if harm == "cut":
        os.truncate(copy, 100)
    elif harm == "touched":
        os.utime(copy, ns=(1, 1))
    elif harm == "unstamped":  # the process was killed before it had finished
        (copy.parent / staging.STAMP).unlink()
    else:
        manifest_path(copy).unlink()
    assert stage(source, tmp_path / "fast", Said()) == copy
    assert copy.read_bytes() == source.read_bytes()
    assert manifest_path(copy).exists()


def test_two_sets_of_one_name_do_not_meet(source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "other")
    copies = [stage(path, tmp_path / "fast", Said()) for path in (source, tmp_path / "other" / source.name)]
    assert copies[0] != copies[1]
    assert all(copy.exists() for copy in copies)


def test_a_set_that_is_not_its_manifests_is_not_used(source, tmp_path):
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    with pytest.raises(BetonError, match=r"jpeg.beton does not have the checksum of its manifest.*verify .* --full"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("jpeg*"))


def test_a_disk_that_garbles_is_noticed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(BetonError, match="what was copied reads back differently"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("jpeg*"))


def test_room_is_looked_for_first(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(UserError, match=r"fast has 0.00 GB free, but jpeg.beton and what belongs to it take 0.\d+ GB"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("jpeg*"))


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "fsync", full)
    with pytest.raises(UserError, match=r"--stage-dir .*: copying failed: No space left on device"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("jpeg*"))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.beton is not there"):
        stage(tmp_path / "nothing.beton", tmp_path / "fast", Said())


def test_of_several_processes_one_copies(source, tmp_path):
    code = f"""
from pathlib import Path
from lowrank_vit.data.staging import stage
print(stage(Path({str(source)!r}), Path({str(tmp_path / "fast")!r})), flush=True)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("copying" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1
