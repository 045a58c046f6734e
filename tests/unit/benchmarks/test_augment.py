"""The bench `augment`: its cases run and do what they say. No test asserts a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import augment
from benchmarks.__main__ import main
from benchmarks.harness import sets
from benchmarks.harness.sets import ensure_photos
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError


def test_smoke(tmp_path, capsys):
    path = tmp_path / "augment.json"
    main(["augment", *f"-b 8 --batches 2 --img-size 32 --device cpu --repeats 1 --workers 2 --json {path}".split()])
    result = json.loads(path.read_text())
    assert list(result["cases"]) == ["full_recipe", "plan", "timm", "dali", "copy_limit"]
    assert list(result["ratios"]) == ["full_recipe_vs_timm", "full_recipe_vs_dali", "full_recipe_share_of_limit"]
    assert all(case["median"] > 0 for case in result["cases"].values())
    units = {name: case["unit"] for name, case in result["cases"].items()}
    assert units == dict.fromkeys(units, "img/s") | {"plan": "samples/s"}
    assert (result["batch_size"], result["img_size"], result["workers"]) == (8, 32, 2)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_both_sides_do_the_same_work():
    """The same share of pixels is erased, and the same share of images changed, by ours and by timm's."""
    crops = augment._make_crops(64, 48)
    assert crops.shape == (64, 48, 48, 3)
    ours = augment._Ours(crops, 1, torch.device("cpu"))
    plan = ours._plan.batch(0, 0, ours._rows[0])
    assert plan.ops is not None
    assert plan.erase is not None
    mean, std = np.array(augment.MEAN, np.float32), np.array(augment.STD, np.float32)
    plain = (crops / np.float32(255) - mean) / std
    ours._images.copy_(ours._crops)
    prepared = ours.augmented(plan).permute(0, 2, 3, 1)
    output = torch.empty(64, 3, 48, 48)
    augment._start_worker(crops, output)
    augment._run_worker(range(64), 0)
    shares = []
    for images in (prepared.numpy(), output.permute(0, 2, 3, 1).numpy()):
        assert np.isfinite(images).all()
        is_changed = np.abs(images - plain).max((1, 2, 3)) > 1e-3
        shares.append(is_changed.mean())
    # Two operations at 0.5 each and erasing at 0.25 leave 0.19 of the images as they are, some more by small levels.
    assert shares == pytest.approx([0.78, 0.78], abs=0.12)


def test_dali_augments_and_normalises_the_same_crops():
    """Its mean and deviation are those of normalised photographs, and most images are changed."""
    crops = augment._make_crops(16, 48)
    out = np.asarray(augment.dali_rand_augment(crops, 2, torch.device("cpu"), 2, augment.MEAN, augment.STD)())
    assert out.shape == (16, 3, 48, 48)
    plain = (crops / 255 - np.array(augment.MEAN)) / np.array(augment.STD)
    changed = np.abs(out.transpose(0, 2, 3, 1) - plain).max((1, 2, 3)) > 1e-3
    assert changed.mean() > 0.5
    assert out.mean() == pytest.approx(plain.mean(), abs=0.5)


def test_timms_images_are_each_done_once_in_small_tasks(monkeypatch):
    for count, workers in ((64, 2), (7, 16), (2048, 16), (1000, 3)):
        tasks = augment.tasks_of(count, workers)
        assert [n for task in tasks for n in task] == list(range(count))
        assert max(map(len, tasks)) <= augment.ROWS_A_TASK
        assert len(tasks) >= min(count, 4 * workers)
    crops = augment._make_crops(3, 32)
    seen = []
    monkeypatch.setattr(augment, "_crops", crops, raising=False)
    monkeypatch.setattr(augment, "_output", torch.zeros(3, 3, 32, 32), raising=False)
    monkeypatch.setattr(
        augment, "_transform", lambda image: seen.append(np.asarray(image)) or torch.ones(3, 32, 32), False
    )
    augment._run_worker(range(2, 5), 0)  # the last of a batch and the first ones of the next
    assert all((image == crops[n]).all() for image, n in zip(seen, (2, 0, 1), strict=True))
    assert augment._output.all()


def test_crops_of_a_given_set(tmp_path):
    given = sets.converted(ensure_photos(tmp_path / "photos", 10), "", ImageOptions(raw=40))
    crops = augment._make_crops(4, 40, given.path)
    ids = sets.chosen(given, 4)
    assert all((crops[n] == given.sample(ids[n]).reshape(40, 40, 3)).all() for n in range(4))
    assert augment._make_crops(12, 16, given.path).shape == (12, 16, 16, 3)


def test_wrong_options():
    with pytest.raises(UserError, match="--batch-size is 0, expected 1 or more"):
        augment.run(augment.Options(batch_size=0))
