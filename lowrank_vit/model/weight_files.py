"""What lies in a file of weights: torch's archives, safetensors and numpy's, read without running code, or why not."""

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
"""Key of a checkpoint's content: how `lowrank_vit.compress` made its weights, plain values."""
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz")
_OTHERS = {
    (".yaml", ".yml"): "options, which --config takes",
    (".beton",): "images, which --data takes",
    (".jpg", ".jpeg", ".png", ".webp"): "an image, which `lowrank_vit.inference` takes",
    (".csv", ".json", ".jsonl", ".html", ".npy"): "numbers; `lowrank_vit.report` takes the directory of a run",
}
"""What files of other kinds hold, by their suffixes, and where they belong."""


def unpickled(path: Path) -> Any:
    """The content of a file of torch's; of classes and functions it may name those below, and torch's own for tensors.

    timm, DeiT and MAE save their arguments as a Namespace, a bag of plain values. numpy's own functions stay out of it:
    its types can be forged in a pickle. Raises `Damaged` for an archive whose checksums do not fit.
    """
    if member := damaged_member(path):
        raise Damaged(member)
    numpys = [(_number, "numpy._core.multiarray.scalar"), (_number, "numpy.core.multiarray.scalar")]
    with torch.serialization.safe_globals([argparse.Namespace, *numpys, (_NumberType, "numpy.dtype")]):
        return torch.load(path, map_location="cpu", weights_only=True)


class Damaged(Exception):
    """A member of an archive has other bytes than were written."""


class _NumberType:
    """A numpy dtype as a pickle tells it, without numpy's."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufcUS]\d+", code):
            raise ValueError(f"a numpy value of type {code}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order of `state`: (numpy's version, order, and what only compound types have)."""
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"a numpy value of byte order {state[1]}")
        self.code = state[1] + self.code


def _number(kind: Any, data: bytes) -> Any:
    """A numpy scalar as a Python value. Raises `ValueError` for what is not the bytes of one number or text."""
    if not isinstance(kind, _NumberType):  # whatever a forged pickle put there
        raise ValueError("a numpy value without a type")
    (value,) = np.frombuffer(data, np.dtype(kind.code))
    return value.item()


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors as a state dict, and how they were made by `lowrank_vit.compress`, where the file tells."""
    content: dict[str, Any] = {"state_dict": load_file(path)}
    with safe_open(path, "pt") as file:
        told: Any = (file.metadata() or {}).get(COMPRESSION)
    try:
        about: Any = json.loads(told or "null")
    except ValueError:  # another program's, of the same name
        about = None
    return content | ({COMPRESSION: about} if isinstance(about, dict) else {})


def about_npz(path: Path) -> dict[str, Any]:
    """The number of classes of Google's arrays, where they have a head."""
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
            "it is a program of TorchScript. Save its weights alone, as torch.save(torch.jit.load(FILE).state_dict(), "
            "NEW_FILE), and give that."
        )
    if isinstance(error, Damaged):
        return (
            f"it is damaged, since its part `{error}` has other bytes than were written (by its checksum). Copy the "
            "file again from where it came, or give an older one, such as a run's model_best.pth.tar."
        )
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds `{named[1]}`, which reading would have to run, and no code of a file is run. Save the weights "
            'alone where it was made, as torch.save({"state_dict": model.state_dict()}, FILE), and give that.'
        )
    return (
        f"it is damaged, cut short, or no file of weights (tensors and plain values: {', '.join(SUFFIXES)}). Give a "
        "file such as a run's last.pth.tar or model_best.pth.tar."
    )
