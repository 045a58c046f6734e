"""Folders of images are converted once, by one process, gone on with after a stop, and again when they change."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.convert import convert_image_folder, convert_splits
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.sidecars import manifest_path, read_manifest
from lowrank_vit.common import locks as one_process
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets import image_dirs, made_once
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, locate
from tests.photos import NUM_PHOTOS
from tests.sources import Said, run_at_once, write_splits


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def converted_images(images, tmp_path_factory) -> Path:
    """The same, converted."""
    root = Path(shutil.copytree(images, tmp_path_factory.mktemp("converted") / "images"))
    locate(DataOptions(data_dir=root), Said())
    return root


@pytest.fixture
def folder(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture
def done(converted_images, tmp_path) -> Path:
    """A folder with its conversion, as it is after it was copied to another place."""
    return Path(shutil.copytree(converted_images, tmp_path / "images"))


def test_a_folder_is_converted_once(folder):
    said, options = Said(), DataOptions(data_dir=folder)
    paths = locate(options, said)
    assert paths == (folder / ".lowrank_vit" / "train.beton", folder / ".lowrank_vit" / "val.beton")
    assert said[0] == f"converting {folder}/train and {folder}/val into {folder}/.lowrank_vit (once)"
    assert f"  train.beton: {NUM_PHOTOS} images" in said
    assert Beton(paths[0]).num_samples == NUM_PHOTOS
    assert Beton(paths[1]).classes == ["flower", "temple"]
    written = [path.stat() for path in paths]
    said.clear()
    assert locate(options, said) == paths
    assert not said
    assert [path.stat() for path in paths] == written


def test_a_finished_conversion_needs_no_writing(done, monkeypatch):
    monkeypatch.setattr(made_once, "one_process_in", lambda *_: pytest.fail("wants to write"))
    assert locate(DataOptions(data_dir=done), Said())[0].exists()


def test_a_folder_may_be_moved_and_libraries_renewed(done, monkeypatch):
    """The conversion lies in the folder, so another path to it or another version must not mean hours of work."""
    monkeypatch.setattr("data_prep.convert.library_versions", lambda: {"numpy": "99"})
    said = Said()
    locate(DataOptions(data_dir=done), said)
    assert not said


@pytest.mark.parametrize("change", ["add", "add deep", "remove", "overwrite", "same size", "add a class"])
def test_a_changed_folder_is_converted_again(done, change):
    options, said = DataOptions(data_dir=done), Said()
    time.sleep(0.01)
    for split in ("train", "val"):
        first = done / split / "flower" / "00.jpg"
        if change == "add":
            shutil.copy(first, first.with_name("zz.jpg"))
        elif change == "add deep":
            (first.parent / "more" / "still").mkdir(parents=True)
            shutil.copy(first, first.parent / "more" / "still")
        elif change == "remove":
            first.unlink()
        elif change == "overwrite":
            first.write_bytes((done / split / "temple" / "01.jpg").read_bytes())
        elif change == "same size":
            os.utime(first)
        else:
            shutil.copytree(first.parent, first.parent.with_name("aaa"))
    train, _ = locate(options, said)
    is_class = change in ("add a class", "add deep")  # a folder that holds images is a class
    assert said.about(f"(again, since the {'classes' if is_class else 'images'} have changed)")
    more = {"add": 1, "add deep": 1, "remove": -1, "overwrite": 0, "same size": 0, "add a class": NUM_PHOTOS // 2}
    beton = Beton(train)
    assert beton.num_samples == NUM_PHOTOS + more[change]
    if change == "overwrite":
        assert beton.sample(0).tobytes() == (done / "train" / "temple" / "01.jpg").read_bytes()
    said.clear()
    locate(options, said)
    assert not said


def test_only_the_changed_split_is_converted_again(done):
    (done / "val" / "temple" / "03.jpg").unlink()
    before = (done / ".lowrank_vit" / "train.beton").stat()
    said = Said()
    train, val = locate(DataOptions(data_dir=done), said)
    assert said[0].startswith(f"converting {done}/val into")
    assert train.stat() == before
    assert Beton(val).num_samples == NUM_PHOTOS - 1


@pytest.mark.parametrize("harm", ["cut", "no manifest", "no samples", "no beton"])
def test_a_damaged_conversion_is_made_again(done, harm):
    out = done / ".lowrank_vit" / "val.beton"
    if harm == "cut":
        os.truncate(out, 5000)
    else:
        out.with_name("val.beton" + {"no manifest": ".json", "no samples": ".samples", "no beton": ""}[harm]).unlink()
    said = Said()
    locate(DataOptions(data_dir=done), said)
    why = "again, since the converted file was damaged" if harm in ("cut", "no samples") else "once"
    assert said[0] == f"converting {done}/val into {done}/.lowrank_vit ({why})"
    assert Beton(out).num_samples == NUM_PHOTOS


def test_a_choice_of_classes_by_hand_is_left_alone(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("temple\n")
    convert_splits(folder, folder / ".lowrank_vit", classes=tmp_path / "classes.txt", workers=1)
    (tmp_path / "classes.txt").unlink()
    said = Said()
    assert Beton(locate(DataOptions(data_dir=folder), said)[0]).classes == ["temple"]
    assert not said


def test_images_that_are_gone_leave_what_was_converted(done):
    for split in ("train", "val"):
        shutil.rmtree(done / split)
    said = Said()
    assert Beton(locate(DataOptions(data_dir=done), said)[0]).num_samples == NUM_PHOTOS
    assert said == [f"the images of {done} are gone: using the converted ones in {done}/.lowrank_vit"]


def test_options_chosen_by_hand_are_kept_when_the_images_change(folder):
    place = folder / ".lowrank_vit"
    convert_splits(folder, place, image=ImageOptions(max_side=100), workers=1)
    said = Said()
    locate(DataOptions(data_dir=folder), said)
    assert not said
    (folder / "train" / "temple" / "03.jpg").unlink()
    train, _ = locate(DataOptions(data_dir=folder), said)
    assert read_manifest(train).options["max_side"] == 100
    assert Beton(train).heights.max() <= 100


def test_parts_made_by_hand_are_taken(folder):
    place = folder / ".lowrank_vit"
    for part in (1, 2):
        convert_image_folder(folder / "train", place / "train.beton", part=(part, 2), workers=1)
    said = Said()
    train, val = locate(DataOptions(data_dir=folder), said)
    assert said[0].startswith(f"converting {folder}/val into")
    assert [part.name for part in Beton(train).parts] == ["train-1-of-2.beton", "train-2-of-2.beton"]
    assert val.exists()


def test_another_place_for_what_is_converted(folder, tmp_path):
    options = DataOptions(data_dir=folder, beton_dir=tmp_path / "elsewhere")
    train, _ = locate(options, Said())
    assert train == tmp_path / "elsewhere" / "train.beton"
    assert not (folder / ".lowrank_vit").exists()
    said = Said()
    locate(options, said)
    assert not said


@pytest.mark.parametrize("other", ["another folder's", "a foreign file"])
def test_nothing_of_the_users_is_replaced_in_another_place(folder, images, digits_dir, tmp_path, other):
    options = DataOptions(data_dir=folder, beton_dir=tmp_path / "place")
    if other == "a foreign file":
        options.beton_dir.mkdir()  # type: ignore[union-attr]
        shutil.copy(digits_dir / "val.beton", tmp_path / "place")
    else:
        locate(options, Said())
        options = replace(options, data_dir=images)
        os.utime(images / "val" / "temple" / "03.jpg")
    before = (tmp_path / "place" / "val.beton").read_bytes()
    with pytest.raises(UserError, match=r"--beton-dir .*/place: val\.beton exists already.*another --beton-dir"):
        locate(options, Said())
    assert (tmp_path / "place" / "val.beton").read_bytes() == before


def refuse_writing(monkeypatch, error: OSError) -> None:
    """As root every folder can be written; so let the lock's file be refused as another user's would be."""
    really = os.open

    def opened(path, flags, *mode, **more):
        if str(path).endswith(one_process.LOCK):
            raise error
        return really(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_cannot_be_written(folder, monkeypatch, error):
    refuse_writing(monkeypatch, error)
    said = rf"\.lowrank_vit cannot be written: {error.strerror}\. Give a folder that can be written with --beton-dir"
    with pytest.raises(UserError, match=said):
        locate(DataOptions(data_dir=folder), Said())


def test_a_finished_conversion_in_a_folder_that_cannot_be_written(done, monkeypatch):
    refuse_writing(monkeypatch, PermissionError(13, "Permission denied"))
    assert locate(DataOptions(data_dir=done), Said())[0].exists()


def test_a_bad_image_stops_the_conversion_or_is_left_out_and_that_is_said(folder):
    (folder / "train" / "flower" / "00.jpg").write_bytes(b"no image")
    options = DataOptions(data_dir=folder)
    with pytest.raises(UserError, match=r"flower/00.jpg") as caught:
        locate(options, Said())
    assert "leave them out with --on-bad-sample skip" in str(caught.value)
    said = Said()
    train, _ = locate(replace(options, on_bad="skip"), said)
    assert Beton(train).num_samples == NUM_PHOTOS - 1
    said.clear()
    locate(options, said)  # what was left out stays so, and is said
    assert said == [f"train.beton leaves out 1 bad image, listed in {manifest_path(train)}"]


def test_different_classes_are_told_in_the_trainers_words(folder):
    shutil.move(folder / "train" / "temple", folder / "train" / "tower")
    with pytest.raises(UserError) as caught:
        locate(DataOptions(data_dir=folder), Said())
    message = str(caught.value)
    assert "different classes" in message
    assert "only the former has tower; only the latter has temple" in message
    assert "--trust-labels" in message
    assert f"flags of `python -m data_prep imagefolder --src {folder} --out OTHER`; then --data-dir OTHER." in message


def test_an_empty_class_is_told_in_the_trainers_words(folder):
    (folder / "val" / "aaa").mkdir()
    with pytest.raises(UserError, match=r"aaa holds no image") as caught:
        locate(DataOptions(data_dir=folder), Said())
    assert "--src " not in str(caught.value).replace("imagefolder --src ", "")


def code_of(folder: Path) -> str:
    return f"""
from pathlib import Path
from lowrank_vit.data.sets.datasets import DataOptions, locate
train, val = locate(DataOptions(data_dir=Path({str(folder)!r})))
print(train.stat().st_ino, val.stat().st_ino)
"""


def test_of_several_processes_at_once_one_converts(folder):
    said = run_at_once(code_of(folder))
    assert sum("converting" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1


def test_who_waits_says_for_whom_and_does_not_convert(folder, monkeypatch):
    place = folder / ".lowrank_vit"
    code = f"""
import sys
from pathlib import Path
from lowrank_vit.common.locks import one_process_in
from data_prep.convert import convert_folders
place = Path({str(place)!r})
with one_process_in(place, print, ""):
    print("held", flush=True)
    sys.stdin.readline()
    convert_folders({{place / f"{{n}}.beton": Path({str(folder)!r}) / n for n in ("train", "val")}}, workers=1)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder, holder.stdin, holder.stdout:
        assert holder.stdout.readline() == "held\n"

        class Waiter(Said):
            def __call__(self, line: str) -> None:
                super().__call__(line)
                if "waiting" in line:
                    holder.stdin.write("go on\n")  # type: ignore[union-attr]
                    holder.stdin.flush()  # type: ignore[union-attr]

        said = Waiter()
        monkeypatch.setattr(image_dirs, "convert_folders", lambda *_, **__: pytest.fail("converts, too"))
        train, _ = locate(DataOptions(data_dir=folder), said)
    (line,) = said
    assert line.startswith(f"waiting for process {holder.pid} on ")
    assert line.endswith(f" to finish in {place}")
    assert Beton(train).num_samples == NUM_PHOTOS


def test_a_killed_conversion_is_gone_on_with(tmp_path, images):
    """SIGKILL while the second split is converted: the next run takes over the first, and gives the lock no thought."""
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    out = folder / ".lowrank_vit" / "train.beton"
    code = f"""
import os, signal
import data_prep.convert as convert
really = convert.encode_listed
def encode(sample, root, options):
    if root.name == "val":
        os.kill(os.getpid(), signal.SIGKILL)
    return really(sample, root=root, options=options)
convert.encode_listed = encode
{code_of(folder)}"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert out.exists()
    first = out.stat()
    said = Said()
    train, val = locate(DataOptions(data_dir=folder), said)
    assert said[0].startswith(f"converting {folder}/val into")
    assert train.stat() == first
    assert Beton(val).num_samples == NUM_PHOTOS


def test_a_file_system_without_locks_is_no_obstacle(folder, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(one_process.fcntl, "flock", no_locks)
    assert locate(DataOptions(data_dir=folder), Said())[0].exists()
