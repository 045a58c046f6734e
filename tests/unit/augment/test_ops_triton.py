"""The GPU's kernels for image operations, run by Triton's interpreter on a CPU, against their twin in tensor code."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.augment.pipeline import apply_operations
from lowrank_vit.plan.operations import ImageOps, Kind, parse_policy
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from tests.device_path import CudaPath
from tests.triton_interpreter import interpreted
from tests.unit.augment.test_ops import FILL, PICTURES, as_tensors, grid, plan_of

SMALL = ("cat, 32 px", "one row")
MANY = "batches of many operations"
LOADER = "the loader's half"


def worst_errors() -> dict[str, Any]:
    """Greatest difference in levels for each operation, and for batches that mix them in two layers.

    And of what a GPU's loader makes to what a CPU's makes, with the lines of the program that asked which way to go.
    """
    from lowrank_vit.augment import ops_triton

    def error(images: np.ndarray, planned: ImageOps) -> int:
        made = ops_triton.apply_ops(torch.from_numpy(images.copy()), planned, torch.tensor(FILL, dtype=torch.uint8))
        return int(np.abs(made.numpy().astype(int) - as_tensors(images, planned)).max())

    errors = {}
    for kind in Kind:
        rows = grid(kind)
        rows = rows[:: 5 if len(rows) > 8 else 2]  # of three filters each comes up, first, last and middle arguments
        batches = [np.repeat(PICTURES[name][None], len(rows), axis=0) for name in SMALL]
        errors[kind.name] = max(error(np.ascontiguousarray(images), plan_of(rows)) for images in batches)
    random, choices = np.random.default_rng(0), [row for kind in Kind for row in grid(kind)]
    flat = plan_of([choices[i] for i in random.integers(0, len(choices), 16)])
    layers = ImageOps(*(x.reshape(8, 2) for x in (flat.kinds, flat.args, flat.interpolations)))
    # Over 2,048 pixels, so that tables are made in several blocks.
    errors[MANY] = error(random.integers(0, 256, (8, 61, 43, 3), dtype=np.uint8), layers)
    sides, on_cuda_path = np.full(6, 13), CudaPath()
    rules = TrainRules(vflip=0.5, policy=parse_policy("rand-m9-mstd0.5-inc1"))
    plan = TrainPlan(sides, sides, rules, seed=11, img_size=13, batch_size=6).batch(3, 0, np.arange(6))
    pictures = random.integers(0, 256, (6, 13, 13, 3), dtype=np.uint8)
    made = []
    for way in (nullcontext, on_cuda_path):
        with way():
            images = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2)
            made.append(apply_operations(images, plan, torch.tensor(FILL, dtype=torch.uint8)).int())
    errors[LOADER] = int((made[0] - made[1]).abs().max())
    return {**errors, "asked": sorted(on_cuda_path.asked)}


@pytest.fixture(scope="module")
def errors() -> dict[str, Any]:
    return interpreted("tests.unit.augment.test_ops_triton")


@pytest.mark.parametrize("name", [*(kind.name for kind in Kind), MANY])
def test_pixels_are_the_twins(errors: dict[str, Any], name: str) -> None:
    assert errors[name] == 0


def test_a_gpus_loader_makes_the_cpus_pixels(errors: dict[str, Any], on_cuda_path: CudaPath) -> None:
    on_cuda_path.saw(errors["asked"])
    assert errors[LOADER] <= 1  # sums of float32 may fall on either side of a whole number


if __name__ == "__main__":
    print(json.dumps(worst_errors()))
