"""What a model says of images, and the files that it is written to."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image, likeliest class first."""

    file: Path
    classes: list[str]
    probabilities: list[float]
    """0-1, as the classes."""
    labels: list[int]
    """The classes' numbers."""
    logits: list[float]
    """The model's outputs for them."""


@dataclass
class Predictions:
    """All of a call."""

    found: list[Prediction] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    """Files that are no images, with the reason."""


def _columns(prediction: Prediction, *, index: bool, value: str) -> dict[str, list[Any]]:
    values = {"prob": ("probability", prediction.probabilities), "logit": ("logit", prediction.logits)}
    columns: dict[str, list[Any]] = {"class": list(prediction.classes)}
    if index:
        columns["index"] = list(prediction.labels)
    if value:
        name, numbers = values[value]
        columns[name] = [float(f"{number:.6g}") for number in numbers]
    return columns


def to_csv(predictions: Predictions, *, index: bool = False, value: str = "prob") -> str:
    """A row an image: file, class_1, probability_1, class_2, ...; skipped files are left out.

    `index` adds the classes' numbers, index_1 and so on. `value`: "prob", "logit" or nothing.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [(p.file, _columns(p, index=index, value=value)) for p in predictions.found]
    first = rows[0][1] if rows else {}
    count = len(first.get("class", ()))
    writer.writerow(["file", *(f"{name}_{n + 1}" for n in range(count) for name in first)])
    for file, columns in rows:
        writer.writerow([file, *(values[n] for n in range(count) for values in columns.values())])
    return text.getvalue()


def to_json(predictions: Predictions, *, index: bool = False, value: str = "prob") -> str:
    """{"predictions": [{"file", "classes", "probabilities"}], "skipped": {file: reason}}; more as in `to_csv`."""
    plural = {"class": "classes", "index": "indices", "probability": "probabilities", "logit": "logits"}
    found = [
        {"file": str(p.file), **{plural[k]: v for k, v in _columns(p, index=index, value=value).items()}}
        for p in predictions.found
    ]
    skipped = {str(file): reason for file, reason in predictions.skipped.items()}
    return json.dumps({"predictions": found, "skipped": skipped}, indent=1) + "\n"
