"""The GPU's kernels for image operations, run by Triton's interpreter on a CPU, against their twin in tensor code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lowrank_vit.plan.operations import ImageOps, Kind
from tests.triton_interpreter import interpreted
from tests.unit.augment.test_ops import FILL, PICTURES, as_tensors, grid, plan_of

SMALL = ("cat, 32 px", "one row")
MANY = "batches of many operations"


def worst_errors() -> dict[str, int]:
    """Greatest difference in levels for each operation, and for batches that mix them in two layers."""
    from lowrank_vit.augment import ops_triton

    def error(images: np.ndarray, planned: ImageOps) -> int:
        made = ops_triton.apply_ops(torch.from_numpy(images.copy()), planned, torch.tensor(FILL, dtype=torch.uint8))
        return int(np.abs(made.numpy().astype(int) - as_tensors(images, planned)).max())

    errors = {}
    for kind in Kind:
        rows = grid(kind)[::2]
        batches = [np.repeat(PICTURES[name][None], len(rows), axis=0) for name in SMALL]
        errors[kind.name] = max(error(np.ascontiguousarray(images), plan_of(rows)) for images in batches)
    random, choices = np.random.default_rng(0), [row for kind in Kind for row in grid(kind)]
    flat = plan_of([choices[i] for i in random.integers(0, len(choices), 16)])
    layers = ImageOps(*(x.reshape(8, 2) for x in (flat.kinds, flat.args, flat.interpolations)))
    # Over 2,048 pixels, so that tables are made in several blocks.
    errors[MANY] = error(random.integers(0, 256, (8, 61, 43, 3), dtype=np.uint8), layers)
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted("tests.unit.augment.test_ops_triton")


@pytest.mark.parametrize("name", [*(kind.name for kind in Kind), MANY])
def test_pixels_are_the_twins(errors: dict[str, float], name: str) -> None:
    assert errors[name] == 0


if __name__ == "__main__":
    print(json.dumps(worst_errors()))
