"""Validation sets keep their images' own pixels, training sets need not; and what a set has lost is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.convert import convert_image_folder, convert_splits
from data_prep.formats.beton import MODE_JPEG, MODE_RAW
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.sidecars import manifest_path, read_manifest, write_manifest
from lowrank_vit.data.decode.pil import decode
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, locate, locate_validation
from lowrank_vit.data.sets.provenance import remarks
from tests.sources import Said, write_splits


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_splits(tmp_path / "images")


def add_other_images(split: Path) -> None:
    """A photograph larger than training keeps, a PNG, and a grey JPEG."""
    photo = load_sample_images().images[0]
    Image.fromarray(photo).save(split / "temple" / "large.jpg", quality=92)
    Image.fromarray(photo[:90, :120]).save(split / "temple" / "small.png")
    Image.fromarray(photo[:90, :120, 0]).save(split / "temple" / "grey.jpg")


def test_scores_are_of_the_images_own_pixels(folder):
    """What is trained on may be smaller; what is scored is byte for byte, or raw."""
    for split in ("train", "val"):
        add_other_images(folder / split)
    train, val = map(Beton, locate(DataOptions(data_dir=folder), Said()))
    names = [val.describe(n).rpartition("temple/")[2].rstrip(")") for n in range(val.num_samples)]
    large, small, grey = (names.index(name) for name in ("large.jpg", "small.png", "grey.jpg"))
    assert (train.widths[large], val.widths[large]) == (500, 640)
    assert val.sample(large).tobytes() == (folder / "val" / "temple" / "large.jpg").read_bytes()
    assert (train.modes[small], val.modes[small]) == (MODE_JPEG, MODE_RAW)
    with Image.open(folder / "val" / "temple" / "small.png") as image:
        assert decode(val, small).tobytes() == np.asarray(image).tobytes()
    with Image.open(folder / "val" / "temple" / "grey.jpg") as image:
        error = np.abs(decode(val, grey).astype(int) - np.asarray(image.convert("RGB")))
    assert error.max() <= 2
    said = Said()
    locate(DataOptions(data_dir=folder), said)
    assert not said


def test_a_validation_set_of_earlier_times_is_made_again_where_that_changes_it(folder):
    """By the converter's defaults; where all its images are the files themselves nothing would change."""
    place, options, said = folder / ".lowrank_vit", DataOptions(data_dir=folder), Said()
    convert_splits(folder, place, val_image=ImageOptions(), workers=1)
    locate(options, said)
    assert not said
    for split in ("train", "val"):
        add_other_images(folder / split)
    convert_splits(folder, place, val_image=ImageOptions(), workers=1)
    before = (place / "train.beton").stat()
    _, val = locate(options, said)
    assert said[0] == f"converting {folder}/val into {place} (again, since scores are of the images' own pixels)"
    assert read_manifest(val).options["lossless"]
    assert (place / "train.beton").stat() == before


def test_scoring_a_training_set_leaves_it_as_it_is(folder):
    add_other_images(folder / "train")
    train, _ = locate(DataOptions(data_dir=folder), Said())
    before = train.stat()
    for given, split in ((folder, "train"), (folder / "train", "validation")):
        scored = locate_validation(given, DataOptions(val_split=split), Said())
        assert scored == folder / ".lowrank_vit" / "train.lossless.beton"
        assert Beton(scored).widths.max() == 640
    assert train.stat() == before


def test_what_scores_are_not_of_is_said(folder, tmp_path):
    add_other_images(folder / "val")
    _, val = locate(DataOptions(data_dir=folder), Said())
    line = "val.beton: 1 of 27 images were encoded again, at quality 100 (1 gray)"
    assert remarks(Beton(val), 224, 0.875) == [line]
    old = convert_image_folder(folder / "val", tmp_path / "old.beton", workers=1).beton
    (one, other) = remarks(Beton(old), 448, 0.9)
    assert one.startswith(
        "old.beton: 3 of 27 images are not the original pixels: they were encoded again, at quality 90"
    )
    assert "1 resized" in one
    assert "1 of 27 images were made smaller" in other
    assert other.endswith("(--max-side 500) and are now enlarged: --img-size 448 needs a short side of 497 pixels")
    assert len(remarks(Beton(old), 224, 0.9)) == 1
    raw = convert_image_folder(folder / "val", tmp_path / "raw.beton", workers=1, image=ImageOptions(raw=32)).beton
    assert "squares of 32 pixels" in remarks(Beton(raw), 32, 0.9)[0]


def test_what_an_earlier_converter_took_for_whole_is_said(folder, tmp_path):
    """Runs of overwritten bytes passed as "extraneous" then."""
    beton = convert_image_folder(folder / "val", tmp_path / "old.beton", workers=1).beton
    old = replace(read_manifest(beton), converter_version=2, reasons={"passthrough": 22, "extraneous": 2})
    write_manifest(manifest_path(beton), old)
    (line, _) = remarks(Beton(beton), 224, 0.875)
    assert line.startswith("old.beton: 2 images have surplus bytes")
