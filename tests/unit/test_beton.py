"""The index: what a `.beton` and its manifest say, and files that contradict one another."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_prep.errors import BetonError, UserError
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.datasets import open_datasets


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
    with pytest.raises(UserError, match=r"train.beton is not there.*--dataset digits"):
        open_datasets("", tmp_path, None)
    for name in ("train.beton", "val.beton", "train.beton.json", "val.beton.json"):
        shutil.copy(digits_dir / name, tmp_path)
    assert open_datasets("", tmp_path, None)[2] == 10
    assert open_datasets("", tmp_path, 12)[2] == 12
    with pytest.raises(UserError, match=r"--num-classes 5 is too small: .* 10 classes"):
        open_datasets("", tmp_path, 5)
    manifest = json.loads((tmp_path / "val.beton.json").read_text())
    manifest["classes"][3] = "drei"
    (tmp_path / "val.beton.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"different classes \(3 against drei\)"):
        open_datasets("", tmp_path, None)


def test_digits_are_never_written_over_a_file_of_the_users(digits_dir, tmp_path):
    shutil.copy(digits_dir / "val.beton", tmp_path / "train.beton")
    before = (tmp_path / "train.beton").read_bytes()
    with pytest.raises(UserError, match=r"val.beton is not there"):
        open_datasets("digits", tmp_path, None)
    assert (tmp_path / "train.beton").read_bytes() == before


def test_digits_are_written_on_first_use_only(tmp_path):
    open_datasets("digits", tmp_path, None)
    written = (tmp_path / "train.beton").stat().st_mtime_ns
    open_datasets("digits", tmp_path, None)
    assert (tmp_path / "train.beton").stat().st_mtime_ns == written
