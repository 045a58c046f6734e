"""--initial-checkpoint: the weights that a run starts from, read as timm's `create_model` reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models
import torch
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.engine.checkpoint import Checkpoint, is_state_dict, load_weights, require_file

EMA_KEYS = ("state_dict_ema", "model_ema")
"""Where timm looks for EMA weights first."""


def load_initial(model: nn.Module, path: Path, model_name: str, say: Callable[[str], object]) -> None:
    """Copy a file's weights into the model, the EMA's where it has them, and say which; they must fit.

    timm's own helper reads the file: weights of DDP and of compiled modules under the plain names, `{"model": ...}`,
    safetensors. Raises `UserError` naming the file.
    """
    require_file(path)
    try:
        weights = timm.models.load_state_dict(str(path))
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UserError(
            f"--initial-checkpoint {path} cannot be read: it is damaged, cut short, or no file with tensors and plain "
            "values only. Give a file such as a run's model_best.pth.tar."
        ) from error
    if not is_state_dict(weights):
        raise UserError(f"--initial-checkpoint {path} holds no `state_dict`. Give a checkpoint with weights.")
    top = _top_level(path)
    load_weights(model, Checkpoint(path, top), weights, model_name)
    say(f"initial weights: {'the EMA of' if any(top.get(key) is not None for key in EMA_KEYS) else 'those of'} {path}")


def _top_level(path: Path) -> dict[str, Any]:
    """What the file says beside its weights; tensors are mapped, not read again."""
    if path.suffix == ".safetensors":
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # an older format, which cannot be mapped: timm has just read it
        return {}
    return content if isinstance(content, dict) else {}
