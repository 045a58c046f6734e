"""Normalising, mixing and erasing as torch.compile fuses them for a GPU, here compiled for the CPU."""

from __future__ import annotations

import pytest
import torch

from lowrank_vit.augment.mixing import mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.mixing import Mix
from tests.unit.augment.test_pipeline import FULL, drawn_as_tensors, photographs, plan_of


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_erasing_is_eager():
    photos, plan = photographs(9, 40), plan_of(FULL, 9, 40)
    assert plan.erase is not None
    augment = Augment((0.5,) * 3, (0.2,) * 3, 10, 0.1, "pixel")
    _, boxes, keys = drawn_as_tensors(plan)
    arguments = torch.from_numpy(photos).permute(0, 3, 1, 2), torch.arange(9)
    drawn = mix_to_tensor([Mix(0.3, is_cutmix=False)]), boxes, keys
    compiled = torch.compile(augment)(*arguments, *drawn)
    torch.testing.assert_close(compiled, augment(*arguments, *drawn), rtol=0, atol=2e-6)
