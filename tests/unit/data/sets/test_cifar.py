"""`--dataset torch/cifar100`: which data root and why, archives as torchvision leaves them, downloads, wrong uses."""

from __future__ import annotations

import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copy2
from threading import Event
from urllib.error import URLError

import pytest

from data_prep.convert import convert_cifar100, convert_digits
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import one_process_in
from lowrank_vit.data.sets import cifar
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, locate, locate_validation
from tests.sources import Said, run_at_once, write_archive
from tests.unit.data_prep.sources.test_cifar100 import PYTHON_FORM, write_folder
from tests.waiting import LONG_S

CIFAR = DataOptions("torch/cifar100")
NAME = "cifar-100-python.tar.gz"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The usual data root, which is not there yet; the working directory is empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / ".cache" / "torch" / "datasets"


@pytest.fixture
def downloads(monkeypatch) -> list[Path]:
    """Where the archive was downloaded to; in place of the network a small one is written."""
    asked: list[Path] = []

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        asked.append(Path(root))
        assert write_archive(Path(root)).name == filename

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    return asked


def test_the_archive_in_the_usual_root_is_converted_once(home, downloads):
    said, archive = Said(), write_archive(home)
    train, val = locate(CIFAR, said)
    assert said == [
        f"CIFAR-100: data root {home} (CIFAR-100 is there; --data-dir chooses another)",
        f"converting {archive} into {home}/cifar100.lowrank_vit (once)",
    ]
    assert train == home / "cifar100.lowrank_vit" / "train.beton"
    assert (Beton(train).num_samples, Beton(val).num_samples, Beton(train).num_classes) == (130, 110, 100)
    said.clear()
    assert locate(replace(CIFAR, dataset_download=True), said) == (train, val)  # nothing is left to download
    assert len(said) == 1
    assert not downloads
    archive.unlink()
    assert locate(CIFAR, Said()) == (train, val)
    assert locate_validation(None, CIFAR, Said()) == val


def test_an_unpacked_archive_needs_no_packed_one(tmp_path):
    write_folder(tmp_path / "cifar-100-python", PYTHON_FORM)
    for root in (tmp_path, tmp_path / "cifar-100-python"):
        train, _ = locate(replace(CIFAR, data_dir=root), Said())
        assert train == root / "cifar100.lowrank_vit" / "train.beton"
        assert Beton(train).num_samples == 130


def test_the_name_is_read_as_timm_reads_it(tmp_path):
    write_archive(tmp_path)
    assert locate(DataOptions("torch/CIFAR100", tmp_path), Said())[0].exists()


def test_without_the_flag_nothing_is_downloaded(home, downloads):
    with pytest.raises(UserError, match=r"holds neither cifar-100-python/ nor .*Add --dataset-download \(169 MB\)"):
        locate(CIFAR, Said())
    assert not downloads
    assert not home.exists()  # and nothing is made


@pytest.mark.parametrize("given", [True, False])
def test_a_download_goes_to_the_data_root(home, downloads, tmp_path, given):
    root, said = (tmp_path / "root" if given else home), Said()
    train, _ = locate(replace(CIFAR, dataset_download=True, data_dir=root if given else None), said)
    assert train == root / "cifar100.lowrank_vit" / "train.beton"
    why = "--data-dir" if given else "the default; --data-dir chooses another"
    assert said[:2] == [f"CIFAR-100: data root {root} ({why})", f"downloading {NAME} (169 MB) into {root}"]
    assert len(downloads) == 1
    assert downloads[0].parent == root
    assert sorted(path.name for path in root.iterdir()) == [NAME, "cifar100.lowrank_vit"]


def test_an_interrupted_download_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, downloads):
    def interrupted(url: str, root: Path, filename: str, md5: str) -> None:
        (root / filename).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.download_url", interrupted)
        with pytest.raises(KeyboardInterrupt):
            locate(replace(CIFAR, dataset_download=True, data_dir=tmp_path), Said())
    assert not (tmp_path / NAME).exists()
    with pytest.raises(UserError, match="Add --dataset-download"):
        locate(replace(CIFAR, data_dir=tmp_path), Said())
    locate(replace(CIFAR, dataset_download=True, data_dir=tmp_path), Said())
    assert len(downloads) == 1


def test_a_damaged_archive_is_fetched_again_if_that_is_asked_for(tmp_path, downloads):
    archive = write_archive(tmp_path)
    archive.write_bytes(archive.read_bytes()[:5000])
    options = replace(CIFAR, data_dir=tmp_path)
    with pytest.raises(
        UserError, match=r"damaged: .*Download it again, for example with --dataset-download\."
    ) as caught:
        locate(options, Said())
    assert "--src" not in str(caught.value)
    said = Said()
    train, _ = locate(replace(options, dataset_download=True), said)
    assert said.about(f"{archive} is damaged, downloading it again")
    assert Beton(train).num_samples == 130


def test_a_failed_download_says_where_to_put_the_archive(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(UserError, match=rf"no network.*Download it by other means, then put it into {tmp_path}\."):
        locate(replace(CIFAR, dataset_download=True, data_dir=tmp_path), Said())


def test_the_root_is_here_where_home_cannot_be_written(home, downloads, monkeypatch):
    really = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "home" not in str(path) and really(path, mode))
    said = Said()
    train, _ = locate(replace(CIFAR, dataset_download=True), said)
    assert said[0] == f"CIFAR-100: data root data (since {home} cannot be written; --data-dir chooses another)"
    assert train == Path("data/cifar100.lowrank_vit/train.beton")


def test_the_root_is_where_cifar100_is(home, downloads):
    write_archive(Path("data"))
    said = Said()
    locate(replace(CIFAR, dataset_download=True), said)
    assert said[0] == "CIFAR-100: data root data (CIFAR-100 is there; --data-dir chooses another)"
    assert not downloads


def test_a_root_that_cannot_be_written_needs_another_place(tmp_path, monkeypatch):
    write_archive(tmp_path / "root")
    really = Path.mkdir

    def mkdir(path: Path, *args, **kwargs) -> None:
        if path.parent.name == "root":
            raise OSError(30, "Read-only file system")
        really(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    options = replace(CIFAR, data_dir=tmp_path / "root")
    with pytest.raises(UserError, match=r"cifar100\.lowrank_vit cannot be written: Read-only file system.*--beton-dir"):
        locate(options, Said())
    train, _ = locate(replace(options, beton_dir=tmp_path / "mine"), Said())
    assert train == tmp_path / "mine" / "train.beton"


def test_files_converted_by_hand_are_taken(tmp_path):
    convert_cifar100(write_archive(tmp_path / "src"), tmp_path / "done")
    said = Said()
    assert locate(replace(CIFAR, data_dir=tmp_path / "done"), said)[0] == tmp_path / "done" / "train.beton"
    assert len(said) == 1


def test_files_of_other_data_are_not_taken_for_cifar100(tmp_path):
    convert_digits(tmp_path)
    with pytest.raises(UserError, match="holds neither cifar-100-python/"):
        locate(replace(CIFAR, data_dir=tmp_path), Said())
    write_archive(tmp_path)
    assert Beton(locate(replace(CIFAR, data_dir=tmp_path), Said())[0]).num_classes == 100
    before = (tmp_path / "train.beton").read_bytes()
    with pytest.raises(UserError, match=r"holds a train\.beton or val\.beton of other data\. Give another --beton-dir"):
        locate(replace(CIFAR, data_dir=tmp_path / "cifar-100-python.tar.gz", beton_dir=tmp_path), Said())
    assert (tmp_path / "train.beton").read_bytes() == before


@pytest.mark.parametrize("change", ["new archive", "cut", "no manifest"])
def test_what_is_not_as_it_was_is_converted_again(tmp_path, change):
    archive, options = write_archive(tmp_path), replace(CIFAR, data_dir=tmp_path)
    train, _ = locate(options, Said())
    if change == "new archive":
        os.utime(archive, (time.time() + 5, time.time() + 5))
    elif change == "cut":
        os.truncate(train, 5000)
    else:
        train.with_name("train.beton.json").unlink()
        train.unlink()
    said = Said()
    locate(options, said)
    assert said.about("converting")
    assert Beton(train).num_samples == 130


@pytest.mark.parametrize("flags", [{"train_split": "test"}, {"val_split": "train"}, {"val_split": "fold3"}])
def test_splits_that_cifar100_does_not_have(tmp_path, flags):
    write_archive(tmp_path)
    with pytest.raises(UserError, match="CIFAR-100 has the splits train"):
        locate(replace(CIFAR, data_dir=tmp_path, **flags), Said())
    assert locate(replace(CIFAR, data_dir=tmp_path, val_split="test"), Said())[1].exists()


def test_of_several_processes_at_once_one_converts(tmp_path):
    write_archive(tmp_path)
    code = f"""
from pathlib import Path
from lowrank_vit.data.sets.datasets import DataOptions, locate
print(locate(DataOptions("torch/cifar100", Path({str(tmp_path)!r})))[0].stat().st_ino)
"""
    said = run_at_once(code)
    assert sum("converting" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1


def test_files_that_another_process_is_finishing_are_waited_for(tmp_path):
    """Between two renames the other process's file is there without its manifest: not other data."""
    archive = write_archive(tmp_path)
    convert_cifar100(archive, tmp_path / "elsewhere")
    finished = sorted((tmp_path / "elsewhere").iterdir())
    place, said, waits = tmp_path / cifar.FOLDER, Said(), Event()

    def say(line: str) -> None:
        said(line)
        if "waiting for" in line:
            waits.set()

    with ThreadPoolExecutor() as threads:
        with one_process_in(place, Said(), ""):
            copy2(tmp_path / "elsewhere" / "train.beton", place)
            asked = threads.submit(locate, replace(CIFAR, data_dir=tmp_path), say)
            assert waits.wait(LONG_S), said
            for path in finished:
                copy2(path, place)
        assert asked.result(LONG_S)[0] == place / "train.beton"
    assert not said.about("converting")


def test_an_archive_that_is_none_is_refused(tmp_path):
    with tarfile.open(tmp_path / NAME, "w:gz"):
        pass
    with pytest.raises(UserError, match=r"not an official CIFAR-100 archive"):
        locate(replace(CIFAR, data_dir=tmp_path), Said())
    assert not list((tmp_path / cifar.FOLDER).glob("*.beton"))
