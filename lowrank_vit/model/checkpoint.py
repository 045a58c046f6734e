"""Checkpoints in timm's layout: read with `weights_only=True`, checked before use."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning

BETTER = "better"
"""Key of a checkpoint's content: "model" or "ema", whichever scored higher in the newest epoch; "" before the first."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content; tensors are on the CPU."""

    path: Path
    content: dict[str, Any]
    """timm's keys: arch, epoch, state_dict, state_dict_ema, optimizer, args, metric, ..."""

    @property
    def arch(self) -> str:
        """Timm model name, empty where the file does not tell."""
        return str(self.content.get("arch", ""))

    @property
    def epoch(self) -> int:
        """Last finished epoch, 0-based; -1 where the file does not tell."""
        return int(self.content.get("epoch", -1))

    @property
    def args(self) -> dict[str, Any]:
        """The run's flags by name; empty for files of other programs."""
        args = self.content.get("args")
        return args if isinstance(args, dict) else {}

    @property
    def class_names(self) -> list[str] | None:
        """Of the outputs in their order, which may be more; None where the file does not tell."""
        return class_names_in(self.content)

    @property
    def meaning(self) -> int:
        """The number of what its seeds and flags mean. Raises `UserError` for one of a newer program."""
        return meaning.number_in(self.content, str(self.path)) or meaning.FIRST

    def weights(self, use_ema: bool) -> dict[str, Tensor]:
        """The model's state dict, or its EMA's. Raises `UserError` where there is no EMA."""
        if not use_ema:
            return self.content["state_dict"]
        if not self.content.get("state_dict_ema"):
            raise UserError(f"{self.path} holds no EMA weights. Leave out --use-ema to read the model's own.")
        return self.content["state_dict_ema"]

    def training_state(self, key: str) -> Any:
        """A part needed to continue a run. Raises `UserError` where the file holds weights only."""
        if key not in self.content:
            raise UserError(
                f"{self.path} cannot be resumed: it lacks `{key}`. Give a last.pth.tar of a run, "
                "or start anew from its weights with --initial-checkpoint."
            )
        return self.content[key]


def class_names_in(content: dict[str, Any]) -> list[str] | None:
    """What a file's content says the classes are called, in the order of the outputs."""
    names: Any = content.get("class_names")
    is_list = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return list(names) if is_list else None


def top_level(path: Path) -> dict[str, Any]:
    """What a file of weights says beside them, {} where nothing; tensors are mapped, not read."""
    if path.suffix == ".safetensors":
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # an older format, which cannot be mapped, or none of torch's
        return {}
    return content if isinstance(content, dict) else {}


def require_file(path: Path) -> None:
    """Raise `UserError` where there is no checkpoint, naming those of a folder."""
    if not path.is_file():
        found = sorted(str(p) for p in path.glob("*.pth*")) if path.is_dir() else []
        hint = f" That folder has: {', '.join(found)}." if found else ""
        raise UserError(f"Checkpoint {path} does not exist or is no file.{hint}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it. Raises `UserError` naming the file."""
    path = Path(path)
    require_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's `args`: a bag of plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in many ways inside torch
        raise UserError(
            f"Checkpoint {path} cannot be read: it is damaged, cut short, or no file saved by torch with tensors and "
            "plain values only. Give a file such as a run's last.pth.tar."
        ) from error
    if isinstance(content, dict) and "state_dict" not in content and is_state_dict(content):
        content = {"state_dict": content}
    if not isinstance(content, dict) or not is_state_dict(content.get("state_dict")):
        raise UserError(f"Checkpoint {path} holds no `state_dict`. Give a checkpoint of this program or of timm.")
    return Checkpoint(path, content)


def is_state_dict(value: Any) -> bool:
    """Whether this is a mapping of names to tensors, and of nothing else."""
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: dict[str, Tensor], model_name: str) -> None:
    """Copy `weights` into `model`. Raises `UserError` that tells how a checkpoint of another model differs."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(weights[k].shape)} there, {tuple(v.shape)} here"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if missing or unknown or shapes:
        differences = []
        if checkpoint.arch and checkpoint.arch != model_name:
            differences.append(f"it was saved from {checkpoint.arch}")
        if shapes:
            differences.append(f"{len(shapes)} tensors have another shape ({shapes[0]})")
        if missing:
            differences.append(f"{len(missing)} are missing ({missing[0]})")
        if unknown:
            differences.append(f"{len(unknown)} are unknown here ({unknown[0]})")
        raise UserError(
            f"Checkpoint {checkpoint.path} does not fit --model {model_name}: {'; '.join(differences)}. Give the "
            "--model, --model-kwargs, --img-size and --num-classes that it was trained with."
        )
    model.load_state_dict(weights)
