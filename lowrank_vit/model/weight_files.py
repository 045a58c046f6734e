"""Reading weight files of torch, safetensors and numpy without running code, and explaining why one cannot be read."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowrank_vit.common.files import damaged_member

COMPRESSION = "compression"
"""Key in a checkpoint: how `lowrank_vit.compress` made its weights, as plain values."""
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz")
_OTHERS = {
    (".yaml", ".yml"): "options, which --config takes",
    (".beton",): "images, which --data takes",
    (".jpg", ".jpeg", ".png", ".webp"): "an image, which `lowrank_vit.inference` takes",
    (".csv", ".json", ".jsonl", ".html", ".npy"): "numbers; `lowrank_vit.report` takes the directory of a run",
}
"""What other kinds of files hold, by suffix, and which command takes them."""


def unpickled(path: Path) -> Any:
    """Load a torch file; it may refer only to the classes and functions below, and to torch's own for tensors.

    timm, DeiT and MAE save their arguments as a Namespace of plain values. numpy's own functions are excluded, because
    its types can be forged in a pickle. Raises `Damaged` for an archive with wrong checksums.
    """
    if member := damaged_member(path):
        raise Damaged(member)
    numpys = [(_number, "numpy._core.multiarray.scalar"), (_number, "numpy.core.multiarray.scalar")]
    with torch.serialization.safe_globals([argparse.Namespace, *numpys, (_NumberType, "numpy.dtype")]):
        return torch.load(path, map_location="cpu", weights_only=True)


class Damaged(Exception):
    """The bytes of an archive's member differ from its checksum."""


class _NumberType:
    """A numpy dtype as described in a pickle, without numpy's own class."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufcUS]\d+", code):
            raise ValueError(f"a numpy value of type {code}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read the byte order from `state`: (version, byte order, and fields of compound types)."""
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"a numpy value of byte order {state[1]}")
        self.code = state[1] + self.code


def _number(kind: Any, data: bytes) -> Any:
    """A numpy scalar as a Python value. Raises `ValueError` unless `data` is one number or text."""
    if not isinstance(kind, _NumberType):  # a forged pickle
        raise ValueError("a numpy value without a type")
    (value,) = np.frombuffer(data, np.dtype(kind.code))
    return value.item()


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors as a state dict, plus the file's record of how `lowrank_vit.compress` made them, if there is one."""
    content: dict[str, Any] = {"state_dict": load_file(path)}
    with safe_open(path, "pt") as file:
        told: Any = (file.metadata() or {}).get(COMPRESSION)
    try:
        about: Any = json.loads(told or "null")
    except ValueError:  # another program's entry of the same name
        about = None
    return content | ({COMPRESSION: about} if isinstance(about, dict) else {})


def about_npz(path: Path) -> dict[str, Any]:
    """The number of classes in Google's arrays, if they have a head."""
    with path.open("rb") as file, np.load(file) as arrays:  # numpy leaves a damaged file open
        biases = [arrays[key] for key in arrays.files if key.endswith("head/bias")]
    return {"num_classes": len(biases[0])} if biases else {}


def reason_of(path: Path, error: Exception) -> str:
    """Why a file could not be read, and what to do."""
    other = next((what for suffixes, what in _OTHERS.items() if path.suffix.lower() in suffixes), "")
    if other:
        return (
            f"it holds no weights, but {other}. Give a run's last.pth.tar or model_best.pth.tar, or a file of weights."
        )
    if "TorchScript" in str(error):
        return (
            "it is a TorchScript program. Save only its weights, with torch.save(torch.jit.load(FILE).state_dict(), "
            "NEW_FILE), and give that file."
        )
    if isinstance(error, Damaged):
        return (
            f"it is damaged: the checksum of its part `{error}` is wrong. Copy the file again from its source, or "
            "give an older one, such as a run's model_best.pth.tar."
        )
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it refers to `{named[1]}`, and code from files is never run. Where the file was made, save only the "
            'weights with torch.save({"state_dict": model.state_dict()}, FILE), and give that file.'
        )
    return (
        f"it is damaged, cut short, or not a file of weights ({', '.join(SUFFIXES)}). Give a "
        "file such as a run's last.pth.tar or model_best.pth.tar."
    )
