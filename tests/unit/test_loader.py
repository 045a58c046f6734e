"""The backends decode the plan's batches, and only those; FFCV's threads end with the epoch."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.convert import convert_image_folder
from data_prep.errors import BetonError, UserError
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.loader import choose_backend, open_loader
from lowrank_vit.data.plan import EvalPlan, TrainPlan, TrainRules

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, dict[int, np.ndarray]]:
    """A JPEG `.beton` of 24 crops of real photographs, sizes all different, and PIL's decode of each by sample id."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("temple", "flower")):
        (root / "src" / name).mkdir(parents=True)
        photo = load_sample_images().images[label]
        for n in range(12):
            crop = photo[n * 5 : n * 5 + 150 + 3 * n, n * 7 : n * 7 + 200 - 4 * n]
            Image.fromarray(crop).save(root / "src" / name / f"{n:02d}.jpg", quality=95)
    convert_image_folder(root / "src", root / "photos.beton", workers=1)
    files = sorted((root / "src").rglob("*.jpg"), key=lambda p: (p.parent.name != "flower", p.name))
    return root / "photos.beton", {i: np.asarray(Image.open(file)) for i, file in enumerate(files)}


def train_plan(beton, batch_size, img_size, **rules):
    return TrainPlan(beton.heights, beton.widths, TrainRules(**rules), seed=5, img_size=img_size, batch_size=batch_size)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_ffcv_cuts_the_planned_windows_of_photographs(photos):
    path, decoded = photos
    beton = Beton(path)
    plan = train_plan(beton, 8, 32, scale=(0.3, 1.0))
    loader, _ = open_loader("ffcv", beton, plan, CPU, workers=2)
    scores = []
    for batch in loader.batches(3):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for n, sample_id in enumerate(batch.plan.ids):
            ours = batch.images[n].permute(1, 2, 0).numpy()
            top, left, height, width = batch.plan.windows[n]
            flip = batch.plan.flips[n]
            planned = psnr(ours, shrunk(decoded[sample_id], top, left, height, width, flip))
            shifted = psnr(ours, shrunk(decoded[sample_id], top + 2, left + 2, height, width, flip))
            assert planned > shifted + 3
            assert batch.targets[n] == beton.labels[sample_id]
            scores.append(planned)
    assert len(scores) == 24
    assert np.mean(scores) > 35
    assert min(scores) > 30


def shrunk(image, top, left, height, width, flip):
    """PIL's box filter, which OpenCV's INTER_AREA is when it shrinks; libjpeg-turbo's fast DCT makes the difference."""
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    pixels = np.asarray(crop.resize((32, 32), Image.Resampling.BOX))
    return pixels[:, ::-1] if flip else pixels


def test_both_backends_give_the_same_stream(digits_dir):
    beton = Beton(digits_dir / "train.beton")
    plan = train_plan(beton, 100, 8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    resident, _ = open_loader("resident", beton, plan, CPU, workers=2)
    ffcv, _ = open_loader("ffcv", beton, plan, CPU, workers=2)
    for epoch in (0, 1):
        pairs = list(zip(resident.batches(epoch), ffcv.batches(epoch), strict=True))
        assert len(pairs) == plan.steps_per_epoch
        for a, b in pairs:
            assert np.array_equal(a.plan.ids, b.plan.ids)
            assert torch.equal(a.targets, b.targets)
            assert torch.equal(a.images, b.images)  # whole 8x8 images: nothing to resample


def test_a_resumed_epoch_goes_on_where_it_stopped(digits_dir):
    beton = Beton(digits_dir / "train.beton")
    plan = train_plan(beton, 200, 16)
    for kind in ("resident", "ffcv"):
        loader, _ = open_loader(kind, beton, plan, CPU, workers=1)
        whole = list(loader.batches(4))
        for first_step in (0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch):
            rest = list(loader.batches(4, first_step))
            assert [b.plan.step for b in rest] == list(range(first_step, plan.steps_per_epoch))
            assert all(torch.equal(a.images, b.images) for a, b in zip(whole[first_step:], rest, strict=True))


def test_evaluation_sees_every_sample_once(digits_dir):
    beton = Beton(digits_dir / "val.beton")
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=1.0, batch_size=100)
    for kind in ("resident", "ffcv"):
        loader, _ = open_loader(kind, beton, plan, CPU, workers=2)
        batches = list(loader.batches(0))
        assert [len(b) for b in batches] == [100, 100, 100, 60]
        assert np.array_equal(np.concatenate([b.plan.ids for b in batches]), np.arange(360))
        assert np.array_equal(torch.cat([b.targets for b in batches]).numpy(), beton.labels)


def test_epochs_left_early_leave_no_thread(digits_dir):
    beton = Beton(digits_dir / "train.beton")
    loader, _ = open_loader("ffcv", beton, train_plan(beton, 50, 16), CPU, workers=1)
    torch_threads = torch.get_num_threads()
    before = threading.active_count()
    for epoch in range(20):
        batches = loader.batches(epoch)
        for _ in range(epoch % 4):
            next(batches)
        del batches  # what a `break` in a training loop does
    assert threading.active_count() == before
    assert torch.get_num_threads() == torch_threads


def test_a_batch_is_not_overwritten_by_later_ones(digits_dir):
    beton = Beton(digits_dir / "train.beton")
    loader, _ = open_loader("ffcv", beton, train_plan(beton, 50, 16), CPU, workers=1)
    batches = loader.batches(0)
    first = next(batches)
    kept = first.images.clone()
    for _ in batches:
        pass
    assert torch.equal(first.images, kept)


def test_a_damaged_jpeg_is_named(photos, tmp_path):
    path, _ = photos
    damaged = tmp_path / "damaged.beton"
    content = bytearray(path.read_bytes())
    beton = Beton(path)
    start = int(beton.pointers[7])
    content[start : start + int(beton.sizes[7])] = bytes(int(beton.sizes[7]))
    damaged.write_bytes(content)
    beton = Beton(damaged)
    loader, _ = open_loader("ffcv", beton, train_plan(beton, 8, 32), CPU, workers=1)
    before = threading.active_count()
    with pytest.raises(BetonError, match=r"damaged.beton: sample 7 does not decode"):
        list(loader.batches(0))
    assert threading.active_count() == before


def test_a_jpeg_with_a_mere_warning_is_decoded(tmp_path):
    """Some images of ImageNet have stray bytes before a marker: libjpeg warns, and decodes them whole."""
    (tmp_path / "src" / "temple").mkdir(parents=True)
    file = tmp_path / "src" / "temple" / "a.jpg"
    Image.fromarray(load_sample_images().images[0][:96, :96]).save(file, quality=90)
    clean = np.asarray(Image.open(file))
    content = file.read_bytes()
    assert content.endswith(b"\xff\xd9")
    file.write_bytes(content[:-2] + bytes(5) + content[-2:])
    convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=1)
    beton = Beton(tmp_path / "a.beton")
    assert beton.sample(0).tobytes() == file.read_bytes()
    plan = EvalPlan(beton.heights, beton.widths, img_size=96, crop_pct=1.0, batch_size=1)
    loader, _ = open_loader("ffcv", beton, plan, CPU, workers=1)
    (batch,) = loader.batches(0)
    assert psnr(batch.images[0].permute(1, 2, 0).numpy(), clean) > 35


def test_auto_says_which_and_why(photos, digits_dir, monkeypatch):
    digits = Beton(digits_dir / "train.beton")
    assert choose_backend(digits, CPU) == ("resident", "0.3 MB raw fit 25% of cpu memory")
    assert choose_backend(Beton(photos[0]), CPU) == ("ffcv", "it holds JPEG samples")
    monkeypatch.setattr("lowrank_vit.data.loader.memory_bytes", lambda device: 1000)
    kind, reason = choose_backend(digits, CPU)
    assert (kind, "exceed" in reason) == ("ffcv", True)
    with pytest.raises(UserError, match=r"resident cannot hold .*photos.beton: it holds JPEG.*--loader ffcv"):
        open_loader("resident", Beton(photos[0]), train_plan(Beton(photos[0]), 8, 32), CPU, workers=1)
