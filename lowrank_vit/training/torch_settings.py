"""Settings of torch that are the process's own: where compiled code is kept, and how exact float32 products are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from lowrank_vit.common.errors import UserError


def keep_compiled_code(folder: Path | None) -> Path:
    """Have torch.compile keep its code in `folder`, so that the next start need not compile; returns where it is kept.

    Without `folder`: TORCHINDUCTOR_CACHE_DIR if the environment has it, else lowrank-vit/ in the user's cache folder
    (torch's own default is in /tmp, which clusters empty). Call it before anything is compiled. Raises `UserError` if
    the folder cannot be made.
    """
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    # torch itself writes its default there when it is imported; what else stands there is the user's.
    if folder is None and kept and not kept.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return Path(kept)
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank-vit"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}, where compiled code is to be kept, cannot be made: {error.strerror}. Choose another folder "
            "with --compile-cache."
        ) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())  # Triton's cache lies in it
    return folder


def set_float32_policy(device: torch.device, *, tf32: bool) -> None:
    """Whether float32 products and convolutions of the training step may use TF32 on CUDA (11 bits of mantissa).

    float64, which the spectra are computed in, is never affected, nor is a CPU. Convolutions also try out which of
    cuDNN's algorithms is the fastest for their one shape, as in timm.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
