"""The index: what a `.beton` and its manifest say, and files that contradict one another."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from data_prep.convert import convert_image_folder
from data_prep.errors import BetonError, UserError
from data_prep.manifest import manifest_path, read_manifest, write_manifest
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.datasets import open_datasets
from lowrank_vit.data.locate import DataOptions
from lowrank_vit.data.plan import TrainPlan, TrainRules


def test_index_of_the_digits(digits_dir):
    beton = Beton(digits_dir / "val.beton")
    assert beton.num_samples == 360
    assert beton.num_classes == 10
    assert beton.is_raw
    assert beton.is_uniform
    assert beton.sample(0).shape == (8 * 8 * 3,)
    pixels = {i.astype(np.uint8).tobytes() for i in np.rint(load_digits(return_X_y=True)[0] * 255 / 16)}
    assert all(beton.sample(i)[::3].tobytes() in pixels for i in range(360))


def test_without_a_manifest_classes_come_from_the_labels(digits_dir, tmp_path):
    shutil.copy(digits_dir / "val.beton", tmp_path)
    beton = Beton(tmp_path / "val.beton")
    assert beton.classes is None
    assert beton.num_classes == 10


def test_a_manifest_of_another_file_is_an_error(digits_dir, tmp_path):
    shutil.copy(digits_dir / "val.beton", tmp_path)
    shutil.copy(digits_dir / "train.beton.json", tmp_path / "val.beton.json")
    with pytest.raises(BetonError, match=r"val.beton does not belong to its manifest"):
        Beton(tmp_path / "val.beton")


def test_datasets_must_agree(digits_dir, tmp_path):
    with pytest.raises(UserError, match=r"neither train.beton nor a folder.*--dataset digits"):
        open_datasets(DataOptions("", tmp_path), None)
    for name in ("train.beton", "val.beton", "train.beton.json", "val.beton.json"):
        shutil.copy(digits_dir / name, tmp_path)
    assert open_datasets(DataOptions("", tmp_path), None)[2] == 10
    assert open_datasets(DataOptions("", tmp_path), 12)[2] == 12
    with pytest.raises(UserError, match=r"--num-classes 5 is too small: .* 10 classes"):
        open_datasets(DataOptions("", tmp_path), 5)
    path = tmp_path / "val.beton.json"
    manifest = read_manifest(tmp_path / "val.beton")
    write_manifest(path, replace(manifest, classes=tuple("drei" if c == "3" else c for c in manifest.classes)))
    with pytest.raises(UserError, match=r"different classes \(3 against drei\)"):
        open_datasets(DataOptions("", tmp_path), None)


def test_digits_are_never_written_over_a_file_of_the_users(digits_dir, tmp_path):
    shutil.copy(digits_dir / "val.beton", tmp_path / "train.beton")
    before = (tmp_path / "train.beton").read_bytes()
    with pytest.raises(UserError, match=r"val.beton is not there"):
        open_datasets(DataOptions("digits", tmp_path), None)
    assert (tmp_path / "train.beton").read_bytes() == before


def test_digits_are_written_on_first_use_only(tmp_path):
    open_datasets(DataOptions("digits", tmp_path), None)
    written = (tmp_path / "train.beton").stat().st_mtime_ns
    open_datasets(DataOptions("digits", tmp_path), None)
    assert (tmp_path / "train.beton").stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    """The same 22 photographs as one JPEG file and as three parts."""
    root = tmp_path_factory.mktemp("parts")
    for label, name in enumerate(("temple", "flower")):
        (root / "src" / name).mkdir(parents=True)
        for n in range(11):
            crop = load_sample_images().images[label][n * 5 : n * 5 + 90 + 3 * n, n * 7 : n * 7 + 120 - 4 * n]
            Image.fromarray(crop).save(root / "src" / name / f"{n:02d}.jpg", quality=95)
    convert_image_folder(root / "src", root / "whole.beton", workers=1)
    for i in (1, 2, 3):
        convert_image_folder(root / "src", root / "train.beton", part=(i, 3), workers=1)
    return root


def test_parts_are_one_set_with_the_same_ids(parted):
    whole, parts = Beton(parted / "whole.beton"), Beton(parted / "train.beton")
    assert [path.name for path in parts.parts] == [f"train-{i}-of-3.beton" for i in (1, 2, 3)]
    assert parts.num_samples == whole.num_samples == 22
    assert parts.classes == whole.classes == ["flower", "temple"]
    for name in ("labels", "heights", "widths", "sizes", "modes"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
    for i in range(22):
        assert np.array_equal(parts.sample(i), whole.sample(i))
    assert not parts.bytes.flags.writeable
    as_list = Beton([parted / f"train-{i}-of-3.beton" for i in (3, 1)])
    assert np.array_equal(as_list.sample(8), whole.sample(0))


def test_a_sample_is_described_by_its_part_and_source(parted):
    parts = Beton(parted / "train.beton")
    words = parts.describe(21)
    assert words.startswith(f"{parted / 'train-3-of-3.beton'}: sample 7 (from {parted / 'src'}")
    assert words.endswith("temple/10.jpg)")


def test_both_orders_of_batches_agree(parted):
    """FFCV's loader decodes parts and whole to the same pixels."""
    decoded = []
    for name in ("whole", "train"):
        beton = Beton(parted / f"{name}.beton")
        plan = TrainPlan(beton.heights, beton.widths, TrainRules(), seed=1, img_size=32, batch_size=11)
        loader, _ = open_loader(beton, plan, torch.device("cpu"), LoaderOptions("ffcv", 1))
        decoded.append(torch.cat([batch.images for batch in loader.batches(0)]))
        loader.close()
    assert torch.equal(*decoded)


def test_parts_that_do_not_belong_together(parted, tmp_path):
    for path in parted.glob("train-*"):
        shutil.copy(path, tmp_path)
    shutil.copy(tmp_path / "train-1-of-3.beton", tmp_path / "train-1-of-2.beton")
    with pytest.raises(BetonError, match="divisions into 2 and 3"):
        Beton(tmp_path / "train.beton")
    (tmp_path / "train-1-of-2.beton").unlink()
    (tmp_path / "train-2-of-3.beton").unlink()
    with pytest.raises(BetonError, match=r"lacks 1 of the 3 parts of train.beton: train-2-of-3.beton"):
        Beton(tmp_path / "train.beton")
    shutil.copy(parted / "train-2-of-3.beton", tmp_path)
    third = tmp_path / "train-3-of-3.beton"
    manifest = read_manifest(third)
    for change, message in (
        ({"classes": ("castle", *manifest.classes[1:])}, "different classes"),
        ({"options": {**manifest.options, "quality": 20}}, "different options"),
        ({"whole_list_sha256": "0"}, "different lists of files"),
        ({"shard": (2, 3)}, r"train-3-of-3\.beton says that it is part 2 of 3"),
    ):
        write_manifest(manifest_path(third), replace(manifest, **change))
        with pytest.raises(BetonError, match=message):
            Beton(tmp_path / "train.beton")
    write_manifest(manifest_path(third), manifest)
    assert Beton(tmp_path / "train.beton").num_samples > 0
    shutil.copy(third, tmp_path / "train.beton")
    with pytest.raises(BetonError, match=r"train\.beton lies beside parts of the same name"):
        Beton(tmp_path / "train.beton")


def test_a_mapped_set_is_given_back(parted):
    """No address space and no descriptor is lost when a set of parts is opened again and again."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    counts = []
    for _ in range(3):
        for _ in range(20):
            Beton(parted / "train.beton").sample(3)
        gc.collect()
        counts.append(maps.read_text().count("train-2-of-3.beton"))
    assert counts[-1] == 0
