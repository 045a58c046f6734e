"""The operations as torch.compile fuses them for a GPU, here compiled for the CPU: one graph for groups of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_vit.augment import ops
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.data.plan_ops import BICUBIC, BILINEAR, Kind
from tests.unit.test_augment import FULL, photographs, plan_of
from tests.unit.test_augment_ops import FILL, as_tensors
from tests.unit.test_augment_ops import plan_of as ops_of

ROWS = [
    (Kind.ROTATE, 13.0, BICUBIC),
    (Kind.COLOR, 1.7, BILINEAR),
    (Kind.SHARPNESS, 0.3, BILINEAR),
    (Kind.SHEAR_Y, -0.2, BILINEAR),
    (Kind.EQUALIZE, 0.0, BILINEAR),
    (Kind.TRANSLATE_X, 7.3, BICUBIC),
]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_is_eager_for_groups_of_any_size_without_recompiling():
    seen = []
    for count in (12, 6, 18, 24):  # groups of two, one, three and four
        images, planned = photographs(count, 40), ops_of((ROWS * 4)[:count])
        changed = torch.from_numpy(images.copy())
        ops.apply_ops(changed, planned, torch.tensor(FILL, dtype=torch.uint8), compiled=True)
        error = np.abs(changed.numpy().astype(int) - as_tensors(images, planned))
        assert error.max() <= 1
        assert error.mean() < 0.02
        seen.append(graphs())
    assert seen == [seen[0]] * 4


def test_compiled_erasing_is_eager():
    photos, plan = photographs(9, 40), plan_of(FULL, 9, 40)
    assert plan.erase is not None
    augment = Augment((0.5,) * 3, (0.2,) * 3, 10, 0.1, "pixel", compile=True)
    images = torch.from_numpy(photos).permute(0, 3, 1, 2)
    boxes, keys = torch.from_numpy(plan.erase.boxes), torch.from_numpy(plan.erase.keys.astype(np.int64))
    compiled = augment._erase_on_cuda(images, boxes, keys)
    torch.testing.assert_close(compiled, augment._normalize_and_erase(images, boxes, keys), rtol=0, atol=2e-6)
