"""Records of what all ranks must have in common, for `ranks.agree` to compare."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

import data_prep
from lowrank_vit import __version__
from lowrank_vit.config.option_types import is_per_rank, leaves
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.model.weights import Checkpoint
from lowrank_vit.ranks.agree import Record

_PACKAGE = Path(__file__).parents[1]
_COMPUTE = ("torch", "torchvision", "timm", "numpy", "numba", "pillow", "nvidia-dali-cuda130")
"""Packages whose versions affect an update."""
_READ_BYTES, _READ_SAMPLES = 1 << 26, 64
"""A set of at most so many bytes is read completely for its fingerprint; from a larger set, so many samples."""


_WEIGHTS = "other weights to begin with"
_ALIKE = (
    "CPUs of different kinds may draw other weights: set ATEN_CPU_CAPABILITY=default on all nodes, or begin with "
    "weights from a file, --initial-checkpoint."
)


def run_record(options: Any, device: torch.device) -> Record:
    """A record of the options that must be the same on all ranks, the device's type and the versions of all code."""
    given = {f"--{name}": _in_words(value) for name, hint, value in leaves(options) if not is_per_rank(hint)}
    versions = {"lowrank_vit": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for package in _COMPUTE:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    code = ("the code", _digest_of_sources(), str(_PACKAGE))
    return _plain({**versions, "the device": device.type}) | _others(code) | _plain(given)


def data_record(sets: Mapping[str, Beton], model: nn.Module, resumed: Checkpoint | None = None) -> Record:
    """A record of the content of the sets, by name, and of the model's initial weights."""
    record: dict[str, Sequence[str]] = {}
    for name, beton in sets.items():
        shown, classes = str(beton.path), "\n".join(beton.classes or ())
        record |= _plain({f"the number of images of the {name}": f"{beton.num_samples:,}"})
        record |= _others(
            (f"other classes in the {name}", xxhash.xxh3_64_hexdigest(classes.encode(errors="replace")), shown),
            (f"other labels in the {name}", beton.digests()[0], shown),
            (f"other images in the {name}", _fingerprint(beton), shown),
        )
    weights = _digest(model.state_dict().values())
    if resumed:
        return record | _others((_WEIGHTS, weights, str(resumed.path)))
    drawn = f"of the model, drawn by the CPU's {torch.backends.cpu.get_cpu_capability()} code"
    return record | {_WEIGHTS: (weights, drawn, _ALIKE)}


def _plain(values: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (value, value) for name, value in values.items()}


def _others(*things: tuple[str, str, str]) -> dict[str, tuple[str, str]]:
    """Entries that are compared by a digest, and shown by another text."""
    return {name: (digest, shown) for name, digest, shown in things}


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _digest_of_sources() -> str:
    digest = xxhash.xxh3_64()
    for root in (_PACKAGE, Path(data_prep.__file__ or "").parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fingerprint(beton: Beton) -> str:
    """A digest of the set's manifests and index, and of the bytes of all its images or of a sample.

    Reading terabytes is not worth its cost, since a manifest has the checksum of the file as it was made.
    """
    digest, n = xxhash.xxh3_64(beton.digests()[1].encode()), beton.num_samples
    ids = range(n) if beton.stored_bytes <= _READ_BYTES else np.linspace(0, n - 1, _READ_SAMPLES).astype(int)
    for sample_id in ids:
        digest.update(beton.sample(int(sample_id)).data)
    return digest.hexdigest()
