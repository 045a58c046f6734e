"""The share of the device's peak that a training step uses: model FLOPs, peak FLOP/s, and their ratio, MFU."""

from __future__ import annotations

import re
import time
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_vit.common.devices import cuda_path, wait_for

# Dense (no sparsity) peaks from the vendors' data sheets, TFLOP/s: bf16 or float16 with float32 sums; TF32.
# Names are searched in torch's device name as whole words, the longest first.
_LISTED = {
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.4, 494.7),  # SXM
    "H200 NVL": (835.5, 417.7),
    "H200": (989.4, 494.7),
    "GH200": (989.4, 494.7),
    "B200": (2250.0, 1125.0),
    "A100": (312.0, 156.0),
    "A800": (312.0, 156.0),
    "H800": (989.4, 494.7),
    "A40": (149.7, 74.8),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "A30": (165.0, 82.0),
    "L40S": (362.05, 183.0),
    "L40": (181.05, 90.5),
    "L4": (121.0, 60.0),
}
_SIDE_ON_CUDA, _SIDE_ON_CPU = 8192, 1024
_MEASUREMENTS = 5


class Peak(NamedTuple):
    """The peak arithmetic of a device."""

    flops_per_s: float
    name: str
    """Where the figure comes from."""


def train_flops_per_image(model: nn.Module, img_size: int) -> float | None:
    """FLOPs (a multiply-add counts as two) of one training image: three times those of the forward pass.

    The backward pass takes two products for each one of the forward pass (Chowdhery et al., PaLM, appendix B), or one
    if the layer's weight is frozen; recomputation by gradient checkpointing does not count. torch's FlopCounterMode
    counts the forward pass on tensors without data. None if the model cannot be counted this way.
    """
    try:
        by_module = _forward_flops(model, img_size)
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
        frozen = [n for n, of in own.items() if "weight" in of and not any(p.requires_grad for p in of.values())]
        return 3.0 * by_module[""] - sum(by_module.get(name, 0) for name in frozen)
    except Exception:  # only a figure in the log: training must not fail without it
        return None


def forward_flops_per_image(model: nn.Module, img_size: int, device: torch.device | str = "meta") -> int:
    """FLOPs of one image's forward pass, see `train_flops_per_image`; `device`: where the pass is counted.

    Raises whatever the model raises there.
    """
    return _forward_flops(model, img_size, device)[""]


def _forward_flops(model: nn.Module, img_size: int, device: torch.device | str = "meta") -> dict[str, int]:
    """FLOPs by module name; "" is the whole model."""
    image = torch.zeros(1, 3, img_size, img_size, device=device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    there = {name: tensor.detach().to(device) for name, tensor in tensors.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, there, (image,))
    found = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    return {**found, "": counter.get_total_flops()}


def peak_flops(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> Peak:
    """The vendor's figure if the device is listed, otherwise the best of a few matrix products measured now.

    `dtype`: of the products; `tf32`: float32 products may use TF32. Takes about 0.2 s on a CPU, once per process.
    """
    if cuda_path(device):
        found = torch.cuda.get_device_name(device)
        is_whole = "MIG" not in found  # a slice of a GPU has a share of its peak
        for name in sorted(_LISTED, key=len, reverse=True):
            if is_whole and re.search(rf"\b{name}\b", found) and (dtype in (torch.bfloat16, torch.float16) or tf32):
                half, tf32_peak = _LISTED[name]
                kind, tflops = (
                    ("TF32", tf32_peak) if dtype is torch.float32 else (str(dtype).removeprefix("torch."), half)
                )
                return Peak(tflops * 1e12, f"{found}, listed {tflops:g} TFLOP/s {kind}")
    return _measured(device, dtype)


@cache
def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    side = _SIDE_ON_CUDA if cuda_path(device) else _SIDE_ON_CPU
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(_MEASUREMENTS):
        wait_for(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    flops_per_s = 2 * side**3 / min(seconds)
    kind = str(dtype).removeprefix("torch.")
    return Peak(flops_per_s, f"a {side} x {side} {kind} product measured here, {flops_per_s / 1e12:.2g} TFLOP/s")


def mfu(img_per_s: float, flops_per_image: float, peak: Peak, num_devices: int = 1) -> float:
    """Model FLOPs utilisation, 0-1: the model's FLOP/s divided by the peak of `num_devices`."""
    return img_per_s * flops_per_image / (peak.flops_per_s * num_devices)


def memory_gb(device: torch.device) -> float:
    """GB (10^9 bytes): on CUDA the peak memory of tensors, on a CPU the process's resident memory. Never waits."""
    if cuda_path(device):
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9
