"""Models and tensors from other programs: removing wrappers, and recognising tensors that are not plain arrays."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names added by DDP, torch.compile, FSDP and activation checkpointing; only the first two come first."""
_OUTER = ({"module"}, {"_orig_mod"})
"""The only child of DDP, DataParallel, timm's EMA and torch's averaged model; and of torch.compile."""


def plain_name(name: str) -> str:
    """The name of a tensor or module without wrappers: "module.a._orig_mod.b" -> "a.b"."""
    return _WRAPPERS.sub("", name)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, torch.compile, timm's ModelEma and torch's AveragedModel, or itself."""
    while {name for name, _ in model.named_children()} in _OUTER and not list(model.parameters(recurse=False)):
        model = next(model.children())
    return model


def oddity(tensor: Tensor) -> str:
    """Why a tensor is not a plain array of real numbers in memory, as a phrase; empty if it is one."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_quantized or tensor.is_complex():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    return "a tensor without values" if tensor.is_meta else ""
