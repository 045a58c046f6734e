"""Rounds of training: nothing is decoded between them, and each has its refresh. No test asserts a time."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness import sets
from benchmarks.harness.sets import ensure_photos
from benchmarks.step import Workload, config_of
from benchmarks.training import timed_steps
from benchmarks.training.run import AUGMENTATION, with_data
from benchmarks.training.timed_steps import TimedSteps, first_updates, updates_of_rounds, warming_updates
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from tests.waiting import wait_until

CPU = torch.device("cpu")
BATCH, STEPS = 4, 3
PREFETCH = 2


ROUNDS = 4


def config_on(folder: Path, loader: str = "dali") -> Config:
    load = Workload("test_vit", 32, BATCH, STEPS)
    flags = ["--loader", loader, "--workers", "1", *AUGMENTATION]
    return with_data(config_of(load, CPU, "eager"), folder, flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set just long enough for the rounds."""
    root = tmp_path_factory.mktemp("timed")
    beton = sets.converted(ensure_photos(root / "photos_10", 10), "", ImageOptions())
    (root / "data").mkdir()
    times = sets.times_for(beton.num_samples, BATCH, updates_of_rounds(config_on(root / "data"), STEPS, ROUNDS))
    sets.link_repeated(beton.parts, root / "data" / "train.beton", times)
    sets.link_repeated(beton.parts, root / "data" / "val.beton", 1)
    return root / "data"


@pytest.mark.parametrize("loader", [pytest.param("ffcv", marks=pytest.mark.slow), "dali"])
def test_nothing_is_decoded_between_rounds_and_each_has_a_refresh_and_a_line_of_the_log(folder, loader):
    with TimedSteps(config_on(folder, loader), STEPS, None, ROUNDS) as training:
        decoded = training._loader._backend.decode_ms
        for n in range(3):
            training.before()
            position = training.trainer.state.position
            assert position.num_updates == first_updates(training.trainer.config, STEPS) + n * STEPS + (
                n + 1
            ) * warming_updates(PREFETCH)
            training.run()
            training.after()
            ahead = position.num_updates + PREFETCH + 1
            wait_until(lambda ahead=ahead: len(decoded) >= ahead)
            time.sleep(0.3)  # what other cases take
            assert len(decoded) == ahead
        log = (training.trainer.run_dir.path / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
    assert [one.refreshes for one in training.rounds] == [1, 1, 1]
    assert all(0 <= one.waiting_at_start <= 2 and one.queue_depth <= 2 for one in training.rounds)
    firsts = [n * (STEPS + warming_updates(PREFETCH)) for n in (1, 2, 3)]
    assert [line["update"] for line in lines if line["kind"] == "train"] == firsts
    assert [line["update"] for line in lines if line["kind"] == "spec"][:3] == [0, *firsts[:2]]


def test_the_phases_of_a_round_are_the_round(folder, monkeypatch):
    seconds: list[float] = []

    def timed(function, *given) -> None:
        begun = time.perf_counter()
        function(*given)
        seconds.append(time.perf_counter() - begun)

    with TimedSteps(config_on(folder), STEPS, 2 * (STEPS + warming_updates(PREFETCH)), ROUNDS) as training:
        monkeypatch.setattr(training, "_train", partial(timed, training._train))
        for _ in range(ROUNDS):
            training.before()
            timed(training.run)
            training.after()
            within, around = seconds[-2:]
            assert within <= sum(training.rounds[-1].seconds.values()) <= around
            assert all(s >= 0 for s in training.rounds[-1].seconds.values())
    assert [one.refreshes for one in training.rounds] == [0, 1, 0, 1]
    assert sum(one.skipped for one in training.rounds) == 0


def test_a_round_ends_when_the_decoder_has_stood_still_for_longer_than_a_batch_takes(monkeypatch):
    """By a clock that moves where it waits; a batch is ready after each 0.4 s, three in all."""
    now = [0.0]

    class OfLoader:
        waiting = property(lambda self: min(3, int(now[0] / 0.4)))

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(timed_steps, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    training: Any = SimpleNamespace(_loader=OfLoader())
    TimedSteps._let_decoder_finish(training, 0.5)
    assert now[0] == pytest.approx(3 * 0.4 + 0.5, abs=0.05)


def test_an_epoch_shorter_than_a_round_is_refused(folder):
    with pytest.raises(UserError, match=r"an epoch has \d+ updates, and 4 rounds take"):
        TimedSteps(config_on(folder), 100, None, ROUNDS)


def test_a_repeated_set_is_read_as_one(folder):
    beton = sets.Beton(folder / "train.beton")
    assert beton.num_samples == 10 * len(beton.parts) >= BATCH * updates_of_rounds(config_on(folder), STEPS, ROUNDS)
    assert beton.sample(0).tobytes() == beton.sample(10).tobytes()
    assert [sets.times_for(*of) for of in ((10, 4, 2), (10, 4, 3), (100, 4, 3))] == [1, 2, 1]
