"""Which `.beton` files the data flags mean: files that are there, digits, folders by timm's names, and wrong uses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.formats.sidecars import read_manifest
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, locate, locate_validation, open_datasets
from tests.photos import NUM_PHOTOS
from tests.sources import Said, run_at_once, write_archive, write_splits


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folder(images, tmp_path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def refused(options: DataOptions) -> str:
    with pytest.raises(UserError) as caught:
        locate(options, Said())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_betons_that_are_there_are_taken(digits_dir):
    said = Said()
    for dataset in ("", "folder", "imagefolder", "torch/image_folder"):
        options = DataOptions(dataset, digits_dir)
        assert locate(options, said) == (digits_dir / "train.beton", digits_dir / "val.beton")
    assert not said


def test_betons_are_found_by_the_names_of_splits_too(digits_dir, tmp_path):
    for name, copy in (("train", "training"), ("val", "validation"), ("val", "test")):
        shutil.copy(digits_dir / f"{name}.beton", tmp_path / f"{copy}.beton")
    options = DataOptions(data_dir=tmp_path)
    assert [path.name for path in locate(options, Said())] == ["training.beton", "validation.beton"]
    assert [path.name for path in locate(replace(options, val_split="test"), Said())] == [
        "training.beton",
        "test.beton",
    ]


def test_betons_win_over_images_beside_them(folder, digits_dir):
    for name in ("train", "val"):
        shutil.copy(digits_dir / f"{name}.beton", folder)
    assert locate(DataOptions(data_dir=folder), Said()) == (folder / "train.beton", folder / "val.beton")


def test_digits_are_written_once_by_one_of_several_processes(tmp_path):
    code = f"""
from pathlib import Path
from lowrank_vit.data.sets.datasets import DataOptions, locate
train, val = locate(DataOptions("digits", Path({str(tmp_path / "digits")!r})))
print(train.stat().st_ino)
"""
    assert len({text.splitlines()[-1] for text in run_at_once(code)}) == 1


def test_digits_of_which_a_kill_has_left_the_first_set_alone_are_written_and_a_users_file_is_left(digits_dir, tmp_path):
    whole = shutil.copytree(digits_dir, tmp_path / "killed")
    for path in whole.glob("val.beton*"):
        path.unlink()
    train, val = locate(DataOptions("digits", whole), Said())
    assert (train.read_bytes(), val.read_bytes()) == tuple(
        (digits_dir / f"{name}.beton").read_bytes() for name in ("train", "val")
    )
    (tmp_path / "own").mkdir()
    shutil.copy(digits_dir / "val.beton", tmp_path / "own" / "train.beton")  # whose is it, without a manifest
    before = train.stat().st_mtime_ns
    assert not locate(DataOptions("digits", tmp_path / "own"), Said())[1].exists()
    assert locate(DataOptions("digits", whole), Said()) == (train, val)
    assert train.stat().st_mtime_ns == before


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation"])
def test_timms_names_of_splits(images, tmp_path, train, val):
    (tmp_path / train).symlink_to(images / "train")
    (tmp_path / val).symlink_to(images / "val")
    assert [path.name for path in locate(DataOptions(data_dir=tmp_path), Said())] == [f"{train}.beton", f"{val}.beton"]


def test_the_exact_name_wins_over_its_synonyms(folder):
    shutil.copytree(folder / "val", folder / "validation")
    options = DataOptions(data_dir=folder)
    assert locate(options, Said())[1].name == "validation.beton"  # the default's own name
    assert locate(replace(options, val_split="val"), Said())[1].name == "val.beton"
    assert locate(replace(options, val_split="eval"), Said())[1].name == "val.beton"


def test_a_test_set_validates_where_there_is_no_other_and_that_is_said(folder):
    (folder / "val").rename(folder / "test")
    said = Said()
    assert locate(DataOptions(data_dir=folder), said)[1].name == "test.beton"
    assert said.about("validating on test/ (--val-split chooses)")
    shutil.copytree(folder / "test", folder / "val")
    said.clear()
    assert locate(DataOptions(data_dir=folder), said)[1].name == "val.beton"
    assert not said.about("validating")


def test_splits_of_any_name(folder):
    (folder / "train").rename(folder / "in_distribution")
    (folder / "val").rename(folder / "sketches")
    options = DataOptions(data_dir=folder, train_split="in_distribution", val_split="sketches")
    assert [path.name for path in locate(options, Said())] == ["in_distribution.beton", "sketches.beton"]
    same = replace(options, val_split="in_distribution")
    assert [path.name for path in locate(same, Said())] == ["in_distribution.beton"] * 2


@pytest.mark.parametrize("name", ["", "..", "a/b", "/train"])
def test_a_split_is_a_name(folder, name):
    assert f"--val-split '{name}' must be the name of a folder" in refused(DataOptions(data_dir=folder, val_split=name))


def test_what_is_missing_is_named(folder, tmp_path):
    message = refused(DataOptions(data_dir=tmp_path / "nowhere"))
    assert "nowhere does not exist" in message
    assert "--dataset digits" in message
    (tmp_path / "file").touch()
    assert "file is a file, not a folder" in refused(DataOptions(data_dir=tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    message = refused(DataOptions(data_dir=tmp_path / "empty"))
    assert "there is neither train.beton nor a folder of images named train; it has no folders" in message
    assert "flower, temple" in refused(DataOptions(data_dir=folder / "train"))  # classes without a split
    shutil.rmtree(folder / "val")
    message = refused(DataOptions(data_dir=folder))
    assert (
        "has no folder for --val-split validation (nor val, valid, eval, evaluation, test); it holds train." in message
    )
    assert "name another folder with --val-split" in message
    (folder / "train").rename(folder / "val")
    assert "has no folder for --train-split train (nor training); it holds val." in refused(
        DataOptions(data_dir=folder)
    )
    assert not (folder / ".lowrank_vit").exists()


def test_half_a_set_of_betons_is_named(digits_dir, tmp_path):
    shutil.copy(digits_dir / "train.beton", tmp_path)
    with pytest.raises(UserError, match=r"val\.beton does not exist\. Write it with `python -m data_prep"):
        open_datasets(DataOptions(data_dir=tmp_path), None, say=Said())


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("torch/cifar10", "python -m data_prep torch MODULE:FUNCTION"),
        ("hfds", "hfds/NAME and hfids/NAME (Hugging Face's)"),
        ("tfds/imagenet", "There are: folder (the default"),
        ("tfds/cifar100", "torch/cifar100, digits"),
        ("cifar100", "Did you mean torch/cifar100?"),
    ],
)
def test_data_sets_that_are_not_there(dataset, said):
    message = refused(DataOptions(dataset))
    assert f"--dataset {dataset} is not there" in message
    assert said in message


def test_an_archive_taken_for_a_folder_is_recognised(tmp_path):
    write_archive(tmp_path)
    assert "holds CIFAR-100's archive. Add --dataset torch/cifar100" in refused(DataOptions(data_dir=tmp_path))


@pytest.mark.parametrize("given", ["file", "parts", "splits", "classes", "betons"])
def test_validation_takes_what_it_is_given(folder, digits_dir, tmp_path, given):
    wanted, expected = {
        "file": (digits_dir / "val.beton", digits_dir / "val.beton"),
        "parts": (tmp_path / "parted.beton", tmp_path / "parted.beton"),
        "splits": (folder, folder / ".lowrank_vit" / "val.beton"),
        "classes": (folder / "val", folder / ".lowrank_vit" / "val.beton"),
        "betons": (digits_dir, digits_dir / "val.beton"),
    }[given]
    shutil.copy(digits_dir / "val.beton", tmp_path / "parted-1-of-1.beton")
    assert locate_validation(wanted, DataOptions(), Said()) == expected
    assert Beton(expected).num_samples == (NUM_PHOTOS if given in ("splits", "classes") else 360)


@pytest.mark.parametrize("name", ["test", "val", "eval"])
def test_a_class_may_have_the_name_of_a_split(folder, name):
    (folder / "val" / "flower").rename(folder / "val" / name)
    for _ in range(2):
        found = locate_validation(folder / "val", DataOptions(), Said())
        assert read_manifest(found).classes == tuple(sorted((name, "temple")))
    shutil.copytree(folder / "train", folder / "val" / "inner")
    shutil.rmtree(folder / "val" / name)
    (folder / "val" / "inner").rename(folder / "val" / name)  # it holds folders now: a split
    assert locate_validation(folder / "val", DataOptions(), Said()).parent == folder / "val" / ".lowrank_vit"


def test_validation_converts_its_own_split_only(folder):
    shutil.rmtree(folder / "train")
    assert locate_validation(folder, DataOptions(), Said()) == folder / ".lowrank_vit" / "val.beton"
    assert not (folder / ".lowrank_vit" / "train.beton").exists()
    assert locate_validation(None, DataOptions(data_dir=folder), Said()) == folder / ".lowrank_vit" / "val.beton"


@pytest.mark.parametrize("given", ["splits", "classes"])
def test_validation_leaves_bad_images_out_on_request(folder, given):
    (folder / "val" / "temple" / "00.jpg").write_bytes(b"no image")
    path = folder if given == "splits" else folder / "val"
    with pytest.raises(UserError, match=r"temple/00\.jpg"):
        locate_validation(path, DataOptions(), Said())
    assert Beton(locate_validation(path, DataOptions(on_bad="skip"), Said())).num_samples == NUM_PHOTOS - 1


def test_validation_of_what_is_not_there(tmp_path, folder):
    for wanted, message in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (folder / "val" / "flower", "flower has no class folders"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            locate_validation(wanted, DataOptions(), Said())
        assert "--src" not in str(caught.value)
    assert not (folder / "val" / ".lowrank_vit").exists()
