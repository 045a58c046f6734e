"""Rounds of training: nothing is decoded between them, and each has its refresh. No test asserts a time."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.harness import sets
from benchmarks.harness.sets import ensure_photos
from benchmarks.step import Workload, config_of
from benchmarks.timed_steps import TimedSteps, batches_ahead, warming_steps
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError

CPU = torch.device("cpu")
BATCH, STEPS = 4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set just long enough for a round."""
    root = tmp_path_factory.mktemp("timed")
    beton = sets.converted(ensure_photos(root / "photos_10", 10), "", ImageOptions())
    (root / "data").mkdir()
    times = sets.times_for(beton.num_samples, BATCH, STEPS + warming_steps(2))
    sets.link_repeated(beton.parts, root / "data" / "train.beton", times)
    sets.link_repeated(beton.parts, root / "data" / "val.beton", 1)
    return root / "data"


def timed(folder: Path, loader: str, steps: int, every: int) -> TimedSteps:
    load = Workload("vit_tiny_patch16_224", 32, BATCH, steps)
    flags = ["--loader", loader, "--workers", "1", *end_to_end.AUGMENTATION]
    return TimedSteps(end_to_end._real(config_of(load, CPU, "eager"), folder, flags), steps, every)


@pytest.mark.parametrize("loader", [pytest.param("ffcv", marks=pytest.mark.slow), "dali"])
def test_nothing_is_decoded_between_rounds_and_a_round_begins_in_mid_epoch(folder, loader):
    with ExitStack() as stack:
        training = stack.enter_context(timed(folder, loader, STEPS, STEPS))
        decoded = training._loader._backend.decode_ms
        for n in range(3):
            training.before()
            assert training._loader.state_dict()["update"] == warming_steps(2)
            assert training.parts.step.position.num_updates == n * STEPS + (n + 1) * warming_steps(2)
            training.run()
            training.after()
            after = len(decoded)
            time.sleep(0.3)  # what other cases take
            assert len(decoded) == after
        # What had been decoded ahead when a round ended is not used by the next.
        assert len(decoded) <= 3 * (warming_steps(2) + STEPS + batches_ahead(2))
        assert len(decoded) >= 3 * (warming_steps(2) + STEPS)
    assert [one.refreshes for one in training.rounds] == [1, 1, 1]
    assert all(0 <= one.waiting_at_start <= 2 and one.queue_depth <= 2 for one in training.rounds)


def test_rounds_without_a_refresh_are_counted_as_such(folder):
    with ExitStack() as stack:
        training = stack.enter_context(timed(folder, "dali", STEPS, 2 * STEPS))
        for _ in range(4):
            training.before()
            training.run()
            training.after()
    assert [one.refreshes for one in training.rounds] == [1, 0, 1, 0]
    assert sum(one.skipped for one in training.rounds) == 0


def test_an_epoch_shorter_than_a_round_is_refused(folder):
    with pytest.raises(UserError, match=r"an epoch has \d+ batches, and a round takes"):
        timed(folder, "dali", 100, 1)


def test_a_repeated_set_is_read_as_one(folder):
    beton = sets.Beton(folder / "train.beton")
    assert beton.num_samples == 10 * len(beton.parts) >= BATCH * (STEPS + warming_steps(2))
    assert beton.sample(0).tobytes() == beton.sample(10).tobytes()
    assert [sets.times_for(*of) for of in ((10, 4, 2), (10, 4, 3), (100, 4, 3))] == [1, 2, 1]
