"""Reads what `python -m lowrank_vit.analyze_spectrum` wrote, as a run of one refresh without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.read_run import SCALARS, Columns, Run
from lowrank_vit.spectral.store import StoredSpectra

ENDING = "_spectral.json"


def find_analysis(path: Path) -> Path | None:
    """The `*_spectral.json` that `path` is, or that the folder `path` holds; None where there is none.

    Raises:
        UserError: a folder holds several.
    """
    if path.is_file():
        return path if path.name.endswith(ENDING) else None
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UserError(f"{path} holds several analyses ({names}); give one of these files.")
    return found[0] if found else None


def read_analysis(path: Path) -> Run:
    """The analysis, and its full spectra where `--full` or `--save-vectors` left them beside it as .npz.

    Raises:
        UserError: the file cannot be read or is of something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        meta, layers = dict(content["meta"]), dict(content["layers"])
        shapes = {name: (int(one["shape"][0]), int(one["shape"][1])) for name, one in layers.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as an analysis ({error}); write it with `python -m lowrank_vit.analyze_spectrum`."
        ) from error
    epoch, weights = int(meta.get("epoch", -1)), "EMA weights" if meta.get("use_ema") else "raw weights"
    scalars: Columns = {"update": np.zeros(1)}
    for name, numbers in layers.items():
        scalars |= {
            f"spec/{name}/{key}": np.array([math.nan if value is None else float(value)])
            for key, value in numbers.items()
            if key in SCALARS
        }
    notes: list[str] = []
    spectra = _read_full(path.with_name(path.name.removesuffix(ENDING) + "_vectors.npz"), list(layers))
    if spectra is None:
        notes.append("Only the recorded values are there; `analyze_spectrum --full` also saves the full spectra.")
    return Run(
        path.parent,
        epochs={},
        train={},
        args=_shown(meta),
        environment={},
        spectra=[StoredSpectra(0, spectra)] if spectra else [],
        scalars=scalars,
        shapes=shapes,
        moment=f"epoch {epoch + 1}, {weights}" if epoch >= 0 else weights,
        notes=notes,
    )


def _read_full(path: Path, names: list[str]) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {f"spec/{name}": stored[f"{name}:s"] for name in names}
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _shown(meta: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if not isinstance(value, dict)}
