"""Devices: choosing one, the types of mixed precision on it, and waiting for it."""

from __future__ import annotations

import os

import torch

from lowrank_vit.common.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types by --amp-dtype."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; under torchrun the GPU is that of the rank, whatever N.

    Raises `UserError` where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or name.startswith("cpu:"):
        raise UserError(f"--device {name} is not known: it must be auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device. Check nvidia-smi, or use --device cpu.")
    if kind == "cpu":
        return torch.device("cpu")
    is_one_of_many = "LOCAL_RANK" in os.environ
    index = int(number) if number and not is_one_of_many else local_rank
    if index >= torch.cuda.device_count():
        what = f"process {local_rank + 1} of this machine has" if is_one_of_many or not number else "there is"
        advice = "Start at most that many with torchrun --nproc-per-node" if what[0] == "p" else "Give a smaller number"
        raise UserError(f"--device {name}: {what} no GPU left, torch sees {torch.cuda.device_count()}. {advice}.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
