"""The index: what a `.beton` and its manifest say, and files that contradict one another."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import HEADER, METADATA_START, SAMPLE
from data_prep.formats.sidecars import manifest_path, read_manifest, write_manifest
from data_prep.verify import verify
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, open_datasets
from lowrank_vit.plan.plans import TrainPlan, TrainRules


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
    assert open_datasets(DataOptions("", tmp_path), 10)[2] == 10
    assert open_datasets(DataOptions("", tmp_path), 12, larger_head=True)[2] == 12
    with pytest.raises(UserError, match=r"--num-classes 12 is too large: .* 10 classes \(0, 1, .* --larger-head"):
        open_datasets(DataOptions("", tmp_path), 12)
    with pytest.raises(UserError, match=r"--num-classes 5 is too small: .* 10 classes"):
        open_datasets(DataOptions("", tmp_path), 5)
    path = tmp_path / "val.beton.json"
    manifest = read_manifest(tmp_path / "val.beton")
    write_manifest(path, replace(manifest, classes=tuple("drei" if c == "3" else c for c in manifest.classes)))
    with pytest.raises(UserError, match=r"different classes.*only the latter has drei.*--trust-labels"):
        open_datasets(DataOptions("", tmp_path), None)
    said: list[str] = []
    _, val, _ = open_datasets(DataOptions("", tmp_path, trust_labels=True), None, say=said.append)
    assert val.labels.tolist() == Beton(digits_dir / "val.beton").labels.tolist()
    assert said == [f"label N of {val.path} is taken for label N of {tmp_path / 'train.beton'} (--trust-labels)"]


def test_digits_are_never_written_over_a_file_of_the_users(digits_dir, tmp_path):
    shutil.copy(digits_dir / "val.beton", tmp_path / "train.beton")
    before = (tmp_path / "train.beton").read_bytes()
    with pytest.raises(UserError, match=r"val.beton does not exist"):
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


def with_row(path: Path, sample_id: int, **values: int) -> Path:
    """Change fields of a sample's row in the file."""
    content = bytearray(path.read_bytes())
    row = np.frombuffer(content, SAMPLE, count=1, offset=METADATA_START + sample_id * SAMPLE.itemsize)
    for name, value in values.items():
        (row if name == "label" else row["image"])[name] = value
    path.write_bytes(content)
    return path


@pytest.fixture
def digits(digits_dir, tmp_path) -> Path:
    """A copy of the validation digits with its sidecars."""
    for path in digits_dir.glob("val.beton*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "val.beton"


def make_earlier(beton: Path, **others: object) -> None:
    """Give `beton` a manifest as versions without a checksum of the index wrote it."""
    path = manifest_path(beton)
    content = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "index_xxh3"}
    path.write_text(json.dumps({**content, **others, "manifest_sha256": ""}))


@pytest.mark.parametrize("change", [{"label": 3}, {"height": 4, "width": 16}, {"data_ptr": 0}])
def test_a_changed_index_is_refused_at_opening(digits, change):
    with_row(digits, 7, **change)
    with pytest.raises(BetonError, match=r"val.beton: (its index .* is not the one that was written|sample 7 lies)"):
        Beton(digits)


def test_descriptors_and_allocation_table_are_part_of_the_index(digits):
    content = bytearray(digits.read_bytes())
    content[HEADER.itemsize + 1] ^= 1  # the name of a field, which nobody reads
    digits.write_bytes(content)
    with pytest.raises(BetonError, match="its index"):
        Beton(digits)
    assert not Beton(digits.rename(digits.with_name("other.beton"))).manifest


def test_an_index_that_nothing_vouches_for_is_said_until_it_is_verified(digits, capsys):
    assert Beton(digits).unverified == ""
    make_earlier(digits, some_later_key=[1])
    assert "val.beton: index not verified" in Beton(digits).unverified
    main(["info", str(digits)])
    main(["verify", str(digits)])
    assert "not verified" in capsys.readouterr().out
    assert Beton(digits).unverified == ""
    assert json.loads(manifest_path(digits).read_bytes())["some_later_key"] == [1]
    with_row(digits, 7, label=3)
    with pytest.raises(BetonError, match="its index"):
        Beton(digits)
    manifest_path(digits).unlink()
    assert "no manifest" in Beton(digits).unverified


def test_a_damaged_file_gets_no_checksum(digits):
    make_earlier(digits)
    with_row(digits, 7, label=3)
    with pytest.raises(BetonError, match=r"sample 7 .*its bytes are not those that were written"):
        verify(digits)
    assert "not verified" in Beton(digits).unverified


@pytest.mark.parametrize("claimed", ["", "0", "G" * 16, "A" * 16, 5, None])
def test_a_manifest_that_claims_a_checksum_must_have_one(digits, claimed):
    make_earlier(digits, index_xxh3=claimed)
    with pytest.raises(BetonError, match="not a manifest of this version: index_xxh3 is"):
        Beton(digits)


def test_a_checksum_of_another_index_is_refused_by_verify_too(digits):
    write_manifest(manifest_path(digits), replace(read_manifest(digits), index_xxh3="0" * 16))
    for read in (Beton, verify):
        with pytest.raises(BetonError, match="its index"):
            read(digits)


def test_a_label_beyond_the_classes_is_found_at_opening(digits):
    make_earlier(digits)
    with_row(digits, 7, label=10)
    with pytest.raises(BetonError, match=r"sample 7 .* has the label 10, but its manifest names 10 classes"):
        Beton(digits)
    manifest_path(digits).unlink()
    assert Beton(digits).num_classes == 11
    with_row(digits, 7, label=1 << 32)
    with pytest.raises(BetonError, match=r"sample 7 has the label 4294967296, but there is no manifest"):
        Beton(digits)


def test_an_id_that_no_sample_has_is_refused(beton):
    for wrong in (-1, beton.num_samples, 10**9, "0", 1.0, None):
        with pytest.raises(UserError, match=f"sample_id takes a whole number from 0 to {beton.num_samples - 1}, not "):
            beton.sample(wrong)
    assert np.array_equal(beton.sample(np.int32(0)), beton.sample(0))


def test_what_is_no_file_is_told_as_what_it_is():
    with pytest.raises(BetonError, match="/dev/null is a device or a pipe"):
        Beton("/dev/null")
    for wrong in (None, 3, [], ["a.beton"]):
        with pytest.raises(UserError, match=r"^path takes a path"):
            Beton(wrong)  # type: ignore[arg-type]
