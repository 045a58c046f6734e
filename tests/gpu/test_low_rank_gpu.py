"""Low rank on a CUDA device: factorised layers, moments, and how the factors come about."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from lowrank_vit.lowrank.calibration import Moments, calibrate
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.truncate import decompose_layers
from lowrank_vit.model.low_rank import LowRankLinear, product
from tests.unit.lowrank.examples import model_and_images

pytestmark = pytest.mark.gpu


def layer(parts: int) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(torch.randn(192, 24), torch.randn(24 * parts, 96) / 30, torch.randn(192))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_product_is_that_of_a_cpu_whatever_float32_means(parts: int) -> None:
    expected = product(layer(parts).up, layer(parts).down)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        on_gpu = layer(parts).cuda()
        found = product(on_gpu.up, on_gpu.down).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_compiled_layer_trains_in_bfloat16(parts: int) -> None:
    model = layer(parts).cuda()
    x = torch.randn(4, 17, 96, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = torch.compile(model, fullgraph=True)(x)
        found.float().square().mean().backward()
    assert found.dtype is torch.bfloat16
    assert (found.float() - model.merged()(x)).abs().max() < 0.05 * found.abs().max()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_gpus_moments_and_factors_are_the_cpus(method: str) -> None:
    model, images = model_and_images()
    there = copy.deepcopy(model).cuda()
    expected = calibrate(model, images.split(4), model.targets())
    found = calibrate(there, images.split(4), there.targets())
    for name, moments in found.items():
        for field in dataclasses.fields(Moments)[2:]:
            value = getattr(moments, field.name)
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), getattr(expected[name], field.name), rtol=1e-9, atol=1e-14)
    on_cpu = decompose_layers(model.targets(), METHODS[method], expected)
    on_gpu = decompose_layers(there.targets(), METHODS[method], found)
    for name, one in on_gpu.items():
        for a, b in ((one.losses, on_cpu[name].losses), (one.values_PK, on_cpu[name].values_PK)):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-6, atol=1e-12)
        (up, down, _), (up_c, down_c, _) = one.factors(2), on_cpu[name].factors(2)
        torch.testing.assert_close((up @ down).cpu(), up_c @ down_c, rtol=1e-6, atol=1e-9)
