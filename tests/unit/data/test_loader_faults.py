"""Damage is named or left out; whatever ends an epoch early leaves no thread, no memory and no hang behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.convert import convert_image_folder
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode import ffcv
from lowrank_vit.data.decode.backend import LoaderOptions, Schedule
from lowrank_vit.data.decode.ffcv import FfcvBackend
from lowrank_vit.data.decode.pil import decode
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from tests.photos import BACKENDS, NUM_PHOTOS, psnr
from tests.slots import joined
from tests.waiting import LONG_S, wait_until

CPU = torch.device("cpu")
BAD = 7


@pytest.fixture
def damaged(sets, tmp_path) -> Path:
    """The set of JPEGs with its sidecars, sample 7 zeroed."""
    for path in sets["jpeg"].parent.glob("jpeg.beton*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    beton, path = Beton(sets["jpeg"]), tmp_path / "jpeg.beton"
    content = bytearray(path.read_bytes())
    start, size = int(beton.pointers[BAD]), int(beton.sizes[BAD])
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


def train_plan(beton: Beton, batch_size: int = 4, **more) -> TrainPlan:
    rules = TrainRules(scale=(0.3, 1.0))
    return TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=16, batch_size=batch_size, **more)


def open_one(backend: str, beton: Beton, plan=None, **more) -> Loader:
    said = more.pop("say", print)
    return open_loader(beton, plan or train_plan(beton), CPU, LoaderOptions(backend, 2, **more), say=said)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_sample_is_named(damaged, backend):
    before = set(threading.enumerate())
    loader = open_one(backend, Beton(damaged))
    with pytest.raises(BetonError, match=r"jpeg.beton: sample 7 \(from .*07.jpg\) does not decode \(cannot identify"):
        list(loader.batches(0))
    loader.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [b"\0", b"\xff"])
def test_a_sample_cut_short_is_named(sets, tmp_path, backend, rest):
    beton = Beton(sets["jpeg"])
    content = bytearray(sets["jpeg"].read_bytes())
    start, size = int(beton.pointers[BAD]), int(beton.sizes[BAD])
    content[start + size // 2 : start + size] = rest * (size - size // 2)
    (tmp_path / "cut.beton").write_bytes(content)
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=5)
    with pytest.raises(BetonError, match=r"cut.beton: sample 7 does not decode \(image file is truncated"):
        list(open_one(backend, Beton(tmp_path / "cut.beton"), plan).batches(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_good_samples_still_decode_after_a_damaged_one(damaged, backend):
    beton = Beton(damaged)
    plan = train_plan(beton)
    loader = open_one(backend, beton, plan)
    bad_step = next(step for step, ids in enumerate(plan.ids(0)) if BAD in ids)
    with pytest.raises(BetonError):
        list(loader.batches(0))
    rest = [batch.plan.step for batch in loader.batches(0, bad_step + 1)]
    assert rest == list(range(bad_step + 1, plan.steps_per_epoch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_sample_is_replaced_by_the_next_of_the_order(damaged, backend, world_size):
    beton, seen, said = Beton(damaged), [], []
    for rank in range(world_size):
        plan = train_plan(beton, 4 // world_size, rank=rank, world_size=world_size)
        loader = open_one(backend, beton, plan, on_bad_sample="skip", say=said.append)
        seen.append([batch.plan.ids for epoch in (0, 1) for batch in loader.batches(epoch)])
        assert len(loader.bad) == any(BAD in ids for ids in [*plan.ids(0), *plan.ids(1)])
        loader.close()
    whole = train_plan(beton)
    expected = []
    for epoch in (0, 1):
        order = whole.order(epoch).tolist()
        stand_in = order[(order.index(BAD) + 1) % NUM_PHOTOS]
        expected += [[stand_in if i == BAD else i for i in ids] for ids in whole.ids(epoch).tolist()]
    assert [joined(parts) for parts in zip(*seen, strict=True)] == expected
    assert all("left out as damaged (1 so far)" in line and "sample 7" in line for line in said)
    assert said


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_leaves_a_damaged_sample_out(damaged, backend):
    beton = Beton(damaged)
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=5)
    loader = open_one(backend, beton, plan, on_bad_sample="skip")
    for _ in range(2):
        seen = np.concatenate([batch.plan.ids for batch in loader.batches(0)])
        assert seen.tolist() == [i for i in range(NUM_PHOTOS) if i != BAD]
    assert len(loader.bad) == 1


def test_the_next_sample_stands_in_even_if_that_one_is_damaged_too(sets):
    beton = Beton(sets["jpeg"])
    plan = train_plan(beton)
    order = plan.order(0).tolist()
    bad = {order[3], order[4], order[-1]}
    ids = np.concatenate([batch.ids for batch in Schedule(plan, 0, bad=bad)]).tolist()
    assert ids == [order[5] if n in (3, 4) else order[0] if n == NUM_PHOTOS - 1 else i for n, i in enumerate(order)]


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_set_of_nothing_but_damage_is_an_error(sets, tmp_path, backend):
    beton = Beton(sets["jpeg"])
    content = bytearray(sets["jpeg"].read_bytes())
    for start, size in zip(beton.pointers.tolist(), beton.sizes.tolist(), strict=True):
        content[start : start + size] = bytes(size)
    (tmp_path / "all.beton").write_bytes(content)
    loader = open_one(backend, Beton(tmp_path / "all.beton"), on_bad_sample="skip", say=lambda line: None)
    with pytest.raises(BetonError, match="none of its samples decodes"):
        list(loader.batches(0))


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_file_cut_while_it_is_open_is_an_error_and_no_crash(sets, tmp_path, backend):
    path = tmp_path / "copy.beton"
    path.write_bytes(sets["jpeg"].read_bytes())
    loader = open_one(backend, Beton(path), train_plan(Beton(sets["jpeg"]), 2), prefetch=1)
    batches = loader.batches(0)
    next(batches)
    wait_until(lambda: len(loader._backend.decode_ms) == 3, "all that may be decoded ahead")
    os.truncate(path, 4096)
    with pytest.raises(BetonError, match=r"copy.beton was cut from [\d,]+ to 4,096 bytes while it was open"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_removed_while_it_is_open_is_read_to_the_end(sets, tmp_path, backend):
    path = tmp_path / "copy.beton"
    path.write_bytes(sets["jpeg"].read_bytes())
    loader = open_one(backend, Beton(path))
    batches = loader.batches(0)
    next(batches)
    path.unlink()
    assert len(list(batches)) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_epochs_left_early_leave_threads_and_memory_as_they_were(sets, backend):
    beton = Beton(sets["jpeg"])
    loader = open_one(backend, beton, train_plan(beton, 2))
    torch_threads, process = torch.get_num_threads(), psutil.Process()

    def leave(epochs: range) -> None:
        for epoch in epochs:
            batches = loader.batches(epoch)
            for _ in range(epoch % 5):
                next(batches)
            if epoch % 2:
                del batches  # what a `break` in a training loop does; else the next epoch ends it

    leave(range(10))
    gc.collect()
    threads, memory, files = process.num_threads(), process.memory_info().rss, process.num_fds()
    leave(range(10, 60))
    gc.collect()
    loader._end()
    wait_until(
        lambda: process.num_threads() <= threads, "the end of the threads"
    )  # one that is joined ends a bit later
    assert process.num_fds() <= files
    assert process.memory_info().rss - memory < 2**24
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_the_training_loop_ends_the_threads(sets, backend):
    def train() -> None:
        loader = open_one(backend, Beton(sets["jpeg"]), prefetch=1)
        try:
            for n, _ in enumerate(loader.batches(0)):
                if n == 1:
                    raise ZeroDivisionError
        finally:
            loader.close()

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError) as kept:  # whose traceback keeps the generator alive
        train()
    assert set(threading.enumerate()) <= before
    assert kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_epoch_ends_the_first(sets, backend):
    loader = open_one(backend, Beton(sets["jpeg"]))
    first = loader.batches(0)
    next(first)
    second = loader.batches(1)
    next(second)
    with pytest.raises(UserError, match=r"this epoch of .*jpeg.beton was ended: a loader runs one at a time"):
        next(first)
    assert loader.state_dict()["update"] == 1
    assert len(list(second)) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_seen", [None, 0, 2])
def test_a_closed_loader_says_so(sets, backend, num_seen):
    """Whether batches are asked for then, or were asked for, or were seen already before."""
    loader = open_one(backend, Beton(sets["jpeg"]))
    batches = iter(()) if num_seen is None else loader.batches(0)
    for _ in range(num_seen or 0):
        next(batches)
    loader.close()
    loader.close()
    with pytest.raises(UserError, match=r"the loader of .*jpeg.beton is closed. Open another one"):
        next(loader.batches(0) if num_seen is None else batches)
    assert loader.state_dict()["update"] == (num_seen or 0)


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_jpeg_with_a_mere_warning_is_decoded(tmp_path, backend):
    """Some images of ImageNet have stray bytes before a marker: libjpeg warns, and decodes them whole."""
    (tmp_path / "src" / "temple").mkdir(parents=True)
    file = tmp_path / "src" / "temple" / "a.jpg"
    Image.fromarray(load_sample_images().images[0][:96, :96]).save(file, quality=90)
    clean, content = np.asarray(Image.open(file)), file.read_bytes()
    assert content.endswith(b"\xff\xd9")
    file.write_bytes(content[:-2] + bytes(5) + content[-2:])
    convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=1)
    beton = Beton(tmp_path / "a.beton")
    assert beton.sample(0).tobytes() == file.read_bytes()
    plan = EvalPlan(beton.heights, beton.widths, img_size=96, crop_pct=1.0, batch_size=1)
    (batch,) = open_one(backend, beton, plan).batches(0)
    assert psnr(batch.images[0].permute(1, 2, 0).numpy(), clean) > 35


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_slow_disk_is_waited_for(sets, backend, monkeypatch):
    beton = Beton(sets["jpeg"])
    monkeypatch.setattr(beton, "check_unchanged", lambda ids: time.sleep(0.3))  # called before each batch
    assert len(list(open_one(backend, beton).batches(0))) == 6


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_an_error_in_the_plan_reaches_the_trainer(sets, backend, monkeypatch):
    beton = Beton(sets["jpeg"])
    plan = train_plan(beton)
    loader = open_one(backend, beton, plan)
    monkeypatch.setattr(plan, "flips", lambda epoch, ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loader.batches(0))
    monkeypatch.undo()
    assert len(list(loader.batches(0))) == 6


def test_ctrl_c_ends_the_process(sets):
    """With the threads of two backends at work."""
    code = f"""
import torch
from tests.unit.data.test_loader_faults import *
loaders = [open_one(backend, Beton({str(sets["jpeg"])!r}), prefetch=1) for backend in ("ffcv", "dali")]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
for epoch in range(10**9):
    for batches in zip(*(loader.batches(epoch) for loader in loaders), strict=True):
        pass
    if epoch == 10:
        print("ready", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LONG_S)
    finally:
        process.kill()  # a failure must not leave it running
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors


@pytest.mark.slow  # a process that imports all, on one core
@pytest.mark.parametrize("where", ["read()", "opened = threading.Thread(target=read); opened.start(); opened.join()"])
@pytest.mark.parametrize("backend", ["ffcv", "dali", "resident"])
def test_a_process_on_one_core_ends(sets, backend, where):
    """Also if the thread that has opened the loader is gone; see `use_threads`."""
    code = f"""
import os, threading
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from tests.unit.data.test_loader_faults import *
def read():
    global batches
    batches = open_one({backend!r}, Beton({str(sets["jpeg"])!r})).batches(0)
    next(batches)
{where}
batches
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)


def test_scratch_memory_is_for_the_threads_that_exist_not_for_those_asked_for(sets, monkeypatch):
    counts, real = [], ffcv.decode_batch

    def counted(*arguments):
        counts.append(arguments[-2])
        return real(*arguments)

    monkeypatch.setattr(ffcv, "decode_batch", counted)
    beton, device = Beton(sets["jpeg"]), torch.device("cpu")
    for workers in (1, 10_000):
        plan = train_plan(beton)
        next(FfcvBackend(beton, plan, device, workers).decode(Schedule(plan, 0)))
    assert counts[0] == 1
    assert counts[-1] == numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("backend", ["ffcv", "resident"])
def test_what_libjpeg_warns_of_is_damage_when_training_too(sets, tmp_path, backend, mode):
    """A few hundred zeros, of which Pillow says nothing; without a manifest there is no checksum either."""
    path = tmp_path / "rotten.beton"
    content = bytearray(sets["jpeg"].read_bytes())
    beton = Beton(sets["jpeg"])
    start = int(beton.pointers[5]) + int(beton.sizes[5]) * 2 // 3
    content[start : start + 300] = bytes(300)
    path.write_bytes(content)
    beton = Beton(path)
    decode(beton, 5)
    look = {"img_size": 16, "crop_pct": 0.9, "batch_size": 4}
    plan = train_plan(beton) if mode == "training" else EvalPlan(beton.heights, beton.widths, **look)
    with pytest.raises(BetonError, match="sample 5"):
        list(open_one(backend, beton, plan).batches(0))
