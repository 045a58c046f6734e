"""What is listed of a tree of class folders: classes, splits, files, and what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.convert import convert_image_folder, convert_splits
from data_prep.formats.sidecars import read_manifest
from data_prep.sources.image_folder import image_folder, split_folders
from data_prep.sources.samples import FileList, Sample, file_list_sha256, shard
from lowrank_vit.common.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes; 5 + 5 + 60 files with image names."""
    for name, count in (("ant", 5), ("bee", 5), ("cat", 60)):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "src" / name / f"{i:03d}.jpg").write_bytes(b"\xff\xd8 not read here")
    return tmp_path / "src"


def test_folder_is_listed_in_sorted_order(folder: Path) -> None:
    (folder / "bee" / "deeper" / "still").mkdir(parents=True)
    (folder / "bee" / "000.jpg").rename(folder / "bee" / "deeper" / "still" / "000.JPEG")
    (folder / "bee" / "notes.txt").write_text("not an image")
    (folder / "bee" / "._001.jpg").write_bytes(b"left by another file manager")
    (folder / ".cache").mkdir()
    (folder / "bee" / "again").symlink_to(folder / "bee")
    source = image_folder(folder, nested="top")
    assert source.classes == ("ant", "bee", "cat")
    assert image_folder(folder).classes == ("ant", "bee", "cat", "still")
    assert source.name == str(folder)
    bees = [sample.name for sample in source.samples if sample.label == 1]
    assert bees == ["bee/001.jpg", "bee/002.jpg", "bee/003.jpg", "bee/004.jpg", "bee/deeper/still/000.JPEG"]
    assert [sample.label for sample in source.samples] == [0] * 5 + [1] * 5 + [2] * 60


def test_class_folders_may_be_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "bee").symlink_to(folder / "bee")
    assert len(image_folder(tmp_path / "subset").samples) == 5


def test_subset_of_classes_is_sorted_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\ufeffcat\r\n\r\nant\r\n", encoding="utf-8")
    source = image_folder(folder, tmp_path / "classes.txt")
    assert source.classes == ("ant", "cat")
    assert {sample.label for sample in source.samples if sample.name.startswith("cat/")} == {1}


def test_source_errors_name_the_thing(folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "classes.txt"
    with pytest.raises(UserError, match=r"none does not exist"):
        image_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"000\.jpg is not a directory"):
        image_folder(folder / "ant" / "000.jpg")
    with pytest.raises(UserError, match="ant has no class folders"):
        image_folder(folder / "ant")
    listing.write_text("ant\ndog\n")
    with pytest.raises(UserError, match=r"lacks 1 of the 2 classes .*: dog"):
        image_folder(folder, listing)
    listing.write_text("\n")
    with pytest.raises(UserError, match="names no class"):
        image_folder(folder, listing)
    with pytest.raises(UserError, match="cannot be read"):
        image_folder(folder, tmp_path / "none.txt")
    with pytest.raises(UserError, match="not UTF-8"):
        image_folder(folder, folder / "ant" / "000.jpg")
    (folder / "dog").mkdir()
    with pytest.raises(UserError, match="dog holds no image"):
        image_folder(folder)
    (tmp_path / "root").mkdir()
    folder.rename(tmp_path / "root" / "train")
    with pytest.raises(UserError, match=r"look like splits.*--src .*train"):
        image_folder(tmp_path / "root")


def tree(root: Path, *folders: str) -> Path:
    """Folders with one small image each."""
    for name in folders:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (24, 16), "green").save(root / name / "a.jpg")
    return root


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation"])
def test_splits_have_timms_names(tmp_path: Path, train: str, val: str) -> None:
    tree(tmp_path, f"{train}/ant", f"{val}/ant", "docs/x")
    assert split_folders(tmp_path) == {"train": tmp_path / train, "val": tmp_path / val}


def test_a_test_set_is_no_validation_set(tmp_path: Path) -> None:
    tree(tmp_path, "test/ant", "train/ant")
    assert split_folders(tmp_path) == {"train": tmp_path / "train"}


def test_both_splits_in_one_command(tmp_path: Path) -> None:
    tree(tmp_path / "src", "train/ant", "train/bee", "validation/ant", "validation/bee")
    conversions = convert_splits(tmp_path / "src", tmp_path / "out", workers=1)
    assert [c.beton.name for c in conversions] == ["train.beton", "val.beton"]
    assert all(read_manifest(c.beton).classes == ("ant", "bee") for c in conversions)
    assert read_manifest(conversions[1].beton).source == str(tmp_path / "src" / "validation")


def test_splits_must_have_the_same_classes(tmp_path: Path) -> None:
    tree(tmp_path / "src", "train/ant", "train/bee", "val/ant", "val/cat")
    with pytest.raises(UserError, match=r"different classes.*former has bee; .*latter has cat\."):
        convert_splits(tmp_path / "src", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "classes.txt").write_text("ant\n")
    assert len(convert_splits(tmp_path / "src", tmp_path / "out", classes=tmp_path / "classes.txt", workers=1)) == 2


def test_a_listed_class_that_one_split_lacks_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "src", "train/ant", "train/bee", "val/ant")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=r"val lacks 1 of the 2 classes .*: bee"):
        convert_splits(tmp_path / "src", tmp_path / "out", classes=tmp_path / "classes.txt", workers=1)


def test_the_imagenet100_list_has_100_classes() -> None:
    listed = (Path(__file__).parents[4] / "configs" / "imagenet100_classes.txt").read_text().split()
    assert len(set(listed)) == len(listed) == 100
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in listed)


def test_imagenet100_is_chosen_out_of_imagenet(tmp_path: Path) -> None:
    listing = Path(__file__).parents[4] / "configs" / "imagenet100_classes.txt"
    names = listing.read_text().split()
    tree(tmp_path / "src", *(f"{split}/{name}" for split in ("train", "val") for name in [*names, "n00000000"]))
    conversions = convert_splits(tmp_path / "src", tmp_path / "out", classes=listing, workers=1)
    assert [c.manifest.num_samples for c in conversions] == [100, 100]
    assert conversions[0].manifest.classes == tuple(sorted(names))


def test_the_flat_validation_archive_of_imagenet_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(UserError, match="sort it by its ground truth first"):
        image_folder(tmp_path)


def test_names_with_spaces_and_of_any_alphabet_and_encoding(tmp_path: Path) -> None:
    names = ["two words.jpg", "类.jpg", "é.jpg", "new\nline.jpg", os.fsdecode(b"\xff\xfe.jpg")]
    folder = tmp_path / "src" / "ein Ü"
    folder.mkdir(parents=True)
    for n, name in enumerate(names):
        Image.new("RGB", (24, 16 + n), "green").save(folder / "x.jpg")
        (folder / "x.jpg").rename(folder / name)
    conversion = convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=2)
    assert conversion.manifest.num_samples == 5
    assert conversion.manifest.classes == ("ein Ü",)


def test_a_loop_of_links_ends(folder: Path) -> None:
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "ant" / "me.jpg").symlink_to(folder / "ant" / "me.jpg")
    listed = [sample.name for sample in image_folder(folder).samples if sample.label == 0]
    assert listed.count("ant/000.jpg") == 1
    with pytest.raises(UserError, match="cannot be read: Too many levels of symbolic links"):
        convert_image_folder(folder, folder.parent / "a.beton", workers=1, on_bad="skip")


def test_a_file_list_is_the_list_it_was_packed_from() -> None:
    rng = np.random.default_rng(0)
    samples = [Sample(int(n), f"class {n}/{i}" + "é" * int(n % 3)) for i, n in enumerate(rng.integers(0, 9, 500))]
    files = FileList.pack((s.label, s.name) for s in samples)
    assert len(files) == 500
    assert list(files) == samples
    assert [files[i] for i in (0, 7, 499, -1)] == [samples[i] for i in (0, 7, 499, -1)]
    assert list(files[100:333]) == samples[100:333]
    assert file_list_sha256(files) == file_list_sha256(samples)
    assert file_list_sha256(files[1:]) != file_list_sha256(samples)
    with pytest.raises(IndexError):
        files[500]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_shards_in_order_are_the_whole(count: int) -> None:
    files = FileList.pack((0, str(i)) for i in range(500))
    parts = [shard(files, i, count) for i in range(1, count + 1)]
    assert [s for part in parts for s in part] == list(files)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
