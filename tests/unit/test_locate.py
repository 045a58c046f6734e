"""Folders of images and CIFAR-100 are found, converted once, by one process, and used again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from lowrank_vit.data import locate as locate_module
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.locate import DataOptions, locate, locate_validation
from tests.photos import NUM_PHOTOS, write_folder
from tests.unit.test_cifar100 import PYTHON_FORM, write_tar


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/ of 24 JPEGs each."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train")
    shutil.copytree(root / "train", root / "val")
    return root


@pytest.fixture
def folder(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def write_archive(root: Path) -> Path:
    """A small CIFAR-100 in the official form."""
    root.mkdir(parents=True, exist_ok=True)
    return write_tar(root / "cifar-100-python.tar.gz", PYTHON_FORM, "cifar-100-python")


class Said(list):
    def __call__(self, line: str) -> None:
        self.append(line)


def test_a_folder_of_images_is_converted_once(folder):
    said, options = Said(), DataOptions(data_dir=folder)
    paths = locate(options, said)
    assert paths == (folder / ".lowrank_vit" / "train.beton", folder / ".lowrank_vit" / "val.beton")
    assert said == [f"converting {folder}/train and {folder}/val into {folder}/.lowrank_vit (once)"]
    assert Beton(paths[0]).num_samples == NUM_PHOTOS
    assert Beton(paths[1]).classes == ["flower", "temple"]
    written = paths[0].stat()
    assert locate(options, said) == paths
    assert len(said) == 1
    assert paths[0].stat() == written


def test_a_finished_conversion_needs_no_writing(folder, monkeypatch):
    locate(DataOptions(data_dir=folder), Said())
    monkeypatch.setattr(locate_module, "one_process_in", lambda *_: pytest.fail("wants to write"))
    locate(DataOptions(data_dir=folder), Said())


@pytest.mark.parametrize("change", ["add", "remove", "add a class"])
def test_a_changed_folder_is_converted_anew(folder, change):
    options, said = DataOptions(data_dir=folder), Said()
    train, _ = locate(options, said)
    time.sleep(0.01)
    for split in ("train", "val"):
        first = folder / split / "flower" / "00.jpg"
        if change == "add":
            shutil.copy(first, first.with_name("zz.jpg"))
        elif change == "remove":
            first.unlink()
        else:
            shutil.copytree(first.parent, first.parent.with_name("aaa"))
    locate(options, said)
    assert len(said) == 2
    expected = {"add": NUM_PHOTOS + 1, "remove": NUM_PHOTOS - 1, "add a class": NUM_PHOTOS * 3 // 2}[change]
    assert Beton(train).num_samples == expected
    locate(options, said)
    assert len(said) == 2


def test_timms_names_of_splits(folder):
    (folder / "val").rename(folder / "validation")
    (folder / "train").rename(folder / "training")
    shutil.copytree(folder / "validation", folder / "test")
    options = DataOptions(data_dir=folder)
    assert [path.name for path in locate(options, Said())] == ["training.beton", "validation.beton"]
    assert locate(replace(options, val_split="test"), Said())[1].name == "test.beton"
    assert locate(replace(options, val_split="val"), Said())[1].name == "validation.beton"


def test_another_place_for_what_is_converted(folder, tmp_path):
    train, _ = locate(DataOptions(data_dir=folder, beton_dir=tmp_path / "elsewhere"), Said())
    assert train == tmp_path / "elsewhere" / "train.beton"
    assert not (folder / ".lowrank_vit").exists()


def test_betons_that_are_there_are_taken(digits_dir):
    assert locate(DataOptions(data_dir=digits_dir), Said()) == (digits_dir / "train.beton", digits_dir / "val.beton")


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"neither train.beton nor a folder of images named train\. Give .*digits"):
        locate(DataOptions(data_dir=tmp_path / "nowhere"), Said())
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match=r"has train/ but no folder for --val-split validation\. Add it"):
        locate(DataOptions(data_dir=folder), Said())


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"\.lowrank_vit cannot be written: Permission denied.*with --beton-dir"):
        locate(DataOptions(data_dir=folder), Said())


def test_a_bad_image_stops_the_conversion_or_is_left_out(folder):
    (folder / "train" / "flower" / "00.jpg").write_bytes(b"no image")
    options = DataOptions(data_dir=folder)
    with pytest.raises(UserError, match=r"flower/00.jpg"):
        locate(options, Said())
    train, _ = locate(replace(options, on_bad="skip"), Said())
    assert Beton(train).num_samples == NUM_PHOTOS - 1


def test_two_processes_at_once_convert_once(folder):
    code = f"""
from pathlib import Path
from lowrank_vit.data.locate import DataOptions, locate
print(*locate(DataOptions(data_dir=Path({str(folder)!r}))), flush=True)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("converting" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1


@pytest.mark.parametrize("given", ["file", "folder of splits", "folder of classes", "folder of betons"])
def test_validation_takes_what_it_is_given(folder, digits_dir, given):
    wanted, expected = {
        "file": (digits_dir / "val.beton", digits_dir / "val.beton"),
        "folder of splits": (folder, folder / ".lowrank_vit" / "val.beton"),
        "folder of classes": (folder / "val", folder / ".lowrank_vit" / "val.beton"),
        "folder of betons": (digits_dir, digits_dir / "val.beton"),
    }[given]
    assert locate_validation(wanted, DataOptions(), Said()) == expected
    assert expected.exists()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / ".cache" / "torch" / "datasets"


def test_cifar100_is_converted_from_the_archive_in_the_data_root(home):
    said, options = Said(), DataOptions(dataset="torch/cifar100")
    with pytest.raises(UserError, match=r"holds neither cifar-100-python/ nor .*Add --dataset-download \(169 MB\)"):
        locate(options, said)
    assert said == [f"data root {home} (--data-dir chooses another)"]
    archive = write_archive(home)
    train, val = locate(options, said)
    assert said[-1] == f"converting {archive} into {home}/cifar100.lowrank_vit (once)"
    assert Beton(train).classes == Beton(val).classes
    count = len(said)
    assert locate(replace(options, dataset_download=True), said) == (train, val)  # nothing left to download
    assert len(said) == count + 1


def test_cifar100_is_downloaded_if_that_is_asked_for(home, monkeypatch):
    asked = []

    def download(root: Path) -> Path:
        asked.append(root)
        return write_archive(root)

    monkeypatch.setattr("data_prep.cifar100.download", download)
    train, _ = locate(DataOptions(dataset="torch/cifar100", dataset_download=True), Said())
    assert asked == [home]
    assert train.exists()


def test_the_data_root_is_here_where_home_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    said = Said()
    with pytest.raises(UserError, match=r"--dataset torch/cifar100: data holds neither"):
        locate(DataOptions(dataset="torch/cifar100"), said)
    assert said == [f"data root ./data, since {home} cannot be written (--data-dir chooses another)"]


def test_cifar100_that_was_converted_before_is_taken(home, tmp_path):
    from data_prep.convert import convert_cifar100

    convert_cifar100(write_archive(tmp_path), tmp_path / "done")
    options = DataOptions(dataset="torch/cifar100", data_dir=tmp_path / "done")
    assert locate(options, Said())[0] == tmp_path / "done" / "train.beton"
