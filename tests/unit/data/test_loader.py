"""All backends decode one stream: the plan's batches in the plan's order, from any step, on any number of ranks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from tests.photos import BACKENDS
from tests.slots import joined

CPU = torch.device("cpu")
EPOCH = 3


def train_plan(beton: Beton, batch_size: int = 4, img_size: int = 16, **more) -> TrainPlan:
    rules = TrainRules(scale=(0.3, 1.0))
    return TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=img_size, batch_size=batch_size, **more)


def open_one(kind: str, beton: Beton, plan, workers: int = 2, **more) -> Loader:
    return open_loader(beton, plan, CPU, LoaderOptions(kind, workers, **more))[0]


def stream(batches) -> list[tuple]:
    """What the trainer gets to see, but for the pixels; in order."""
    return [
        (
            b.plan.step,
            *(v.tolist() for v in (b.plan.ids, b.plan.windows, b.plan.flips, b.plan.interpolations, b.targets)),
        )
        for b in batches
    ]


@pytest.mark.parametrize("kind", ["jpeg", "raw", "mixed"])
def test_backends_and_workers_give_one_stream(sets, kind):
    beton = Beton(sets[kind])
    plan = train_plan(beton)
    expected = None
    for backend in BACKENDS:
        for workers in (1, 3):
            loader = open_one(backend, beton, plan, workers)
            for epoch in (0, EPOCH):
                seen = stream(loader.batches(epoch))
            loader.close()
            expected = expected or seen
            assert seen == expected
    assert expected
    assert [step for step, *_ in expected] == list(range(plan.steps_per_epoch))
    assert [ids for _, ids, *_ in expected] == plan.ids(EPOCH).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_one_stream(sets, backend, world_size):
    beton = Beton(sets["jpeg"])
    one = stream(open_one("resident", beton, train_plan(beton, 8)).batches(EPOCH))
    ranks = []
    for rank in range(world_size):
        loader = open_one(backend, beton, train_plan(beton, 8 // world_size, rank=rank, world_size=world_size))
        ranks.append(stream(loader.batches(EPOCH)))
        loader.close()
    for whole, *parts in zip(one, *ranks, strict=True):
        assert [whole[0], *(joined([part[n] for part in parts]) for n in range(1, len(whole)))] == list(whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("done", [0, 1, 10, 11])
def test_an_interrupted_epoch_goes_on_where_it_stopped(sets, backend, done):
    beton = Beton(sets["jpeg"])
    plan = train_plan(beton, 2)  # 12 steps
    whole = list(open_one(backend, beton, plan).batches(EPOCH))
    first = open_one(backend, beton, plan, prefetch=3)
    batches = first.batches(EPOCH)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))  # batches decoded ahead by now must not count
    first.close()
    assert len(json.dumps(state)) < 100
    second = open_one(backend, beton, plan)
    second.load_state_dict(state)
    rest = list(second.batches(EPOCH if done else state["epoch"]))
    if done == 0:
        assert state["epoch"] == EPOCH
    assert stream(rest) == stream(whole[done:])
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[done:], strict=True))
    assert second.state_dict() == {**state, "epoch": EPOCH + 1, "update": 0}
    assert stream(second.batches(EPOCH + 1)) == stream(first_epoch(backend, beton, plan))


def first_epoch(backend, beton, plan):
    return open_one(backend, beton, plan).batches(EPOCH + 1)


def test_an_epoch_begins_anew_unless_a_position_was_loaded(sets):
    beton = Beton(sets["jpeg"])
    loader = open_one("resident", beton, train_plan(beton))
    for _ in range(3):
        batches = loader.batches(EPOCH)
        assert next(batches).plan.step == 0
        next(batches)
    loader.load_state_dict(loader.state_dict())
    assert next(loader.batches(EPOCH)).plan.step == 2
    assert next(loader.batches(EPOCH)).plan.step == 0


def test_a_run_may_go_on_with_another_number_of_ranks_and_another_backend(sets):
    beton = Beton(sets["jpeg"])
    one = open_one("ffcv", beton, train_plan(beton, 4))
    batches = one.batches(EPOCH)
    next(batches)
    next(batches)
    state = one.state_dict()
    rest = stream(batches)
    parts = []
    for rank in range(2):
        loader = open_one("dali", beton, train_plan(beton, 2, rank=rank, world_size=2))
        loader.load_state_dict(state)
        parts.append(stream(loader.batches(EPOCH)))
        loader.close()
    assert [step for step, *_ in rest] == [step for step, *_ in parts[0]] == [2, 3, 4, 5]
    assert [ids for _, ids, *_ in rest] == [joined([a[1], b[1]]) for a, b in zip(*parts, strict=True)]


def test_a_position_is_that_of_a_whole_update(sets):
    """A run that stops between the batches of one update repeats it, and may go on without accumulation."""
    beton = Beton(sets["jpeg"])
    one = open_one("resident", beton, train_plan(beton, 2, accum_steps=2))
    batches = one.batches(EPOCH)
    for _ in range(5):
        next(batches)
    state = one.state_dict()
    assert state["update"] == 2
    for accum_steps, first_step in ((2, 4), (1, 2)):
        other = open_one("resident", beton, train_plan(beton, 4 // accum_steps, accum_steps=accum_steps))
        other.load_state_dict(state)
        assert next(other.batches(EPOCH)).plan.step == first_step


def test_a_position_of_another_stream_is_refused(sets):
    beton = Beton(sets["jpeg"])
    state = open_one("resident", beton, train_plan(beton, 4)).state_dict()
    other = open_one("resident", beton, train_plan(beton, 6))
    with pytest.raises(UserError, match=r"its global batch was 4, now it is 6\. Resume with the same"):
        other.load_state_dict(state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_sample_once(sets, backend, world_size):
    beton = Beton(sets["mixed"])
    seen = []
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size}
        plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=5, **share)
        loader = open_one(backend, beton, plan)
        for batch in loader.batches(0):
            assert np.array_equal(batch.targets.numpy(), beton.labels[batch.plan.ids])
            seen += batch.plan.ids.tolist()
        loader.close()
    assert seen == list(range(48))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_not_overwritten_by_later_ones(sets, backend):
    beton = Beton(sets["jpeg"])
    batches = open_one(backend, beton, train_plan(beton, 2, 32), prefetch=1).batches(0)
    first = next(batches)
    kept = first.images.clone()
    assert len(list(batches)) == 11
    assert torch.equal(first.images, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_prepared_batches_at_once_share_nothing(sets, backend):
    """Neither asking for the next batch nor making the model's input of it changes the pixels of the one before."""
    beton = Beton(sets["jpeg"])
    rules = TrainRules(vflip=0.5, policy=parse_policy("rand-m9-mstd0.5-inc1"), reprob=0.9)
    plan = TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=32, batch_size=4)
    augment = Augment((0.5,) * 3, (0.5,) * 3, 10, 0.1)
    options = LoaderOptions(backend, 1)
    prepared = open_loader(beton, plan, CPU, options, prepare=augment.prepare)[0].batches(1)
    decoded = open_one(backend, beton, plan).batches(1)
    before = None
    for batch, own in zip(prepared, decoded, strict=True):
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, augment.prepare(own.images.clone(), own.plan))
        if before:
            assert torch.equal(before[0].images, before[1])
        before = batch, batch.images.clone()
        augment.begin(batch.images, batch.plan)
        assert torch.equal(*(before[0].images, before[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures_tell_of_what_was_decoded(sets, backend):
    beton = Beton(sets["jpeg"])
    loader = open_one(backend, beton, train_plan(beton))
    assert loader.stats().decode_ms_p50 == 0
    assert len(list(loader.batches(0))) == 6
    stats = loader.stats()
    assert 0 < stats.decode_ms_p50 <= stats.decode_ms_p90
    assert 0 <= stats.queue_depth <= 2
    assert loader.stats().queue_depth == 0  # nothing was asked for since


class FakeCuda:
    """Stands in for CUDA's streams and events, and notes what is asked of them in order."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.reading = True
        self.wait_ms = 0.0
        """What lies between two timed events."""
        fake = self

        class Stream:
            def __init__(self, device=None, priority=0) -> None:
                self.name = "training" if device is None else "loader"

            def wait_event(self, event) -> None:
                fake.log.append(f"{self.name} waits for {event.name}")

            def synchronize(self) -> None:
                fake.log.append("host waits")

            def record_event(self) -> Event:
                event = Event()
                event.record(self)
                return event

        class Event(Stream):
            def __init__(self, enable_timing: bool = False) -> None:
                self.is_timed = enable_timing

            def elapsed_time(self, end) -> float:
                assert self.is_timed
                assert end.is_timed
                return fake.wait_ms

            def record(self, stream) -> None:
                if self.is_timed:
                    return
                self.name = f"event {sum('record' in line for line in fake.log)}"
                fake.log.append(f"record {self.name} on {stream.name}")

            def query(self) -> bool:
                return not fake.reading

        training = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: training)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


@pytest.mark.parametrize("kind", ["jpeg", "mixed"])
def test_on_a_gpus_way_ffcvs_batches_are_the_cpus(sets, kind, on_cuda_path):
    """Decoded into pinned memory, copied and prepared one ahead; kept or given back in time, since none changes."""
    beton = Beton(sets[kind])
    plan = train_plan(beton, img_size=24)
    augment = Augment((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 2)
    options = LoaderOptions("ffcv", 2)
    expected = list(open_loader(beton, plan, CPU, options, prepare=augment.prepare)[0].batches(EPOCH))
    with on_cuda_path():
        loader = open_loader(beton, plan, CPU, options, prepare=augment.prepare)[0]
        found = list(loader.batches(EPOCH))
        loader.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.targets, theirs.targets)


def in_use(loader: Loader) -> Any:
    return loader._hand_over._in_use._kept  # type: ignore[union-attr]


def test_on_a_gpu_the_next_batch_is_made_before_one_is_handed_over(sets, monkeypatch):
    cuda, beton = FakeCuda(monkeypatch), Beton(sets["jpeg"])
    plan = train_plan(beton)
    backend = open_one("resident", beton, plan)._backend

    def prepare(images, plan):
        cuda.log.append(f"prepare {plan.step}")
        return images

    loader = Loader(backend, beton, plan, torch.device("cuda"), prepare=prepare)
    batches = loader.batches(0)
    assert next(batches).plan.step == 0
    assert cuda.log == [
        *("prepare 0", "record event 0 on loader", "prepare 1", "record event 1 on loader"),
        "training waits for event 0",
    ]
    assert loader.state_dict()["update"] == 1  # the batch that waits does not count
    cuda.log.clear()
    assert next(batches).plan.step == 1
    assert cuda.log[0] == "record event 0 on training"  # from here on batch 0 was read
    assert cuda.log[1] == "prepare 2"
    assert [batch.plan.step for batch in batches] == [2, 3, 4, 5]
    assert "host waits" not in cuda.log
    assert len(in_use(loader)) == 6  # none was read yet, so none may be freed
    cuda.reading = False
    more = loader.batches(1)
    next(more)
    next(more)
    assert len(in_use(loader)) == 0
    cuda.reading = True
    loader._end()  # while the step on the batch handed out last is still to be done, and the next one being made
    assert len(in_use(loader)) == 2


def test_on_a_gpu_the_devices_own_waiting_is_counted_once(sets, monkeypatch):
    cuda, beton = FakeCuda(monkeypatch), Beton(sets["jpeg"])
    plan = train_plan(beton)
    loader = Loader(open_one("resident", beton, plan)._backend, beton, plan, torch.device("cuda"))
    batches, cuda.wait_ms = loader.batches(0), 2.0
    for _ in range(3):
        next(batches)
    assert loader.stats().device_wait_s == 0  # none is known to be over
    cuda.reading = False
    next(batches)
    assert loader.stats().device_wait_s == pytest.approx(4 * 0.002)
    assert loader.stats().device_wait_s == 0


def test_decoded_images_are_kept_until_the_step_has_read_them(sets, monkeypatch):
    """DALI's memory goes back to DALI with the last reference to it, whatever the GPU still reads."""
    cuda, beton = FakeCuda(monkeypatch), Beton(sets["jpeg"])
    plan = train_plan(beton)
    backend = open_one("resident", beton, plan)._backend
    loader = Loader(backend, beton, plan, torch.device("cuda"), prepare=lambda images, plan: images + 1)
    batches = loader.batches(0)
    next(batches)
    next(batches)
    ((_, (decoded, prepared)),) = in_use(loader)
    assert torch.equal(prepared.images, decoded.images + 1)
    assert cuda.reading
