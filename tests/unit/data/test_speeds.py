"""Speeds of decoding: measured on the same batches, kept beside the set, and had all the same where that cannot be."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_vit.data import speeds
from lowrank_vit.data.choose import make_backend
from lowrank_vit.data.decode.backend import DamagedSamples, LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.speeds import keep, kept, kept_or_measured, key_of, measure, speed_path
from lowrank_vit.plan.plans import TrainPlan, TrainRules

CPU = torch.device("cpu")


def plan_of(beton: Beton) -> TrainPlan:
    return TrainPlan(beton.heights, beton.widths, TrainRules(), seed=5, img_size=16, batch_size=4)


def test_both_are_measured_on_the_same_batches(beton):
    plan, workers = plan_of(beton), 2
    backends = {kind: make_backend(kind, beton, plan, CPU, LoaderOptions(workers=workers)) for kind in ("ffcv", "dali")}
    seen: dict[str, list] = {kind: [] for kind in backends}
    for kind, backend in backends.items():
        decode = backend.decode

        def noted(schedule, decode=decode, kind=kind):
            for batch in decode(schedule):
                seen[kind].append(batch.plan.ids.tolist())
                yield batch

        backend.decode = noted  # type: ignore[method-assign]
    speeds = measure(backends, plan, CPU)
    assert seen["ffcv"] == seen["dali"] == 4 * plan.ids(0).tolist()
    assert min(speeds.values()) > 0


def test_slow_gpus_and_large_batches_are_timed_for_a_while_not_for_so_many_batches(beton, monkeypatch, on_cuda_path):
    now, closed, plan = [0.0], [0], plan_of(beton)

    def decode(schedule):
        try:
            for plan in schedule:
                now[0] += 0.2
                yield plan.ids
        finally:
            now[0] += 5.0  # ending early what is decoded ahead counts for nothing
            closed[0] += 1

    slow: Any = SimpleNamespace(decode=decode, close=lambda: None)
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: now[0])
    with on_cuda_path():
        assert measure({"slow": slow}, plan, CPU) == {"slow": pytest.approx(4 / 0.2)}
    assert closed == [4]
    assert now[0] == pytest.approx(4 * (3 * 0.2 + 5.0))


def test_what_is_measured_is_kept_under_all_that_counts(beton):
    key, figures = key_of(beton, plan_of(beton), 2, gpu="one"), iter([{"a": 1.0}, {"a": 2.0}, {"a": 3.0, "b": 4.0}])

    def found(key, names="a"):
        return kept_or_measured(beton, key, names, lambda: next(figures))

    assert found(key) == ({"a": 1.0}, "measured just now")
    assert found(key) == ({"a": 1.0}, "measured before (train.beton.speed.json)")
    assert found({**key, "workers": 3}) == ({"a": 2.0}, "measured just now")
    assert found(key, "ab") == ({"a": 3.0, "b": 4.0}, "measured just now")  # something else is wanted
    assert len(json.loads(speed_path(beton).read_text())) == 2


def test_a_set_in_a_folder_that_cannot_be_written_is_measured_each_time(beton, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(speeds, "write_whole", refuse)
    for speed in (1.0, 2.0):
        found = kept_or_measured(beton, {}, "a", lambda speed=speed: {"a": speed})
        assert found == ({"a": speed}, "measured (but the folder cannot be written to keep it)")


def test_damaged_samples_are_not_measured(beton):
    content = bytearray(beton.path.read_bytes())
    for pointer in beton.pointers[:24].tolist():
        content[pointer : pointer + 100] = bytes(100)
    beton.path.write_bytes(content)
    broken = Beton(beton.path)

    def measured():
        return measure(
            {"dali": make_backend("dali", broken, plan_of(broken), CPU, LoaderOptions())}, plan_of(broken), CPU
        )

    with pytest.raises(DamagedSamples):
        measured()
    assert kept_or_measured(broken, {}, ["dali"], measured) == ({}, "not measured, since the first samples are damaged")
    assert not speed_path(broken).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"{}": 3}', '{"{}": {"a": "fast"}}', '{"{}": {"a": -1}}'])
def test_a_damaged_file_of_speeds_is_none(beton, text):
    speed_path(beton).write_text(text)
    assert kept(beton, {}) == {}
    assert keep(beton, {}, {"a": 1.0})
    assert kept(beton, {}) == {"a": 1.0}


def test_dali_needs_no_distribution_of_its_name(monkeypatch):
    installed = speeds.dali_version()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert speeds.dali_version() == installed
