"""What the backends make of real photographs, against Pillow, and against timm's own evaluation transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image
from skimage.data import coffee
from timm import get_pretrained_cfg
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.common.filters import BICUBIC, BILINEAR
from lowrank_vit.config.flags import parse
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode import dali as dali_backend
from lowrank_vit.data.decode.backend import LENGTH, LoaderOptions
from lowrank_vit.data.decode.dali import DaliBackend
from lowrank_vit.data.decode.pil import crop_and_resize, decode
from lowrank_vit.data.decode.resident import ResidentBackend
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from tests.photos import psnr

KERNELS = {"bicubic": BICUBIC, "bilinear": BILINEAR}
CPU = torch.device("cpu")
SIZE = 64
EXACT = (55.0, 53.0)
"""Mean and worst PSNR against Pillow, decibels: what differs is the rounding of resized pixels."""
FLOOR = {"ffcv": (44.0, 41.5), "dali": EXACT, "resident": EXACT}
"""In training, where FFCV decodes with libjpeg-turbo's fast, less accurate DCT."""


def plan_of(beton: Beton, kind: str):
    if kind == "evaluation":
        return EvalPlan(beton.heights, beton.widths, img_size=SIZE, crop_pct=0.9, batch_size=7)
    rules = TrainRules(scale=(0.3, 1.0))
    return TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=SIZE, batch_size=8)


def scores(loader: Loader, beton: Beton) -> list[float]:
    """Each sample's PSNR against Pillow, which decodes, crops and resizes it alone."""
    found = []
    for batch in loader.batches(2):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for n, sample_id in enumerate(batch.plan.ids):
            expected = crop_and_resize(decode(beton, sample_id), batch.plan, n, SIZE)
            found.append(psnr(batch.images[n].permute(1, 2, 0).numpy(), expected))
    loader.close()
    return found


@pytest.mark.parametrize("use", ["training", "evaluation"])
@pytest.mark.parametrize("stored", ["jpeg", "raw", "mixed"])
@pytest.mark.parametrize("backend", FLOOR)
def test_pixels_are_pillows(sets, backend, stored, use):
    beton = Beton(sets[stored])
    loader, _ = open_loader(beton, plan_of(beton, use), CPU, LoaderOptions(backend, 2))
    found = scores(loader, beton)
    assert len(found) == beton.num_samples
    exact = EXACT if use == "evaluation" else FLOOR[backend]
    mean, worst = exact if stored == "jpeg" else (44.0, 41.5)
    assert np.mean(found) > mean
    assert min(found) > worst


@pytest.mark.parametrize("use", ["training", "evaluation"])
@pytest.mark.parametrize("stored", ["jpeg", "mixed"])
def test_the_graph_that_dali_runs_on_a_gpu_gives_pillows_pixels_on_a_cpu(sets, stored, use, monkeypatch, on_cuda_path):
    """There DALI resizes and mirrors as well; here the same graph runs on CPU threads, without a stream to wait on."""
    outputs = Pipeline.outputs
    monkeypatch.setattr(Pipeline, "outputs", lambda self, cuda_stream=None: outputs(self))
    beton = Beton(sets[stored])
    plan = plan_of(beton, use)
    with on_cuda_path():
        found = scores(Loader(DaliBackend(beton, plan, CPU, 2), beton, plan, CPU), beton)
    assert np.mean(found) > 48
    assert min(found) > 44


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("use", ["training", "evaluation"])
def test_batches_of_large_images_are_decoded_in_parts_with_the_same_pixels(sets, use, on_gpu, monkeypatch):
    """At most a budget of bytes at a time, or one image; with the graph of a GPU, too."""
    if on_gpu:
        shape = dali_backend.PipelineShape
        monkeypatch.setattr(dali_backend, "PipelineShape", lambda **fields: shape(**{**fields, "resize": True}))
    beton = Beton(sets["mixed"])
    plan = plan_of(beton, use)
    whole = list(Loader(DaliBackend(beton, plan, CPU, 2), beton, plan, CPU).batches(2))
    fed = []
    feed = dali_backend.Sources.feed
    monkeypatch.setattr(dali_backend.Sources, "feed", lambda self, pipeline: (fed.append(self), feed(self, pipeline)))
    budget = 250_000 if use == "evaluation" else 60_000
    for name in ("HOST_PART_BYTES", "DEVICE_PART_BYTES"):
        monkeypatch.setattr(dali_backend, name, budget)
    monkeypatch.setattr(dali_backend, "BYTES_A_THREAD", 0)
    loader = Loader(DaliBackend(beton, plan, CPU, 2), beton, plan, CPU)
    fed.clear()  # what the new pipeline was tried with
    parts = list(loader.batches(2))
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
    assert len(fed) > 2 * len(whole)
    for sources in fed:
        sides = sources.stored_shapes[:, :2] if use == "evaluation" else sources.plan.windows[:, 2:]
        assert len(sources.data) == 1 or 3 * sides.prod(axis=1).sum() <= budget


def resized_by_threads(flat: torch.Tensor, table: torch.Tensor, width: int, size: int) -> torch.Tensor:
    """What the GPU's kernels make of their table; they themselves are compared in test_resize_triton.py."""
    flips, interpolations, starts, row_pixels = table.numpy()[:, :4].astype(np.int64).T
    spans, images = table.numpy()[:, 4:12].reshape(-1, 2, 4), np.empty((len(table), size, size, 3), np.uint8)
    assert width == spans[:, 1, LENGTH].max()
    addresses, num_bytes = flat.data_ptr() + starts, flat.numel() - starts
    planned = np.ascontiguousarray(spans), interpolations.astype(np.int8), flips.astype(bool)
    assert resize_batch(addresses, num_bytes, 3 * row_pixels, *planned, images).all()
    return torch.from_numpy(images)


@pytest.mark.parametrize("use", ["training", "evaluation"])
@pytest.mark.parametrize("stored", ["jpeg", "raw", "mixed"])
def test_what_a_gpu_is_told_of_a_resident_set_gives_pillows_pixels(sets, stored, use, monkeypatch):
    monkeypatch.setattr("lowrank_vit.data.decode.resize_triton.resize", resized_by_threads)
    beton = Beton(sets[stored])
    plan = plan_of(beton, use)
    backend = ResidentBackend(beton, plan, CPU, 2)
    monkeypatch.setattr(backend, "_cut", backend._cut_on_device)
    found = scores(Loader(backend, beton, plan, CPU), beton)
    assert np.mean(found) > 54
    assert min(found) > 48


@pytest.mark.parametrize("backend", FLOOR)
@pytest.mark.parametrize(
    ("crop_pct", "interpolation"), [(0.875, "bicubic"), (0.9, "bicubic"), (1.0, "bicubic"), (0.9, "bilinear")]
)
def test_evaluation_crops_are_timms(sets, backend, crop_pct, interpolation):
    beton = Beton(sets["jpeg"])
    look = {"img_size": SIZE, "crop_pct": crop_pct, "interpolation": KERNELS[interpolation]}
    plan = EvalPlan(beton.heights, beton.widths, **look, batch_size=24)
    loader, _ = open_loader(beton, plan, CPU, LoaderOptions(backend, 2))
    (batch,) = loader.batches(0)
    transform = create_transform((3, SIZE, SIZE), crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    found = []
    for n, sample_id in enumerate(batch.plan.ids):
        expected: torch.Tensor = transform(Image.fromarray(decode(beton, sample_id)))  # type: ignore[operator]
        found.append(psnr(batch.images[n].numpy(), expected.numpy()))
    loader.close()
    assert np.mean(found) > EXACT[0] - 1
    assert min(found) > EXACT[1] - 1


@pytest.mark.parametrize(("model", "interpolation"), [("vit_tiny_patch16_224", BICUBIC), ("cspresnet50", BILINEAR)])
@pytest.mark.parametrize("typed", ["", "--train-interpolation nearest"])
def test_no_aug_is_timms_own_transform_for_that_model(model, interpolation, typed):
    """With the interpolation that timm's train.py then takes: the model's own, whatever --train-interpolation says."""
    published = get_pretrained_cfg(model)
    assert published is not None
    own = resolve_data_config({}, pretrained_cfg=published.to_dict())
    timms: Any = create_transform(
        (3, 60, 60), True, no_aug=True, interpolation=own["interpolation"], use_prefetcher=True
    )
    photos = [Image.fromarray(coffee()).crop((0, 0, *sides)) for sides in ((400, 400), (300, 400), (599, 301))]
    rules = train_rules(parse(["--no-aug", "--aa", "rand-m9", "--model", model, *typed.split()]))
    heights, widths = np.array([[photo.height, photo.width] for photo in photos]).T
    plan = TrainPlan(heights, widths, rules, seed=0, img_size=60, batch_size=3).batch(0, 0, np.arange(3))
    assert (plan.ops, plan.vflips, plan.erase) == (None, None, None)
    assert (plan.interpolations == interpolation).all()
    for n, photo in enumerate(photos):
        expected = np.asarray(timms(photo)).transpose(1, 2, 0)
        assert np.array_equal(crop_and_resize(np.asarray(photo), plan, n, 60), expected)
