"""Normalising and erasing as torch.compile fuses them for a GPU, here compiled for the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_vit.augment.mixing import mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.mixing import Mix
from tests.unit.augment.test_pipeline import FULL, photographs, plan_of


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_erasing_is_eager():
    photos, plan = photographs(9, 40), plan_of(FULL, 9, 40)
    assert plan.erase is not None
    augment = Augment((0.5,) * 3, (0.2,) * 3, 10, 0.1, "pixel", compile=True)
    images = torch.from_numpy(photos).permute(0, 3, 1, 2)
    boxes, keys = torch.from_numpy(plan.erase.boxes), torch.from_numpy(plan.erase.keys.astype(np.int64))
    mix = mix_to_tensor([Mix(0.3, is_cutmix=False)])
    compiled = augment._erase_on_cuda(images, boxes, keys, mix)
    torch.testing.assert_close(compiled, augment._normalize_and_erase(images, boxes, keys, mix), rtol=0, atol=2e-6)
