"""`--loader auto`: resident where it fits, DALI with a GPU, else what was measured to be faster; and says why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.common import resources
from lowrank_vit.common.errors import UserError
from lowrank_vit.data import choose
from lowrank_vit.data.choose import (
    choose_backend,
    make_backend,
    open_loader,
    why_not_resident,
)
from lowrank_vit.data.decode import dali, resident_set
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.speeds import speed_path
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from tests.hidden_packages import hidden_packages

CPU = torch.device("cpu")
FREE_BYTES = resident_set.free_bytes
AUTO = LoaderOptions(workers=2)


@dataclass
class Sides:
    heights: np.ndarray
    widths: np.ndarray


def plan_of(beton: Beton, img_size: int = 16) -> TrainPlan:
    return TrainPlan(beton.heights, beton.widths, TrainRules(), seed=5, img_size=img_size, batch_size=4)


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(choose, "memory_bytes", lambda device: 1_000_000)


@pytest.fixture
def a_gpu(monkeypatch):
    """A device that is named cuda, of which DALI has nothing to say."""
    monkeypatch.setattr(choose, "why_no_dali", lambda device: "")
    return torch.device("cuda")


@pytest.mark.parametrize("kind", ["jpeg", "raw", "mixed"])
def test_a_set_that_fits_is_resident_whatever_its_format(sets, kind):
    beton = Beton(sets[kind])
    loader, line = open_loader(beton, plan_of(beton), CPU, AUTO)
    assert loader.name == "resident"
    assert f"{beton.num_samples} samples, resident loader (" in line
    assert "B decoded fit 25% of cpu memory)" in line


@pytest.fixture
def free(monkeypatch) -> dict[str, int]:
    """How much memory is free, on whatever device."""
    figures = {"bytes": 100_000_000}
    monkeypatch.setattr(resident_set, "free_bytes", lambda device: figures["bytes"])
    return figures


def test_a_gpu_decodes_what_does_not_fit(beton, small_memory, free, a_gpu, on_cuda_path):
    free["bytes"] = 1_000_000
    with on_cuda_path():
        kind, reason = choose_backend(beton, plan_of(beton), a_gpu, AUTO)
    assert kind == "dali"
    assert reason == "2.1 MB decoded exceed 25% of cuda memory; decoding on the GPU"


def test_a_run_that_goes_on_decodes_as_before_where_it_can(beton, free, a_gpu, monkeypatch, on_cuda_path):
    monkeypatch.setattr(choose, "memory_bytes", lambda device: 100_000_000)
    evaluation = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=4)

    def chosen(before: str, device: torch.device, plan: TrainPlan | EvalPlan | None = None) -> tuple[str, str]:
        return choose_backend(beton, plan or plan_of(beton), device, LoaderOptions(workers=2, before=before))

    with on_cuda_path():
        assert chosen("dali", a_gpu) == ("dali", "not resident, as before; decoding on the GPU")
        assert chosen("ffcv", a_gpu)[0] == "resident"  # which a GPU would starve on
        free["bytes"] = 3_000_000  # of which a new run's auto takes half at most
        assert chosen("", a_gpu)[0] == "dali"
        assert chosen("resident", a_gpu) == ("resident", "as the run has decoded so far")
        free["bytes"] = 2_000_000
        why = "2.1 MB decoded, and cuda has 2.0 MB free; decoding on the GPU"
        assert chosen("resident", a_gpu) == ("dali", why)
    free["bytes"] = 100_000_000
    monkeypatch.setattr(choose, "kept_or_measured", lambda *_: pytest.fail("measures"))
    for kind in ("ffcv", "dali"):
        for plan in (plan_of(beton), evaluation):
            assert chosen(kind, CPU, plan) == (kind, "as the run has decoded so far")
    monkeypatch.setattr(choose, "why_no_dali", lambda device: "no DALI")
    loader, line = open_loader(beton, plan_of(beton), CPU, LoaderOptions(workers=2, before="dali"))
    loader.close()
    assert line.endswith(
        "ffcv loader (not resident, as before; no DALI; the run has decoded with dali so far, and pixels may "
        "differ a little from here on)"
    )


H100, IMAGENET_100 = 84_900_000_000, 19_000_000_000
"""Memory of the GPU, and what the training set takes whose longer sides are 256 pixels."""


@pytest.mark.parametrize(
    ("size", "free", "why"),
    [
        (IMAGENET_100, 82_000_000_000, ""),
        (IMAGENET_100, 30_000_000_000, "19.0 GB decoded, and cuda has 30.0 GB free, of which auto takes at most half"),
        (IMAGENET_100, 3_000_000_000, "19.0 GB decoded, and cuda has 3.0 GB free"),
        (
            30_000_000_000,
            82_000_000_000,
            "30.0 GB decoded exceed 25% of cuda memory (--loader resident takes them: cuda has 82.0 GB free)",
        ),
        (45_000_000_000, 82_000_000_000, "45.0 GB decoded exceed 25% of cuda memory"),
    ],
)
def test_a_gpu_keeps_what_leaves_room_for_training(size, free, why):
    assert why_not_resident(size, H100, free, torch.device("cuda")) == why


def test_a_gpus_memory_is_its_own(on_cuda_path):
    properties, figures = SimpleNamespace(total_memory=3 * 10**9), (700_000_000, 3 * 10**9)
    with on_cuda_path(
        get_device_properties=lambda device: properties,
        mem_get_info=lambda device: figures,
        memory_reserved=lambda device: 90_000_000,
        memory_allocated=lambda device: 30_000_000,
    ):
        assert choose.memory_bytes(CPU) == 3 * 10**9
        assert FREE_BYTES(CPU) == 760_000_000  # what torch keeps without need counts
    assert choose.memory_bytes(CPU) == resources.memory().total


def test_without_a_gpu_the_faster_one_is_taken_and_the_figures_are_kept(beton, small_memory, monkeypatch):
    figures = {"ffcv": 10.0, "dali": 20.0}
    monkeypatch.setattr(
        choose, "measure", lambda backends, plan, device: [b.close() for b in backends.values()] and figures
    )
    kind, reason = choose_backend(beton, plan_of(beton), CPU, AUTO)
    assert kind == "dali"
    assert reason.endswith("measured just now: ffcv 10 img/s, dali 20 img/s")
    figures = {"ffcv": 0.0, "dali": 0.0}  # which would be found now
    kind, reason = choose_backend(beton, plan_of(beton), CPU, AUTO)
    assert kind == "dali"
    assert reason.endswith("measured before (train.beton.speed.json): ffcv 10 img/s, dali 20 img/s")
    _, reason = choose_backend(beton, plan_of(beton, img_size=32), CPU, AUTO)  # another matter
    assert "measured just now: ffcv 0" in reason
    assert len(json.loads(speed_path(beton).read_text())) == 2


def test_without_dali_there_is_ffcv(beton, small_memory, monkeypatch):
    monkeypatch.setattr(choose, "why_no_dali", lambda device: "NVIDIA DALI cannot be imported (x)")
    assert choose_backend(beton, plan_of(beton), CPU, AUTO)[0] == "ffcv"
    said = r"--loader dali needs the package nvidia-dali-cuda130, .*`pip install 'lowrank-vit\[dali\]'`, or decode"
    with hidden_packages("nvidia.dali"), pytest.raises(UserError, match=said):
        open_loader(beton, plan_of(beton), CPU, LoaderOptions("dali", 2))


OLD_DRIVER = (
    "Critical error when building pipeline:\nError when constructing operator: decoders__Image, encountered:\n"
    "[/opt/dali/core/cuda.cc:57] CUDA runtime API error cudaErrorInsufficientDriver (35):\nCUDA driver version is "
    "insufficient for CUDA runtime version\nStacktrace (9 entries):\n[frame 0]: /lib/libdali.so"
)


@pytest.mark.parametrize(("other", "told"), [(20, "20 samples, and this set has 24"), (24, "some of other sizes")])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_plan_of_another_set_is_refused(beton, other, told, is_training):
    sides = np.full(other, 300)
    plan = TrainPlan.of(Sides(sides, sides), img_size=16, batch_size=4)
    if not is_training:
        plan = EvalPlan.of(Sides(sides, sides), img_size=16, batch_size=4)
    with pytest.raises(UserError, match=f"the plan is of another set than .*: of .*{told}"):
        open_loader(beton, plan, CPU, AUTO)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        *(({"workers": n}, r"^workers takes a whole number of at least 1, not ") for n in (0, -1, "2", 1.5, None)),
        *(({"device": d}, "^device takes auto, cpu, cuda") for d in (None, 0, "tpu", "cpu:1", torch.device("meta"))),
        ({"device": torch.device("cuda", 99)}, "^device=cuda:99: "),
        *(({"beton": b}, "^beton takes an open Beton") for b in ("val.beton", None)),
        *(({"plan": p}, "^plan takes a TrainPlan or an EvalPlan") for p in (None, "train")),
        *(({"options": o}, "^options takes LoaderOptions or None") for o in ({"workers": 1}, "ffcv")),
        ({"options": LoaderOptions("nope")}, "^options.loader takes auto, resident, dali or ffcv, not 'nope'"),
        ({"options": LoaderOptions("backend")}, "^options.loader takes"),
        ({"prepare": 3}, "^prepare takes a function"),
        ({"say": None}, "^say takes a function"),
    ],
)
def test_an_argument_outside_its_range_is_named(beton, arguments, told):
    with pytest.raises(UserError, match=told):
        open_loader(**{"beton": beton, "plan": plan_of(beton), "device": "cpu", **arguments})


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"prefetch": 0}, {"on_bad_sample": "x"}, {"hw_decoder_load": 2}])
def test_options_outside_their_ranges_are_refused(wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} takes"):
        LoaderOptions(**wrong)


def test_batches_that_there_are_not_are_refused(beton):
    loader, _ = open_loader(beton, plan_of(beton), "cpu", workers=1)
    wrong: Any
    for wrong in (-1, 7, 999, "0", 1.5):
        with pytest.raises(UserError, match=r"^first_step takes a whole number from 0 to 6, not "):
            loader.batches(0, first_step=wrong)
    for wrong in (-1, "a", None, 0.5):
        with pytest.raises(UserError, match=r"^epoch takes a whole number"):
            loader.batches(wrong)
    assert [len(list(loader.batches(0, first_step=step))) for step in (0, 5, 6)] == [6, 1, 0]
    loader.close()


def test_where_dali_cannot_use_the_gpu_the_cpu_decodes(beton, small_memory, free, monkeypatch, on_cuda_path):
    """A driver that is new enough for torch may be too old for DALI."""
    free["bytes"] = 1_000_000
    starts = [RuntimeError(OLD_DRIVER)]

    def start(shape):
        if starts:
            raise starts[0]
        return start_pipeline(shape)

    start_pipeline = dali.start_pipeline
    monkeypatch.setattr(dali, "start_pipeline", start)
    why = "CUDA runtime API error cudaErrorInsufficientDriver (35): CUDA driver version is insufficient for CUDA "
    advice = "Update the NVIDIA driver, install a DALI that is built for it, or decode on the CPU with --loader ffcv."
    dali.why_no_dali.cache_clear()
    with on_cuda_path():
        kind, reason = choose_backend(beton, plan_of(beton), CPU, AUTO)
        with pytest.raises(UserError) as refused:
            make_backend("dali", beton, plan_of(beton), CPU, AUTO)
        dali.why_no_dali.cache_clear()
        starts.clear()
        assert dali.why_no_dali(CPU) == ""
        assert choose_backend(beton, plan_of(beton), CPU, AUTO)[0] == "dali"
    dali.why_no_dali.cache_clear()
    found = f"NVIDIA DALI cannot use this GPU ({why}runtime version)"
    assert (kind, reason) == ("ffcv", f"2.1 MB decoded exceed 25% of cpu memory; {found}")
    assert str(refused.value) == f"--loader dali: {found}. {advice}"
    starts.append(RuntimeError(OLD_DRIVER))
    with pytest.raises(UserError, match=r"--loader dali: NVIDIA DALI cannot start \(CUDA runtime API error"):
        make_backend("dali", beton, plan_of(beton), CPU, AUTO)


def test_resident_says_when_there_is_no_room(beton, free):
    free["bytes"] = 1000
    with pytest.raises(
        UserError,
        match=r"--loader resident: .*train.beton takes 2.1 MB decoded, but cpu has 1.0 kB free.*Use --loader auto",
    ):
        open_loader(beton, plan_of(beton), CPU, LoaderOptions("resident", 2))


def full(error: Exception):
    def take(*_: object) -> torch.Tensor:
        raise error

    return take


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 1.00 GiB")


@pytest.mark.parametrize("which", ["_empty", "_pinned", "decode_jpeg"])
@pytest.mark.parametrize("error", [OUT, MemoryError()])
def test_memory_that_cannot_be_had_after_all_is_another_loaders_cause(
    beton, free, monkeypatch, on_cuda_path, which, error
):
    """Another process may have taken it, or there is no piece of this size."""
    monkeypatch.setattr(resident_set, which, full(error))
    if which == "_pinned":
        staged = on_cuda_path()(resident_set.ResidentSet.__init__)
        monkeypatch.setattr(resident_set.ResidentSet, "__init__", staged)
    monkeypatch.setattr(choose, "kept_or_measured", lambda *_: ({"ffcv": 30.0, "dali": 4.0}, "measured just now"))
    loader, line = open_loader(beton, plan_of(beton), CPU, AUTO)
    assert loader.name == "ffcv"
    assert "ffcv loader (2.1 MB decoded, but cpu, where 100.0 MB are free, has no room (" in line
    assert f"({type(error).__name__}" in line
    assert "Tried to" not in line
    assert sum(1 for _ in loader.batches(0)) == 6
    loader.close()
    with pytest.raises(UserError, match=r"^--loader resident: .*train.beton takes 2.1 MB.*Use --loader auto.$"):
        open_loader(beton, plan_of(beton), CPU, LoaderOptions("resident", 2))


def test_what_one_rank_cannot_have_no_rank_takes(beton, free, monkeypatch):
    released = []
    release = resident_set.ResidentSet.release
    monkeypatch.setattr(resident_set.ResidentSet, "release", lambda s: (released.append(s.pixels.numel()), release(s)))
    monkeypatch.setattr(choose, "why_no_dali", lambda device: "no DALI")
    others = iter(["", "cuda:1 is full", "no DALI"])  # which resident set fits, which can be had, whether there is DALI
    options = LoaderOptions(workers=2, of_all_ranks=lambda value: [value, next(others)])
    loader, line = open_loader(beton, plan_of(beton), CPU, options)
    assert loader.name == "ffcv"
    assert "ffcv loader (cuda:1 is full (on rank 1); no DALI (on rank 0))" in line
    assert released == [beton.decoded_bytes]
    assert not list(others)


def test_evaluation_is_never_left_to_a_measurement(beton, small_memory, free, monkeypatch):
    monkeypatch.setattr(choose, "kept_or_measured", lambda *_: pytest.fail("measures"))
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=4)
    free["bytes"] = 1_000_000
    assert choose_backend(beton, plan, CPU, AUTO) == ("dali", "2.1 MB decoded exceed 25% of cpu memory; evaluation")
    monkeypatch.setattr(choose, "memory_bytes", lambda device: 100_000_000)
    free["bytes"] = 100_000_000
    assert choose_backend(beton, plan, CPU, AUTO)[0] == "resident"


@pytest.fixture
def ranks(beton, monkeypatch):
    """What is chosen by three ranks, of which this one is the first; `others` is what the other two say each time."""

    def choose_with(*others: tuple[object, object]) -> tuple[str, str]:
        said = iter(others)
        options = LoaderOptions(workers=2, of_all_ranks=lambda value: [value, *next(said)])
        return choose_backend(beton, plan_of(beton), CPU, options)

    return choose_with


def test_all_ranks_take_what_fits_all(ranks, monkeypatch):
    assert ranks(("", ""))[0] == "resident"
    monkeypatch.setattr(choose, "kept_or_measured", lambda *_: ({"ffcv": 30.0, "dali": 40.0}, "measured just now"))
    fast, slow = ({"ffcv": 99.0, "dali": 99.0}, "measured"), ({"ffcv": 20.0, "dali": 10.0}, "measured")
    kind, reason = ranks(("", "no room"), ("", ""), (fast, slow))  # the slowest rank counts
    assert kind == "ffcv"
    assert reason == "no room (on rank 2); measured just now: ffcv 20 img/s, dali 10 img/s on the slowest rank"
    kind, reason = ranks(("no room", ""), ("no DALI", "no DALI"))
    assert (kind, reason) == ("ffcv", "no room (on rank 1); no DALI (on rank 1)")
    kind, reason = ranks(("no room", ""), ("", ""), (fast, ({}, "damaged")))
    assert (kind, reason) == ("ffcv", "no room (on rank 1); damaged (on rank 2)")
