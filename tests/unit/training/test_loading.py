"""What the loaders of a run are told of it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.data.loader import Loader
from lowrank_vit.model.create import InputSpec
from lowrank_vit.model.flops import Peak
from lowrank_vit.model.weights import Checkpoint
from lowrank_vit.ranks.world import World
from lowrank_vit.training.loading import MOST_MFU, fed_step, loaders_before, room_beside, with_workers

CPU = torch.device("cpu")


def step_of(*argv: str, flops: float | None = 28e9, ranks: int = 1) -> Any:
    spec = InputSpec(224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
    world: Any = SimpleNamespace(size=ranks)
    return fed_step(parse([*argv, "--synthetic"]), spec, world, CPU, flops, Peak(989e12, "H100"))


def test_a_step_is_known_by_all_that_its_speed_depends_on(monkeypatch, on_cuda_path):
    assert step_of() is None
    names = ["H100 MIG 1g.10gb"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    with on_cuda_path():
        a_slice = step_of()
        names[0] = "H100"
        one, same = step_of(), step_of("--lr", "1e-3", "--spec-every", "7")  # spectra of which there are none
        others = [step_of("-b", "64"), step_of("--model", "vit_base_patch16_224"), step_of("--amp")]
        others += [step_of("--opt", "adamw"), step_of("--clip-grad", "1"), step_of("--grad-accum-steps", "2")]
        others += [step_of("--aa", "rand-m9"), step_of("--reprob", "0.1"), step_of(ranks=2)]
        others += [step_of("--spec-monitor"), step_of("--spec-monitor", "--spec-every", "7")]
        of_rank, of_update = step_of("-b", "64", ranks=4), step_of("--global-batch-size", "256", ranks=4)
        unknown = step_of(flops=None)
    assert one.key == same.key
    assert len({json.dumps(step.key) for step in (one, a_slice, *others)}) == 2 + len(others)
    assert of_update.key == of_rank.key
    assert one.estimate == pytest.approx(MOST_MFU * 989e12 / 28e9)
    assert unknown.estimate is None


def test_where_training_has_no_memory_it_is_said_what_resident_sets_take():
    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
    train, val, decoding = (cast(Loader, SimpleNamespace(resident_bytes=n)) for n in (19_000_000_000, 10**9, 0))
    found = (
        r"^CUDA out of memory\. Decoded images take 20\.0 GB of the GPU's memory: Free that memory with --loader dali"
    )
    with pytest.raises(UserError, match=found), room_beside(train, val):
        raise out
    for loaders in ((decoding, None), (decoding, decoding), ()):
        with pytest.raises(torch.OutOfMemoryError), room_beside(*loaders):
            raise out
    with pytest.raises(ValueError, match="another"), room_beside(train):
        raise ValueError("another")


@pytest.mark.parametrize("damaged", [None, [], "dali", {"train": "dlai", "val": ["dali"]}])
def test_what_a_run_has_decoded_with_is_read_of_its_checkpoint(damaged):
    def of(content: dict[str, Any]) -> dict[str, str]:
        return loaders_before(cast(Checkpoint, SimpleNamespace(content=content)))

    assert of({"loaders": {"train": "dali", "val": "resident"}}) == {"train": "dali", "val": "resident"}
    assert of({"loaders": damaged}) == of({}) == loaders_before(None) == {}


def test_the_number_of_threads_is_decided_once():
    config = parse(["--synthetic"])
    assert config.data.workers is None
    assert with_workers(config, World(), CPU).data.workers == 4
    given = parse(["--synthetic", "-j", "7"])
    assert with_workers(given, World(), CPU) is given
    assert dataclasses.replace(config.data, workers=4) == with_workers(config, World(), CPU).data
