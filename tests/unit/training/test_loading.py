"""What the loaders of a run are told of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowrank_vit.config.flags import parse
from lowrank_vit.model.create import InputSpec
from lowrank_vit.model.flops import Peak
from lowrank_vit.ranks.world import World
from lowrank_vit.training.loading import MOST_MFU, fed_step, with_workers

CPU = torch.device("cpu")


def step_of(*argv: str, flops: float | None = 28e9):
    spec = InputSpec(224, 0.9, (0.5,) * 3, (0.5,) * 3)
    return fed_step(parse([*argv, "--synthetic"]), spec, CPU, flops, Peak(989e12, "H100"))


def test_a_step_is_known_by_all_that_its_speed_depends_on(monkeypatch, on_cuda_path):
    assert step_of() is None
    names = iter(["H100", "H100", "H100 MIG 1g.10gb", *["H100"] * 4])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    with on_cuda_path():
        one, same, a_slice = step_of(), step_of("--lr", "1e-3"), step_of()
        others = [step_of("-b", "64"), step_of("--model", "vit_base_patch16_224"), step_of("--amp")]
        unknown = step_of(flops=None)
    assert one.key == same.key
    assert all(one.key != other.key for other in (a_slice, *others))
    assert one.estimate == pytest.approx(MOST_MFU * 989e12 / 28e9)
    assert unknown.estimate is None


def test_the_number_of_threads_is_decided_once():
    config = parse(["--synthetic"])
    assert config.data.workers is None
    assert with_workers(config, World(), CPU).data.workers == 4
    given = parse(["--synthetic", "-j", "7"])
    assert with_workers(given, World(), CPU) is given
    assert dataclasses.replace(config.data, workers=4) == with_workers(config, World(), CPU).data
