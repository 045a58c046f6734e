"""The loaders on a GPU: Pillow's pixels, no batch overwritten, no host wait, nothing left behind."""

from __future__ import annotations

import threading
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.data.choose import choose_backend, open_loader
from lowrank_vit.data.decode import dali as dali_backend
from lowrank_vit.data.decode import resident_set
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.decode.pil import crop_and_resize, decode
from lowrank_vit.data.jpeg_engine import SHARES, has_jpeg_engine
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from tests.photos import BACKENDS, psnr

pytestmark = pytest.mark.gpu
FLOOR = {"ffcv": (44.0, 41.5), "dali": (38.0, 32.0), "resident": (54.0, 48.0)}
"""Mean and worst PSNR against Pillow, decibels; dali's is what its JPEG engine is to reach at least."""


def train_plan(beton: Beton, batch_size: int = 4, img_size: int = 64) -> TrainPlan:
    rules = TrainRules(scale=(0.3, 1.0))
    return TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=img_size, batch_size=batch_size)


def open_on(device: str, backend: str, beton: Beton, plan, **more):
    return open_loader(beton, plan, torch.device(device), LoaderOptions(backend, 2), **more)[0]


@pytest.mark.parametrize("use", ["training", "evaluation"])
def test_dali_decodes_large_images_in_parts_with_the_same_pixels(sets, use, monkeypatch):
    beton = Beton(sets["jpeg"])
    plan = train_plan(beton, batch_size=8)
    if use == "evaluation":
        plan = EvalPlan(beton.heights, beton.widths, img_size=64, crop_pct=0.9, batch_size=8)
    whole = list(open_on("cuda", "dali", beton, plan).batches(2))
    monkeypatch.setattr(dali_backend, "DEVICE_PART_BYTES", 60_000)  # at most two images
    parts = list(open_on("cuda", "dali", beton, plan).batches(2))
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("use", ["training", "evaluation"])
@pytest.mark.parametrize("stored", ["jpeg", "raw", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_pillows(sets, backend, stored, use):
    beton = Beton(sets[stored])
    plan = train_plan(beton)
    if use == "evaluation":
        plan = EvalPlan(beton.heights, beton.widths, img_size=64, crop_pct=0.9, batch_size=7)
    loader, found = open_on("cuda", backend, beton, plan), []
    for batch in loader.batches(2):
        assert batch.images.is_cuda
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.targets.cpu().numpy(), beton.labels[batch.plan.ids])
        for n, sample_id in enumerate(batch.plan.ids):
            expected = crop_and_resize(decode(beton, sample_id), batch.plan, n, 64)
            found.append(psnr(batch.images[n].permute(1, 2, 0).cpu().numpy(), expected))
    loader.close()
    assert len(found) == beton.num_samples
    assert np.mean(found) > FLOOR[backend][0]
    assert min(found) > FLOOR[backend][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_survive_a_trainer_that_runs_ahead(sets, backend):
    """With the GPU far behind the host, no batch may be overwritten or freed before it was read."""
    beton = Beton(sets["jpeg"])
    plan = train_plan(beton, 2)
    busy = torch.randn(4096, 4096, device="cuda")
    kept = []
    for batch in open_on("cuda", backend, beton, plan).batches(0):
        for _ in range(50):
            busy = busy @ busy / 64  # keeps the training stream many milliseconds behind
        kept.append(batch.images.clone())
    expected = open_on("cuda", backend, beton, plan).batches(0)
    for images, batch in zip(kept, expected, strict=True):
        torch.cuda.synchronize()
        assert torch.equal(images, batch.images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_warm_loader_never_waits(sets, backend):
    beton = Beton(sets["jpeg"])
    loader = open_on("cuda", backend, beton, train_plan(beton, 2), prepare=lambda images, plan: images + 1)
    for _ in loader.batches(0):
        pass
    batches = loader.batches(1)
    for _ in islice(batches, 4):
        pass
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert sum(1 for _ in islice(batches, 6)) == 6
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_left_early_leave_threads_and_memory(sets, backend):
    beton = Beton(sets["jpeg"])
    loader = open_on("cuda", backend, beton, train_plan(beton, 2))

    def leave(epochs: range) -> None:
        for epoch in epochs:
            for _ in islice(loader.batches(epoch), epoch % 5):
                pass

    leave(range(10))
    torch.cuda.synchronize()
    threads, memory = threading.active_count(), torch.cuda.memory_allocated()
    leave(range(10, 60))
    torch.cuda.synchronize()
    loader._end()
    assert threading.active_count() <= threads
    assert torch.cuda.memory_allocated() - memory < 2**24
    loader.close()


@pytest.mark.parametrize("stored", ["jpeg", "raw", "mixed"])
def test_a_resident_set_goes_there_in_parts(sets, stored, monkeypatch):
    """Through two pinned pieces, each filled again only when its copy, which may come late, is done."""
    monkeypatch.setattr(resident_set, "_PART_BYTES", 100_000)
    beton = Beton(sets[stored])
    room = resident_set.ResidentSet(beton, torch.device("cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        busy = busy @ busy / 64  # keeps the copies, which are asked for on this stream, far behind
    room.load(2)
    pixels = room.pixels.cpu().numpy()
    for i, start in enumerate(room.starts):
        expected = decode(beton, i).reshape(-1)
        assert np.array_equal(pixels[start : start + len(expected)], expected)


def too_much(*_: object, **where: Any) -> torch.Tensor:
    return torch.empty(1 << 50, dtype=torch.uint8, **(where or {"device": "cuda"}))


@pytest.mark.parametrize("what", ["_empty", "_pinned"])
def test_a_gpu_without_room_is_another_loaders_cause(sets, what, monkeypatch):
    pinned = {"pin_memory": True} if what == "_pinned" else {}
    monkeypatch.setattr(resident_set, what, partial(too_much, **pinned))
    beton, before = Beton(sets["jpeg"]), torch.cuda.memory_allocated()
    loader, line = open_loader(beton, train_plan(beton), torch.device("cuda"), LoaderOptions(workers=2))
    assert loader.name == "dali"
    assert "has no room (" in line
    loader.close()
    assert torch.cuda.memory_allocated() <= before
    with pytest.raises(UserError, match=r"--loader resident: .* has no room \(.*Use --loader auto"):
        open_on("cuda", "resident", beton, train_plan(beton))


def test_interpolated_colours_are_closer_to_pillows(sets, record_property):
    beton, means = Beton(sets["jpeg"]), []
    plan = train_plan(beton)
    for fancy in (True, False):
        options = LoaderOptions("dali", 2, jpeg_fancy_upsampling=fancy)
        loader, found = open_loader(beton, plan, torch.device("cuda"), options)[0], []
        for batch in loader.batches(2):
            for n, sample_id in enumerate(batch.plan.ids):
                expected = crop_and_resize(decode(beton, sample_id), batch.plan, n, 64)
                found.append(psnr(batch.images[n].permute(1, 2, 0).cpu().numpy(), expected))
        loader.close()
        means.append(float(np.mean(found)))
    record_property("interpolated_psnr_db", round(means[0], 2))
    record_property("repeated_psnr_db", round(means[1], 2))
    assert means[0] > means[1]


def test_a_share_is_measured_and_taken(sets, tmp_path):
    path = tmp_path / "train.beton"
    path.write_bytes(sets["jpeg"].read_bytes())
    beton = Beton(path)
    options = LoaderOptions("dali", 2, hw_decoder_load=None)
    for origin in ("measured just now", "measured before"):
        loader, line = open_loader(beton, train_plan(beton), torch.device("cuda"), options)
        share: Any = loader.engine_share
        if has_jpeg_engine(torch.device("cuda")):
            assert set(share.speeds) == set(SHARES)
            assert min(share.speeds.values()) > 0
            assert f"--hw-decoder-load {share.share:g}, {origin}" in line
        else:
            assert share.share == 0
        assert sum(len(batch) for batch in loader.batches(0)) == beton.num_samples
        loader.close()


def test_auto_takes_the_gpu(sets, monkeypatch):
    beton = Beton(sets["jpeg"])
    plan, options = train_plan(beton), LoaderOptions(workers=2)
    assert choose_backend(beton, plan, torch.device("cuda"), options)[0] == "resident"
    monkeypatch.setattr("lowrank_vit.data.choose.memory_bytes", lambda device: 1000)
    assert choose_backend(beton, plan, torch.device("cuda"), options)[0] == "dali"
