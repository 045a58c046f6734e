"""FLOPs, the device's peak, and their ratio."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lowrank_vit.model import flops
from lowrank_vit.model.flops import Peak, memory_gb, mfu, peak_flops, train_flops_per_image
from lowrank_vit.model.lora import Lora, add_adapters

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "gflop"), [("vit_small_patch16_224", 28), ("vit_base_patch16_224", 105)])
def test_flops_are_the_published_ones(name, gflop):
    assert train_flops_per_image(timm.create_model(name), 224) == pytest.approx(gflop * 1e9, rel=0.02)


def test_flops_are_those_of_the_formula():
    """A multiply-add is two; each block has 12 d^2 + 2 n d of them a token (d wide, n tokens)."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=10
    )
    n, d = 65, 48
    macs = 64 * 4 * 4 * 3 * d + 3 * n * (12 * d * d + 2 * n * d) + 10 * d
    assert train_flops_per_image(model, 32) == 3 * 2 * macs


def test_a_frozen_weight_has_no_gradient_to_compute():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=10
    )
    whole = train_flops_per_image(model, 32)
    n, d, r = 65, 48, 4
    add_adapters(model, Lora(r, 4.0, tuple(f"blocks.{block}.mlp.fc1" for block in range(3))))
    of_adapters, frozen = 3 * n * r * (d + 4 * d), 64 * 4 * 4 * 3 * d + 3 * n * 12 * d * d
    assert whole is not None
    assert train_flops_per_image(model, 32) == whole + 3 * 2 * of_adapters - 2 * frozen


def test_counting_leaves_no_trace():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.5, drop_rate=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    flops = train_flops_per_image(model, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    assert train_flops_per_image(model, 32) == flops  # what is computed again does not count


def test_a_model_that_cannot_be_counted_is_trained_all_the_same():
    class NeedsData(nn.Module):
        def forward(self, x):
            return x * float(x.sum())

    assert train_flops_per_image(NeedsData(), 8) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, False, 756),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float32, True, 494.7),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312),
        ("NVIDIA L4", torch.bfloat16, False, 121),
        ("NVIDIA L40S", torch.bfloat16, False, 362.05),
    ],
)
def test_listed_devices_have_their_vendors_figure(on_cuda_path, name, dtype, tf32, tflops):
    with on_cuda_path(get_device_name=lambda device: name):
        peak = peak_flops(CPU, dtype, tf32=tf32)
    assert peak.flops_per_s == tflops * 1e12
    assert name in peak.name
    assert "listed" in peak.name


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA GB200", "A100X"])
def test_devices_with_a_listed_name_inside_their_own_are_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    measured = Peak(1e12, "measured")
    monkeypatch.setattr("lowrank_vit.model.flops._measured", lambda device, dtype: measured)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is measured


def test_other_devices_are_measured():
    peak = peak_flops(CPU, torch.float32)
    assert 1e8 < peak.flops_per_s < 1e14
    assert "1024 x 1024 float32 product measured here" in peak.name


def test_a_product_on_a_gpu_is_larger_and_waited_for(monkeypatch, on_cuda_path):
    waits: list[torch.device] = []
    monkeypatch.setattr(flops, "_SIDE_ON_CUDA", 1100)
    with on_cuda_path(get_device_name=lambda device: "NVIDIA RTX A4000", synchronize=waits.append):
        peak = peak_flops(CPU, torch.float64)
    assert "1100 x 1100 float64 product measured here" in peak.name
    assert 1e8 < peak.flops_per_s < 1e14
    assert waits == [CPU] * 10  # before and behind each of five


def test_memory_of_a_gpu_is_the_most_that_tensors_took(on_cuda_path):
    with on_cuda_path(max_memory_allocated=lambda device: 2_700_000_000):
        assert memory_gb(CPU) == 2.7


def test_mfu_is_the_share_of_all_devices_peaks():
    assert mfu(1000, 1e9, Peak(1e13, ""), num_devices=2) == pytest.approx(0.05)


def test_memory_of_a_cpu_is_the_process_size():
    before = memory_gb(CPU)
    kept = torch.ones(50_000_000)  # 0.2 GB
    assert memory_gb(CPU) - before == pytest.approx(0.2, abs=0.1)
    assert len(kept) == 50_000_000
