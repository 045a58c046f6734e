"""Layers in factors on a CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

from lowrank_vit.model.low_rank import LowRankLinear, product

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("LRV_REQUIRE_GPU") == "1":
        pytest.fail("LRV_REQUIRE_GPU=1, but torch sees no CUDA device")
    pytest.skip("needs a CUDA device")


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
