"""A set is copied to fast disk once, whole or not at all, and again when it or the copy has changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from rich import filesize

from data_prep.formats.sample_table import sample_table_path
from data_prep.formats.sidecars import manifest_path, read_manifest, write_manifest
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.data.sets import staging
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, open_datasets
from lowrank_vit.data.sets.staging import stage_all
from tests.sources import Said, run_at_once, stage
from tests.waiting import wait_until

ENDS = ("", ".json", ".samples")


class Usage(NamedTuple):
    free: int
    total: int = 1 << 40


@pytest.fixture
def source(sets, tmp_path) -> Path:
    """A set with its sidecars."""
    (tmp_path / "slow").mkdir()
    for path in sets["jpeg"].parent.glob("jpeg.beton*"):
        shutil.copy(path, tmp_path / "slow")
    return tmp_path / "slow" / "jpeg.beton"


def test_the_copy_is_the_set_with_its_sidecars(source, tmp_path):
    said = Said()
    copy = stage(source, tmp_path / "fast", said)
    assert copy.parent.parent == tmp_path / "fast"
    size = sum(path.stat().st_size for path in source.parent.iterdir())
    assert said[0] == f"copying jpeg.beton with sidecars, {filesize.decimal(size)}, to {tmp_path / 'fast'} (once)"
    assert sorted(path.name for path in copy.parent.iterdir()) == [*(f"jpeg.beton{s}" for s in ENDS), staging.STAMP]
    assert copy.read_bytes() == source.read_bytes()
    assert Beton(copy).classes == Beton(source).classes
    assert Beton(copy).describe(3) == Beton(source).describe(3).replace(str(source), str(copy))


def test_parts_are_copied_together(sets, tmp_path):
    copy = stage(sets["mixed"], tmp_path, Said())
    assert Beton(copy).num_samples == Beton(sets["mixed"]).num_samples
    assert [part.parent for part in Beton(copy).parts] == [copy.parent] * 2


def test_a_copy_is_used_again_and_neither_it_nor_the_source_is_read_for_that(source, tmp_path, monkeypatch):
    said = Said()
    first = stage(source, tmp_path / "fast", said)
    before = first.stat()
    os.utime(source)  # touched, but its manifest is the same
    said.clear()
    monkeypatch.setattr(staging, "_copy_sets", lambda *_: pytest.fail("copies"))
    monkeypatch.setattr(staging, "one_process_in", lambda *_: pytest.fail("wants to write"))
    assert stage(source, tmp_path / "fast", said) == first
    assert first.stat() == before
    assert said == [f"staged copy of jpeg.beton in {tmp_path / 'fast'} is up to date"]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_changed_source_is_copied_anew_in_place_of_the_old_copy(source, sets, tmp_path, has_manifest):
    if not has_manifest:
        manifest_path(source).unlink()
    first = stage(source, tmp_path / "fast", Said())
    for path in sets["raw"].parent.glob("raw.beton*"):
        shutil.copy(path, source.with_name(path.name.replace("raw", "jpeg")))
    if not has_manifest:
        manifest_path(source).unlink()
    second = stage(source, tmp_path / "fast", Said())
    assert second != first
    assert second.read_bytes() == sets["raw"].read_bytes()
    assert not first.exists()  # room for the new one
    assert len(list((tmp_path / "fast").glob("*jpeg*"))) == 1


def test_a_manifest_that_alone_changed_is_copied_too(source, tmp_path):
    stage(source, tmp_path / "fast", Said())
    manifest = read_manifest(source)
    write_manifest(manifest_path(source), replace(manifest, classes=("a", "b")))
    assert Beton(stage(source, tmp_path / "fast", Said())).classes == ["a", "b"]


def test_both_sets_of_a_run_are_staged(digits_dir, tmp_path, monkeypatch):
    asked = []
    needed = sum(path.stat().st_size for path in digits_dir.glob("*.beton*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(needed))
    train, val, _ = open_datasets(DataOptions(data_dir=digits_dir), None, tmp_path / "fast", Said())
    assert [beton.num_samples for beton in (train, val)] == [1437, 360]
    assert all(beton.path.is_relative_to(tmp_path / "fast") for beton in (train, val))
    assert asked == [tmp_path / "fast"]  # room for both, once
    shutil.rmtree(tmp_path / "fast")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(UserError, match=r"train\.beton and val\.beton with sidecars take"):
        open_datasets(DataOptions(data_dir=digits_dir), None, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("*.beton"))


def test_one_set_asked_for_twice_is_copied_once(source, tmp_path):
    first, second = stage_all([source, source], tmp_path / "fast", Said())
    assert first == second
    assert first.exists()


@pytest.mark.parametrize("harm", ["cut", "overwritten", "replaced", "unstamped", "foreign stamp", "file missing"])
def test_a_copy_that_does_not_match_is_made_anew(source, tmp_path, harm):
    copy = stage(source, tmp_path / "fast", Said())
    stamp = copy.parent / staging.STAMP
    if harm == "cut":
        os.truncate(copy, 100)
    elif harm == "overwritten":
        wait_until(lambda: time.time_ns() > copy.stat().st_mtime_ns + 10**8)  # the clock of a file system has ticks
        with copy.open("r+b") as file:
            file.seek(5000)
            file.write(b"rubbish")
    elif harm == "replaced":  # by another file of the same size and time
        stat = copy.stat()
        other = copy.with_name("other")
        other.write_bytes(bytes(stat.st_size))
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(copy)
    elif harm == "unstamped":
        stamp.unlink()
    elif harm == "foreign stamp":
        stamp.write_text("[1, 2]")
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
    assert not list((tmp_path / "fast").glob("*jpeg*"))


def test_a_disk_that_garbles_is_noticed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(BetonError, match="the copy reads back differently"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("*jpeg*"))


def test_room_is_looked_for_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(12_345))
    with pytest.raises(UserError) as caught:
        stage(source, tmp_path / "fast", Said())
    needed = filesize.decimal(sum(path.stat().st_size for path in source.parent.iterdir()))
    said = f"--stage-dir {tmp_path / 'fast'}: jpeg.beton with sidecars take {needed}, but only 12.3 kB are free"
    assert said in str(caught.value)
    assert not list((tmp_path / "fast").glob("*jpeg*"))


def test_a_killed_copy_leaves_nothing_that_looks_whole_and_is_cleared_away(source, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from lowrank_vit.data.sets import staging
staging.sha256_of = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # when the .beton has been written
staging.stage_all([Path({str(source)!r})], Path({str(tmp_path / "fast")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "fast").glob("*jpeg*")
    assert left.name.startswith(".")
    assert left.name.endswith(".part")
    copy = stage(source, tmp_path / "fast", Said())
    assert copy.read_bytes() == source.read_bytes()
    assert list((tmp_path / "fast").glob("*jpeg*")) == [copy.parent]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_copy_leaves_nothing(source, tmp_path, monkeypatch, stop):
    def interrupted(path: Path) -> str:
        raise stop

    monkeypatch.setattr(staging, "sha256_of", interrupted)
    with pytest.raises(stop):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("*jpeg*"))


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/fast cannot be written: Not a directory\. Give another --stage-dir"):
        stage(source, tmp_path / "file" / "fast", Said())


def test_a_source_of_another_size_than_its_manifest_is_refused_before_it_is_copied(source, tmp_path):
    os.truncate(source, source.stat().st_size - 1)
    with pytest.raises(BetonError, match=r"jpeg\.beton has .* bytes, but jpeg\.beton\.json says"):
        stage(source, tmp_path / "fast", Said())
    assert not (tmp_path / "fast").exists()


def test_a_changed_sample_table_is_not_used(source, tmp_path):
    table = sample_table_path(source)
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(BetonError, match=r"beton\.samples does not have the checksum.*verify .*jpeg\.beton --full"):
        stage(source, tmp_path / "fast", Said())


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"--stage-dir .*: copying failed: No space left on device"):
        stage(source, tmp_path / "fast", Said())
    assert not list((tmp_path / "fast").glob("*jpeg*"))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.beton is not there"):
        stage(tmp_path / "nothing.beton", tmp_path / "fast", Said())


def test_of_several_processes_one_copies(source, tmp_path):
    code = f"""
from pathlib import Path
from lowrank_vit.data.sets.staging import stage_all
print(stage_all([Path({str(source)!r})], Path({str(tmp_path / "fast")!r}))[0].stat().st_ino)
"""
    said = run_at_once(code)
    assert sum("copying" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1
