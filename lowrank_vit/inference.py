"""`python -m lowrank_vit.inference`: what a checkpoint says of some images."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from tyro.conf import arg

from data_prep.errors import UserError, exit_cleanly
from data_prep.image_folder import IMAGE_SUFFIXES
from data_prep.jpeg import upright_rgb
from lowrank_vit.config_check import check_ranges
from lowrank_vit.data.pil_decode import crop_and_resize
from lowrank_vit.data.plan import EvalPlan
from lowrank_vit.engine.scoring import Scorer, load_scorer
from lowrank_vit.engine.setup import pick_device
from lowrank_vit.options import POSITIVE, Range

SHOWN = 3
"""Predictions of an image that the terminal shows."""


@dataclass(frozen=True)
class Options:
    """Classify images. Model, size and crop default to those that the checkpoint was trained with."""

    checkpoint: Path
    """A run's model_best.pth.tar or last.pth.tar."""
    input: tuple[Path, ...]
    """Images, and folders to search for images; also the first arguments."""
    topk: Annotated[int, POSITIVE] = 5
    """Predictions for each image."""
    output: Path | None = None
    """Write all predictions to this .csv or .json file."""
    use_ema: bool = False
    """Use the EMA weights."""
    model: str = ""
    """timm model name; default: the checkpoint's."""
    model_kwargs: tuple[str, ...] = ()
    """NAME=VALUE ...; default: the checkpoint's."""
    img_size: Annotated[int | None, POSITIVE] = None
    """Pixels; default: the checkpoint's."""
    crop_pct: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Default: the checkpoint's."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 64
    """Images a step."""
    workers: Annotated[int, arg(aliases=["-j"]), POSITIVE] = 4
    """Threads that open images."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """bfloat16 autocast."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image, likeliest class first."""

    file: Path
    classes: list[str]
    probabilities: list[float]
    """0-1, as the classes."""


@dataclass
class Predictions:
    """All of a call."""

    found: list[Prediction] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)
    """Files that are no images, with the reason."""


def predict(options: Options, note: Callable[[str], object] = lambda text: None) -> Predictions:
    """Classify all images; files that cannot be opened are noted and skipped. Raises `UserError`."""
    check_ranges(options)
    if options.output and options.output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {options.output} must end in .csv or .json.")
    files = _images(options.input)
    device = pick_device(options.device)
    own = {name: getattr(options, name) for name in ("use_ema", "model", "model_kwargs", "img_size", "crop_pct")}
    scorer = load_scorer(options.checkpoint, device, **own)
    predictions = Predictions()
    with ThreadPoolExecutor(options.workers) as pool:
        for first in range(0, len(files), options.batch_size):
            batch = files[first : first + options.batch_size]
            crops = []
            for file, crop in zip(batch, pool.map(lambda file: _crop(file, scorer), batch), strict=True):
                if isinstance(crop, str):
                    predictions.skipped[file] = crop
                    note(f"skipped {file}: {crop}")
                else:
                    crops.append((file, crop))
            if crops:
                predictions.found += _classify(scorer, crops, options, device)
    return predictions


def _images(paths: tuple[Path, ...]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            if not inside:
                raise UserError(f"--input {path} holds no image ({' '.join(IMAGE_SUFFIXES)}).")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"--input {path} does not exist.")
    if not found:
        raise UserError("Give images or folders with --input.")
    return found


def _crop(file: Path, scorer: Scorer) -> np.ndarray | str:
    """uint8 (S, S, 3), cropped as in validation; the reason where there is no image in the file."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(upright_rgb(image))  # as the training set was converted
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "cannot identify image file" if "cannot identify" in str(error) else str(error)
    size = scorer.spec.img_size
    sides = np.array(pixels.shape[:1]), np.array(pixels.shape[1:2])
    plan = EvalPlan(*sides, img_size=size, crop_pct=scorer.spec.crop_pct, batch_size=1)
    return crop_and_resize(pixels, plan.batch(0, 0, np.zeros(1, np.int64)), 0, size)


@torch.inference_mode()
def _classify(
    scorer: Scorer, crops: list[tuple[Path, np.ndarray]], options: Options, device: torch.device
) -> Iterator[Prediction]:
    images_NHWC = torch.from_numpy(np.stack([crop for _, crop in crops])).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.amp):
        logits = scorer.model(scorer.augment.normalize(images_NHWC.permute(0, 3, 1, 2)))
    top = logits.float().softmax(1).topk(min(options.topk, scorer.num_classes))
    names = scorer.class_names
    for (file, _), labels, shares in zip(crops, top.indices.tolist(), top.values.tolist(), strict=True):
        yield Prediction(file, [names[label] for label in labels], shares)


def to_csv(predictions: Predictions) -> str:
    """A row an image: file, class_1, probability_1, class_2, ...; skipped files are left out."""
    text = io.StringIO()
    count = max((len(p.classes) for p in predictions.found), default=0)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(f"{name}_{n + 1}" for n in range(count) for name in ("class", "probability"))])
    for p in predictions.found:
        pairs = zip(p.classes, p.probabilities, strict=True)
        writer.writerow([p.file, *(value for name, share in pairs for value in (name, f"{share:.6g}"))])
    return text.getvalue()


def to_json(predictions: Predictions) -> str:
    """{"predictions": [{"file", "classes", "probabilities"}], "skipped": {file: reason}}."""
    content: dict[str, Any] = {
        "predictions": [{**vars(p), "file": str(p.file)} for p in predictions.found],
        "skipped": {str(file): reason for file, reason in predictions.skipped.items()},
    }
    return json.dumps(content, indent=1) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, classify, print. Exits with 1 where no image could be read."""
    argv = sys.argv[1:] if argv is None else argv
    inputs = next((n for n, token in enumerate(argv) if token.startswith("-")), len(argv))
    argv = argv[inputs:] + (["--input", *argv[:inputs]] if inputs else [])  # timm's way: inference.py DIR --model ...
    options = tyro.cli(Options, args=argv, prog="python -m lowrank_vit.inference", description=Options.__doc__)
    predictions = predict(options, note=lambda text: print(text, file=sys.stderr))
    if options.output:
        text = to_json(predictions) if options.output.suffix == ".json" else to_csv(predictions)
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {options.output} cannot be written: {error.strerror}.") from error
    for p in predictions.found:
        shown = zip(p.classes[:SHOWN], p.probabilities[:SHOWN], strict=True)
        print(f"{p.file}  " + "  ".join(f"{name} {share:.1%}" for name, share in shown))
    if not predictions.found:
        raise UserError(f"None of the {len(predictions.skipped)} files could be read as an image.")


if __name__ == "__main__":
    exit_cleanly(main)
