"""Output of `validate` and `inference`: a live line, then scores, classes and predictions as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import Steady, as_bytes, say_beside
from lowrank_vit.data.batch import Batch
from lowrank_vit.score.evaluate import Batches, Scores


class ScoringProgress:
    """Counts images, on stderr: a live line, or a line a minute if that is not a terminal. Use as a context."""

    def __init__(self, total: int, doing: str = "", unit: str = "images", done: int = 0) -> None:
        """`doing`: words before the bar; `unit`: what is counted, in the plural; `done`: how many are done already."""
        self._bar = Progress(
            *([TextColumn(doing, markup=False)] if doing else ()),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            *([_Speed()] if unit == "images" else ()),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done, before=done)
        self._done, self._steady = done, Steady(total, say_beside if self._bar.disable else None, done)
        self._what = f"{doing}, {unit}:" if doing else f"{unit}:"

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Count more images."""
        self._bar.update(self._task, advance=images)
        self._done += images
        self._steady.tell(self._done, self._what)


class Counted:
    """A loader whose batches are counted when the next one is asked for, that is, once they are scored."""

    def __init__(self, loader: Batches, advance: Callable[[int], object]) -> None:
        """`advance` is called with the number of images that were scored."""
        self._loader, self._advance = loader, advance

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the loader's batches."""
        for batch in self._loader.batches(epoch):
            yield batch
            self._advance(len(batch))


class _Speed(ProgressColumn):
    """Images per second, averaged since the start."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["before"]
        return Text(f"{done / task.elapsed:,.0f} img/s" if task.elapsed else "")


CONFIDENCE = 0.95


def interval(percent: float, num_samples: int) -> tuple[float, float]:
    """The 95 % interval of a share of `num_samples`, in percent: Wilson's score interval (E. B. Wilson, JASA 1927).

    It tells how much the figure varies with other samples of the same kind, not with another training run.
    """
    from scipy.stats import binomtest

    hits = round(percent * num_samples / 100)
    found = binomtest(hits, num_samples).proportion_ci(CONFIDENCE, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def scores_to_dict(scores: Scores) -> dict[str, Any]:
    """Scores with their intervals, as plain values."""
    return {
        "num_samples": scores.num_samples,
        "top1": scores.top1,
        "top1_interval": list(interval(scores.top1, scores.num_samples)),
        "top5": scores.top5,
        "top5_interval": list(interval(scores.top5, scores.num_samples)),
        "loss": scores.loss if math.isfinite(scores.loss) else None,  # JSON has no NaN
    }


def timm_columns(scores: Scores) -> dict[str, Any]:
    """Scores under the names that timm's validate.py gives its results; errors are percent, too."""
    return {
        "num_samples": scores.num_samples,
        "loss": scores.loss,
        "top1": scores.top1,
        "top1_err": 100 - scores.top1,
        "top5": scores.top5,
        "top5_err": 100 - scores.top5,
    }


def with_suffix_of(path: Path, results_format: str) -> Path:
    """A --results-file with the suffix of its --results-format if it has none of its own."""
    return path if path.suffix in (".csv", ".json") else path.with_name(f"{path.name}.{results_format}")


def make_folder_of(path: Path) -> None:
    """Make the folder that a file will be written to, before hours of work. Raises `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'Permission denied'}.")


def class_rows(scores: Scores, class_names: list[str]) -> list[dict[str, Any]]:
    """A row for each class, in label order: samples, top-1 and top-5 in percent, the class it is most often taken for.

    Percentages of a class without samples are None. Needs scores that were counted by class.
    """
    confusions = scores.confusions
    assert confusions is not None
    of_class = (confusions.totals_C(), confusions.hits_C(), confusions.top5_C, *confusions.most_frequent_mistake_C())
    rows = []
    for label, (name, total, hits, top5, other, taken) in enumerate(
        zip(class_names, *(values.tolist() for values in of_class), strict=True)
    ):
        rows.append(
            {
                "label": label,
                "class": name,
                "num_samples": total,
                "top1": 100 * hits / total if total else None,
                "top5": 100 * top5 / total if total else None,
                "taken_for": class_names[other] if taken else "",
                "taken_for_samples": taken,
            }
        )
    return rows


def rows_to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for k, v in row.items()})
    return text.getvalue()


def picture_beside(path: Path) -> Path:
    """The path of the picture of confusions for a table of classes."""
    return path.with_suffix(".png")


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one image, likeliest class first."""

    file: Path
    classes: list[str]
    probabilities: list[float]
    """0-1, in the order of `classes`."""
    labels: list[int]
    """The classes' numbers."""
    logits: list[float]
    """The model's outputs for them."""


def _columns(prediction: Prediction, *, index: bool, value: str) -> dict[str, list[Any]]:
    values = {"prob": ("probability", prediction.probabilities), "logit": ("logit", prediction.logits)}
    columns: dict[str, list[Any]] = {"class": list(prediction.classes)}
    if index:
        columns["index"] = list(prediction.labels)
    if value:
        name, numbers = values[value]
        columns[name] = [float(f"{number:.6g}") for number in numbers]
    return columns


def csv_columns(count: int, *, index: bool, value: str) -> list[str]:
    """The columns of a table of `count` classes an image: file, class_1, probability_1, class_2, ...

    `index` adds the classes' numbers, index_1 and so on. `value`: "prob", "logit" or nothing.
    """
    names = _columns(Prediction(Path(), [], [], [], []), index=index, value=value)
    return ["file", *(f"{name}_{n + 1}" for n in range(count) for name in names)]


def csv_header(columns: Sequence[str]) -> bytes:
    """The first line of a table."""
    return f"{','.join(columns)}\n".encode()


def csv_rows(predictions: Iterable[Prediction], *, index: bool, value: str) -> bytes:
    """A row for each image, see `csv_columns`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for p in predictions:
        columns = _columns(p, index=index, value=value).values()
        writer.writerow([p.file, *(values[n] for n in range(len(p.classes)) for values in columns)])
    return as_bytes(text.getvalue())


def json_items(predictions: Iterable[Prediction], *, index: bool, value: str) -> bytes:
    """{"file", "classes", "probabilities"} of each image, and more as in the table: items, each after a comma."""
    plural = {"class": "classes", "index": "indices", "probability": "probabilities", "logit": "logits"}
    items = [
        {"file": str(p.file), **{plural[k]: v for k, v in _columns(p, index=index, value=value).items()}}
        for p in predictions
    ]
    return "".join(",\n  " + json.dumps(item, indent=1).replace("\n", "\n  ") for item in items).encode()
