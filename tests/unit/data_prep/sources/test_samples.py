"""Class folders get the labels that timm gives them, at any depth; what timm would read otherwise is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key as timms_key

from data_prep.convert import convert_image_folder, convert_splits
from data_prep.formats.sidecars import read_manifest
from data_prep.sources.image_folder import image_folder
from data_prep.sources.samples import Source, imagenet1k, in_timms_order, natural_key, positions, ties
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, locate
from tests.sources import Said

NAMES = {
    "numbers": [str(n) for n in range(12)],
    "mixed case": ["apple", "Bear", "cat", "Dog"],
    "leading zeros": ["010", "9", "08", "100"],
    "numbers inside": ["img12b", "img2b", "img12a", "v1.10", "v1.9", "2 dogs", "10 cats"],
    "alphabets": ["Ärger", "zebra", "ähre", "类", "Ñu", "nu", "ß", "١٢", "٢"],
    "wnids": ["n02869837", "n01749939", "n00000001"],
    "signs": ["_a", "a b", "a-b", "A_b", "#1", "~", "+"],
}


def files(root: Path, *paths: str) -> Path:
    """Empty files, which are listed and not read."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def labels(source: Source) -> dict[str, int]:
    return {sample.name: sample.label for sample in source.samples}


def timms(root: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What timm makes of a folder: the label of each file, and of each class."""
    samples, classes = find_images_and_targets(str(root))
    return {os.path.relpath(path, root): label for path, label in samples}, classes


@pytest.mark.parametrize("names", NAMES.values(), ids=list(NAMES))
def test_labels_are_timms(tmp_path, names):
    source = image_folder(files(tmp_path, *(f"{name}/{n}.jpg" for name in names for n in range(2))))
    assert (labels(source), {name: n for n, name in enumerate(source.classes)}) == timms(tmp_path)
    assert source.remarks == ()


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=("Cs", "No")), max_size=8))
def test_the_key_is_timms(name):
    assert natural_key(name) == timms_key(name)


def test_a_digit_that_is_no_number_does_not_stop_it():
    with pytest.raises(ValueError, match="invalid literal"):
        timms_key("1²")
    assert in_timms_order(["1²", "²", "1"]) == ["1", "1²", "²"]


def test_ties_are_broken_by_code_point_and_said(tmp_path):
    source = image_folder(files(tmp_path, "dog/a.jpg", "Dog/a.jpg", "01/a.jpg", "1/a.jpg", "cat/a.jpg"))
    assert source.classes == ("01", "1", "cat", "Dog", "dog")
    assert ties(source.classes) == [["01", "1"], ["Dog", "dog"]]
    assert [remark.split(", so timm")[0] for remark in source.remarks] == [
        "warning: timm's order does not distinguish the class folders 01 and 1",
        "warning: timm's order does not distinguish the class folders Dog and dog",
    ]


def test_the_list_of_imagenet_1k_is_timms():
    assert list(imagenet1k()) == ImageNetInfo("imagenet-1k").label_names()
    assert in_timms_order(imagenet1k()) == sorted(imagenet1k()) == list(imagenet1k())


def test_leaf_folders_are_classes_as_in_timm(tmp_path):
    paths = "animal/cat/1.jpg animal/dog/1.jpg plant/tree/oak/1.jpg plant/tree/1.jpg car/1.jpg".split()
    source = image_folder(files(tmp_path, *paths))
    assert source.classes == ("car", "cat", "dog", "oak", "tree")
    assert labels(source) == timms(tmp_path)[0]
    (line,) = source.remarks
    assert "the classes are its 5 folders that hold images, as in timm" in line
    assert "--nested-classes top" in line
    top = image_folder(tmp_path, nested="top")
    assert top.classes == ("animal", "car", "plant")
    assert [sample.name for sample in top.samples if sample.label == 2] == ["plant/tree/1.jpg", "plant/tree/oak/1.jpg"]
    assert top.remarks == ()


def test_equal_names_of_leaf_folders_need_a_word(tmp_path):
    files(tmp_path, "a/x/1.jpg", "b/x/2.jpg", "b/y/3.jpg")
    with pytest.raises(UserError) as caught:
        image_folder(tmp_path)
    for word in (f"{tmp_path}/a/x and {tmp_path}/b/x are both named x", "--nested-classes merge", "top", "(a, b)"):
        assert word in str(caught.value)
    assert (
        labels(image_folder(tmp_path, nested="merge"))
        == timms(tmp_path)[0]
        == {"a/x/1.jpg": 0, "b/x/2.jpg": 0, "b/y/3.jpg": 1}
    )
    assert image_folder(tmp_path, nested="top").classes == ("a", "b")


def test_a_list_chooses_among_nested_classes(tmp_path):
    files(tmp_path / "src", "animal/cat/1.jpg", "animal/dog/1.jpg", "car/1.jpg", "x/car/1.jpg").joinpath(
        "empty"
    ).mkdir()
    (tmp_path / "list").write_text("dog\ncat\n")
    assert image_folder(tmp_path / "src", tmp_path / "list", "merge").classes == ("cat", "dog")
    (tmp_path / "list").write_text("animal\n")
    with pytest.raises(UserError, match=r"src/animal, which .*list names, holds no image itself .*\(cat, dog\)"):
        image_folder(tmp_path / "src", tmp_path / "list")
    assert image_folder(tmp_path / "src", tmp_path / "list", "top").classes == ("animal",)
    files(tmp_path / "src", "animal/1.jpg")
    assert (
        "left out the images in animal/cat, animal/dog" in image_folder(tmp_path / "src", tmp_path / "list").remarks[0]
    )


def test_a_class_that_vanishes_is_named(tmp_path, monkeypatch):
    files(tmp_path, "ant/1.jpg", "group/bee/1.jpg")
    for place in ("cat", "group/cat", "ant/deeper"):
        (tmp_path / place).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=rf"{place} is a link to .*nowhere, which does not exist"):
            image_folder(tmp_path)
        (tmp_path / place).unlink()
    for place in ("cat", "group/cat"):
        (tmp_path / place).symlink_to(tmp_path)
        with pytest.raises(UserError, match=rf"{place} is a link to {tmp_path}, a folder above it"):
            image_folder(tmp_path)
        (tmp_path / place).unlink()
    (tmp_path / "group" / "cat").mkdir()
    with pytest.raises(UserError, match="group/cat holds no image"):
        image_folder(tmp_path)
    files(tmp_path, "group/cat/labels.xml")
    with pytest.raises(UserError, match="group/cat holds no image"):
        image_folder(tmp_path)
    (tmp_path / "group" / "cat" / "labels.xml").rename(tmp_path / "ant" / "labels.xml")
    (tmp_path / "group" / "cat").rmdir()
    (tmp_path / "ant" / "empty").mkdir()  # beside images: no class's place
    assert image_folder(tmp_path).classes == ("ant", "bee")
    scandir = os.scandir

    def closed(path: str | Path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"group/bee cannot be listed: Permission denied"):
        image_folder(tmp_path)


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    kept = "ant/1.jpg ant/2.JPE ant/3.jfif ant/4.gif ant/5.avif ant/6.jp2 ant/7.mpo ant/8.PNG bee/1.jpeg".split()
    files(tmp_path, *kept, *(f"ant/{n}.xml" for n in range(3)), "bee/x.TXT", "bee/y.txt", "bee/README", "notes.txt")
    system = ".AppleDouble __MACOSX lost+found .ipynb_checkpoints @eaDir #recycle $RECYCLE.BIN .snapshot".split()
    files(tmp_path, *(f"{name}/1.jpg" for name in [*system, "System Volume Information"]), "ant/@eaDir/1.jpg/x.jpg")
    files(tmp_path, "ant/._1.jpg", "ant/Thumbs.db", "bee/.DS_Store", "bee/desktop.ini")
    source = image_folder(tmp_path)
    assert sorted(labels(source)) == sorted(kept)
    assert source.classes == ("ant", "bee")
    warning, line = source.remarks
    assert warning.startswith("warning: left out #recycle, $RECYCLE.BIN, @eaDir, ... with images inside")
    assert "left out 7 files without an image suffix (3 .txt, 3 .xml, 1 without suffix) and" in line
    assert "system folders (" in line


def test_a_class_may_have_a_name_that_systems_use(tmp_path):
    root = files(
        tmp_path / "src", "recycled/1.jpg", "Recycler/1.jpg", "lost+found/1.jpg", "ant/@eaDir/1.jpg", "ant/1.jpg"
    )
    source = image_folder(root)
    assert source.classes == ("ant", "recycled", "Recycler")
    assert source.remarks[0].startswith("warning: left out lost+found with images inside")
    assert source.remarks[1].endswith("system folders (ant/@eaDir)")
    (tmp_path / "list").write_text("lost+found\n")
    assert image_folder(root, tmp_path / "list").classes == ("lost+found",)
    (tmp_path / "list").write_text("lost+found\nRecycler\n")
    assert image_folder(root, tmp_path / "list").classes == ("lost+found", "Recycler")


def test_a_list_of_classes_may_spell_accents_otherwise_and_near_names_are_said(tmp_path):
    root = files(tmp_path / "src", "e\u0301le\u0301/1.jpg", "in/hiver/1.jpg", "Ours/1.jpg", os.fsdecode(b"f\xe9/1.jpg"))
    (tmp_path / "list").write_text("\u00e9l\u00e9\nhiver\n")
    assert image_folder(root, tmp_path / "list").classes == ("e\u0301le\u0301", "hiver")
    (tmp_path / "list").write_bytes(b"f\xe9\n")
    assert image_folder(root, tmp_path / "list").classes == (os.fsdecode(b"f\xe9"),)
    (tmp_path / "list").write_text("ours\nhivers\nzebra\n")
    with pytest.raises(
        UserError, match=r"names: hivers, ours, zebra\. There is hiver for hivers, Ours for ours\. Check"
    ):
        image_folder(root, tmp_path / "list")
    files(root, "\u00e9l\u00e9/1.jpg")  # both spellings are there: each is meant as it is written
    (tmp_path / "list").write_text("\u00e9l\u00e9\n")
    assert image_folder(root, tmp_path / "list").classes == ("\u00e9l\u00e9",)


def test_classes_that_timm_does_not_see_are_named(tmp_path):
    source = image_folder(files(tmp_path, "ant/1.webp", "ant/2.gif", "bee/1.jpg", "cat/1.bmp", "cat/2.PNG"))
    assert set(source.classes) - set(timms(tmp_path)[1]) == {"ant"}
    (line,) = source.remarks
    assert "does not see the class ant (.gif .webp)" in line
    files(tmp_path, "loose.jpg")
    assert "left out 1 images directly in" in " ".join(image_folder(tmp_path).remarks)
    assert timms(tmp_path)[1][""] == 0


@pytest.mark.parametrize(
    ("folder", "expected"), [("train", "1,281,167"), ("val", "50,000"), ("x", "1,281,167 or 50,000")]
)
def test_imagenet_with_another_count_is_said(tmp_path, monkeypatch, folder, expected):
    root = files(tmp_path / folder, *(f"{name}/1.JPEG" for name in imagenet1k()))
    (line,) = image_folder(root).remarks
    assert f"has ImageNet-1k's classes, but 1,000 images instead of {expected}" in line
    monkeypatch.setattr("data_prep.sources.image_folder._IMAGENET_1K", {"train": 1000, "val": 1000})
    assert image_folder(root).remarks == ()
    files(root, "n99999999/1.JPEG")
    monkeypatch.undo()
    assert image_folder(root).remarks == ()


def test_names_are_found_in_another_order_and_another_encoding():
    assert positions(["b", "a"], ["a", "b", "c"]) == [1, 0]
    assert positions(["é"], ["e", "e\u0301"]) == [1]
    assert positions(["a", "d"], ["a", "b"]) is None
    assert positions(["a"], ["a", "a"]) is None
    assert positions(["\u00e9", "e\u0301"], ["e\u0301", "\u00e9"]) == [1, 0]  # both in one set


def images(root: Path, *names: str) -> Path:
    for n, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (20, 16 + n)).save(root / name / "1.png")
    return root


def test_a_validation_set_may_lack_classes(tmp_path):
    images(tmp_path / "src" / "train", "1", "2", "10", "x")
    images(tmp_path / "src" / "val", "10", "2")
    said = Said()
    for conversion in convert_splits(tmp_path / "src", tmp_path / "out", workers=1, say=said):
        assert conversion.manifest.classes == ("1", "2", "10", "x")
    assert said == [
        f"{tmp_path}/src/val has no image of 2 of the 4 classes of {tmp_path}/src/train (1, x); "
        f"its labels are those of {tmp_path}/src/train"
    ]
    assert Beton(tmp_path / "out" / "val.beton").labels.tolist() == [1, 2]


def test_an_older_set_keeps_its_order(tmp_path, monkeypatch):
    """Converted by an earlier version, it is neither converted again nor read with other labels."""
    root = images(tmp_path / "train", *(str(n) for n in range(12))).parent
    images(root / "val", *(str(n) for n in range(12)))
    with monkeypatch.context() as earlier:
        earlier.setattr("data_prep.sources.image_folder.in_timms_order", sorted)
        paths = locate(DataOptions(data_dir=root), Said())
    assert read_manifest(paths[0]).classes[:3] == ("0", "1", "10")
    said = Said()
    assert locate(DataOptions(data_dir=root), said) == paths
    assert said == []
    images(root / "val", "12")
    images(root / "train", "12")
    locate(DataOptions(data_dir=root), said)
    assert said.about("again, since the classes have changed")
    assert read_manifest(paths[0]).classes[:3] == ("0", "1", "2")


def test_new_formats_are_stored(tmp_path):
    suffixes = "jpe jfif gif avif jp2 tga pcx".split()
    (tmp_path / "src" / "ant").mkdir(parents=True)
    image = Image.radial_gradient("L").convert("RGB")
    for suffix in suffixes:
        image.save(tmp_path / "src" / "ant" / f"1.{suffix}")
    image.save(tmp_path / "x.tga")
    manifest = convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=1).manifest
    assert manifest.num_samples == len(suffixes)
    assert {"avif", "jpeg2000", "other", "passthrough"} <= set(manifest.reasons)
    (tmp_path / "x.tga").rename(tmp_path / "src" / "ant" / "2.jpg")  # a format without a mark of its own
    with pytest.raises(UserError, match=r"2\.jpg: not an image in a known format"):
        convert_image_folder(tmp_path / "src", tmp_path / "b.beton", workers=1)
