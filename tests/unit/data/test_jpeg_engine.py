"""`--hw-decoder-load auto`: which share of a batch the JPEG engine gets, from tables that are handed in."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.data import choose, jpeg_engine, speeds
from lowrank_vit.data.choose import make_backend, open_loader
from lowrank_vit.data.decode import backend
from lowrank_vit.data.decode.backend import FedStep, LoaderOptions, usual_workers
from lowrank_vit.data.jpeg_engine import SHARES, has_jpeg_engine, measure_shares, pick
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.speeds import kept, speed_path
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100 = {"0": 7480, "0.2": 9780, "0.35": 11100, "0.5": 8190, "0.65": 8940, "0.8": 8200, "1": 7560}
"""Images a second by share with 16 threads, of docs/benchmarks/h100.md; the one at 0.8 is made up."""
AUTO = LoaderOptions("dali", 16, hw_decoder_load=None)
STEP = FedStep({"step": "vit", "gpu": "H100"}, None)
choose_share: Any = jpeg_engine.choose_share  # may be None, which each test knows


def plan_of(beton: Beton, **more) -> TrainPlan:
    return TrainPlan(beton.heights, beton.widths, TrainRules(), seed=5, img_size=16, batch_size=4, **more)


def chosen(beton: Beton, options: LoaderOptions = AUTO, table=H100, gpu="H100", **more) -> Any:
    more = {"has_engine": True, **more}
    return choose_share(beton, plan_of(beton), GPU, options, lambda: dict(table), gpu=gpu, **more)


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (3329, 1.0),  # ViT-B: the engine alone suffices
        (6300, 1.0),  # 7,560 is 1.2 times that, exactly
        (6301, 0.8),
        (8177, 0.35),  # ViT-S
        (10000, 0.35),  # none suffices: the fastest
        (None, 0.35),
        (0.0, 0.35),
    ],
)
def test_the_engine_does_as_much_as_leaves_no_step_waiting(step, share):
    assert pick({float(text): speed for text, speed in H100.items()}, step) == share


def test_of_shares_that_are_as_fast_the_largest_is_the_cheapest():
    assert pick({0.0: 5.0, 0.2: 7.0, 0.5: 7.0}, 100.0) == 0.5


def test_a_table_is_measured_once_for_a_gpu_and_its_threads_and_kept(beton):
    tables = iter([H100, {**H100, "1": 20000}, {**H100, "0.2": 30000}])
    measured = lambda: dict(next(tables))  # noqa: E731
    one = choose_share(beton, plan_of(beton), GPU, AUTO, measured, gpu="H100", has_engine=True)
    assert (one.share, one.speeds[0.35]) == (0.35, 11100)
    assert one.why == (
        "measured just now, img/s by share: 0 7,480, 0.2 9,780, 0.35 11,100, 0.5 8,190, 0.65 8,940, 0.8 8,200, "
        "1 7,560; the fastest"
    )
    again = choose_share(beton, plan_of(beton), GPU, AUTO, measured, gpu="H100", has_engine=True)
    assert again.share == 0.35
    assert again.why.startswith("measured before (train.beton.speed.json), ")
    a_slice = choose_share(beton, plan_of(beton), GPU, AUTO, measured, gpu="H100 MIG 1g.10gb", has_engine=True)
    assert a_slice.share == 1.0
    fewer = LoaderOptions("dali", 4, hw_decoder_load=None)
    assert choose_share(beton, plan_of(beton), GPU, fewer, measured, gpu="H100", has_engine=True).share == 0.2
    assert len(json.loads(speed_path(beton).read_text())) == 3


def test_the_speed_of_the_step_is_what_an_earlier_run_found_else_an_estimate(beton):
    options = LoaderOptions("dali", 16, hw_decoder_load=None, step=FedStep(STEP.key, 14280.0))
    first = chosen(beton, options)
    assert first.share == 0.35
    assert first.why.endswith("the fastest, as none has 1.2 times the step's 14,280 (estimated from its arithmetic)")
    assert first.recheck(3300.0, 0.01) == ""
    second = chosen(beton, options)
    assert second.share == 1.0
    assert second.why.endswith("the largest with 1.2 times the step's 3,333 (measured in a run before)")


def test_a_gpu_or_a_slice_without_an_engine_gets_0_and_nothing_is_measured(beton):
    def measured():
        pytest.fail("measures")

    share = choose_share(beton, plan_of(beton), GPU, AUTO, measured, gpu="Tesla T4", has_engine=False)
    assert (share.share, share.why) == (0.0, "Tesla T4 has no JPEG engine")
    assert not speed_path(beton).exists()
    line = share.recheck(500.0, 0.4)
    assert line.startswith(
        "the run waits for the loader 40% of the time: 500 img/s a GPU with --hw-decoder-load 0, and"
    )
    assert not speed_path(beton).exists()


def test_what_is_given_is_not_chosen_and_evaluation_is_never_measured(beton, sets):
    def measured():
        pytest.fail("measures")

    def found(beton, plan, load):
        options = LoaderOptions("dali", 2, hw_decoder_load=load)
        return choose_share(beton, plan, GPU, options, measured, gpu="H100", has_engine=True)

    assert found(beton, plan_of(beton), 0.5) is None
    assert (
        found(beton, EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=4), None).share == 0.35
    )
    raw = Beton(sets["raw"])
    assert found(raw, plan_of(raw), None).share == 0.35


def test_damaged_samples_and_read_only_folders_end_nothing(beton, monkeypatch):
    def damaged():
        raise speeds.DamagedSamples({0: "grey"})

    one = choose_share(beton, plan_of(beton), GPU, AUTO, damaged, gpu="H100", has_engine=True)
    assert (one.share, one.why) == (0.35, "not measured, since the first samples are damaged")

    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(speeds, "write_whole", refuse)
    options = LoaderOptions("dali", 16, hw_decoder_load=None, step=STEP)
    two = chosen(beton, options, {**H100, "1": 12000})
    assert two.share == 1.0
    assert "cannot be written" in two.why
    line = two.recheck(6000.0, 0.4)
    assert line.endswith(
        ": give the next run --hw-decoder-load 0.35; this one keeps its own, on which its pixels depend"
    )


def test_all_ranks_take_what_suits_the_slowest(beton):
    slow = [{**dict.fromkeys(H100, 100.0), "0.5": 9000.0}, "measured just now", 5000.0, "measured in a run before"]
    options = LoaderOptions("dali", 16, hw_decoder_load=None, of_all_ranks=lambda own: [own, slow, None])
    share = chosen(beton, options)
    assert share.share == 0.5
    assert share.speeds[0.5] == 8190
    without = [{"0": 0.0}, "Tesla T4 has no JPEG engine", None, ""]
    options = LoaderOptions("dali", 16, hw_decoder_load=None, of_all_ranks=lambda own: [own, without])
    assert (chosen(beton, options).share, chosen(beton, options).why) == (0.0, "Tesla T4 has no JPEG engine")
    seen = []
    options = LoaderOptions("dali", 16, hw_decoder_load=0.2, of_all_ranks=lambda own: seen.append(own) or [own, slow])
    assert chosen(beton, options) is None  # this rank has a share of its own, and yet is heard by those that have none
    assert seen == [None]


def test_a_run_that_waits_says_so_once_and_the_next_one_takes_another_share(beton):
    options = LoaderOptions("dali", 16, hw_decoder_load=None, step=STEP)
    first = chosen(beton, options, {**H100, "1": 12000})
    assert first.share == 1.0
    # Beside the step, which would make 10,000, it decodes no more than 6,000.
    line = first.recheck(6000.0, 0.4)
    assert line == (
        "the run waits for the loader 40% of the time: 6,000 img/s a GPU with --hw-decoder-load 1. A share of 0.35 was "
        "measured at 11,100: the next run takes it; this one keeps its own, on which its pixels depend"
    )
    second = chosen(beton, options)
    assert second.share == 0.35
    assert second.speeds[1.0] == 6000
    assert kept(beton, STEP.key) == {"step": pytest.approx(10000)}
    assert second.recheck(9900.0, 0.04) == ""
    assert "no share is known to be faster" in second.recheck(9790.0, 0.3)  # what is left is slower still
    assert chosen(beton, options).speeds[0.35] == 11100  # and the table stays


def test_storage_that_is_slow_says_nothing_of_shares(beton):
    options = LoaderOptions("dali", 16, hw_decoder_load=None, step=STEP)
    first, size = chosen(beton, options, {**H100, "1": 12000}), float(beton.sizes.mean())
    line = first.recheck(5000.0, 0.5, 0.8 * size)
    assert line == (
        "the run waits for the loader 50% of the time: 5,000 img/s a GPU with --hw-decoder-load 1, and 80% of the data "
        "came from storage, which may be the slow part. --stage-dir may help, see the guide"
    )
    assert chosen(beton, options).speeds == first.speeds
    assert kept(beton, STEP.key) == {"step": pytest.approx(10000)}
    assert first.recheck(9900.0, 0.04, size) == ""
    assert "the next run takes it" in first.recheck(5000.0, 0.5, 0.05 * size)


def test_shares_are_measured_with_the_set_and_one_that_fails_counts_for_nothing(beton):
    def open_with(share):
        if share > 0.5:
            raise RuntimeError("nvJPEG: no memory")
        return make_backend("dali", beton, plan_of(beton), CPU, LoaderOptions("dali", 2, hw_decoder_load=share))

    found = measure_shares(open_with, plan_of(beton), CPU)
    assert list(found) == [f"{share:g}" for share in SHARES]
    assert all((found[text] > 0) == (float(text) <= 0.5) for text in found)

    def fail(share):
        raise UserError("--loader dali: no")

    with pytest.raises(UserError, match="--loader dali: no"):
        measure_shares(fail, plan_of(beton), CPU)


class FakeNvjpeg:
    """nvJPEG on a GPU where its hardware backend has this status; 7 is ARCH_MISMATCH, a T4's."""

    def __init__(self, status: int) -> None:
        self.status, self.asked, self.destroyed = status, [], 0

    def nvjpegCreateEx(self, backend, device, pinned, flags, handle):
        self.asked.append(backend)
        if not self.status:
            ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 1
        return self.status

    def nvjpegDestroy(self, handle):
        self.destroyed += handle.value


@pytest.mark.parametrize(("status", "has_engine"), [(0, True), (1, True), (5, True), (6, True), (7, False), (9, False)])
def test_nvjpeg_is_asked_whether_there_is_an_engine_and_other_failures_say_nothing_of_it(status, has_engine):
    library = FakeNvjpeg(status)
    assert has_jpeg_engine(CPU, library) is has_engine
    assert (library.asked, library.destroyed) == ([3], status == 0)


def test_without_nvjpeg_it_is_left_to_the_measurement(monkeypatch):
    monkeypatch.setattr(jpeg_engine, "_nvjpeg_path", lambda: "libnvjpeg.so.no")
    assert has_jpeg_engine(CPU)


def test_a_loader_is_opened_with_the_share_and_says_so(beton, monkeypatch, on_cuda_path):
    """FFCV stands in for DALI, which cannot be sent a GPU's way on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    monkeypatch.setattr(jpeg_engine, "has_jpeg_engine", lambda device: True)
    opened = []

    def make(kind, beton, plan, device, options):
        opened.append((kind, options.hw_decoder_load))
        return make_backend("ffcv", beton, plan, device, options)

    monkeypatch.setattr(choose, "make_backend", make)
    with on_cuda_path():
        said = []
        loader, line = open_loader(
            beton, plan_of(beton), CPU, LoaderOptions("dali", 2, hw_decoder_load=None), say=said.append
        )
        given, _ = open_loader(beton, plan_of(beton), CPU, LoaderOptions("dali", 2, hw_decoder_load=0.5))
        for one, other in zip(loader.batches(0), given.batches(0), strict=True):
            assert torch.equal(one.images, other.images)
        loader.close()
        given.close()
    share: Any = loader.engine_share
    assert said[0] == "measuring shares for the GPU's JPEG engine with train.beton, which takes some seconds"
    assert opened == [*(("dali", one) for one in SHARES), ("dali", share.share), ("dali", 0.5)]
    assert given.engine_share is None
    assert min(share.speeds.values()) > 0
    assert share.share == pick(share.speeds, None)
    assert f"(--loader dali; --hw-decoder-load {share.share:g}, measured just now, img/s by share: 0 " in line
    assert "MIG 1g.10gb" in speed_path(beton).read_text()


@pytest.mark.parametrize(("cores", "sharing", "threads"), [(16, 1, 14), (192, 8, 23), (2, 1, 1), (8, 8, 1)])
def test_a_gpu_is_fed_by_all_cores_but_two_shared_among_the_ranks(monkeypatch, cores, sharing, threads, on_cuda_path):
    monkeypatch.setattr(backend, "available_cores", lambda: cores)
    assert usual_workers(CPU, sharing) == 4
    with on_cuda_path():
        assert usual_workers(CPU, sharing) == threads
