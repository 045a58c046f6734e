"""What a checkpoint, or published weights, say of some images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from data_prep.formats.image_formats import formats, image_suffixes, is_of_the_system
from data_prep.formats.jpeg import upright_rgb
from lowrank_vit.common.devices import DTYPES, pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_all
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.common.terminal import is_unread, one_line, output_is_in_files
from lowrank_vit.data.decode.backend import usual_workers
from lowrank_vit.data.decode.pil import crop_and_resize
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.ranks.agree import Record, agree
from lowrank_vit.ranks.failing import Failing
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.records import data_record, run_record
from lowrank_vit.ranks.world import World
from lowrank_vit.score.options import PredictOptions
from lowrank_vit.score.results import (
    Prediction,
    Predictions,
    ScoringProgress,
    make_folder_of,
    predictions_to_csv,
    predictions_to_json,
    with_suffix_of,
)
from lowrank_vit.score.scorer import Scorer, labels_of, load_scorer

SHOWN = 3
"""Predictions of an image that the terminal shows."""
Note = Callable[[str], object]
_FOREVER = timedelta(days=365)
"""Of a rank that makes no progress the threads that watch the ranks tell."""


def classify(options: PredictOptions, note: Note, world: World, failing: Failing) -> None:
    """Classify on the ranks of `world`, not yet joined; the first prints and writes files.

    Raises `UserError`, also where no image could be read.
    """
    device = pick_device(options.device, world.local_rank)
    with joined(world, device, lambda: run_record(options, device)), failing.watched():
        if world.is_first:
            _classify_and_write(options, note, world)
        else:
            predict(options, world=world)


def _classify_and_write(options: PredictOptions, note: Note, world: World) -> None:
    outputs = _outputs(options)
    if outputs:
        output_is_in_files()
    show = (lambda prediction: None) if options.no_console_results else _Printer(options.output_type, bool(outputs))
    predictions = predict(options, note, show, world)
    columns: dict[str, Any] = {
        "index": options.include_index,
        "value": "" if options.exclude_output else options.output_type,
    }
    writers = {path: predictions_to_json if path.suffix == ".json" else predictions_to_csv for path in outputs}
    write_all({path: partial(write, predictions, **columns) for path, write in writers.items()})
    if not predictions.found:
        raise UserError(f"None of the {len(predictions.skipped)} files could be read as an image.")


def predict(
    options: PredictOptions,
    note: Note = lambda text: None,
    show: Callable[[Prediction], object] = lambda prediction: None,
    world: World | None = None,
) -> Predictions:
    """Classify all images, each shown when its batch is done; what cannot be opened is noted and skipped.

    The ranks of `world` take the batches in turn; the first one gets all predictions, in the order of the images, and
    the others none. Raises `UserError`.
    """
    world = world or World()
    options.check()
    world.progress.enter("searching for images")
    files = _images(options.input, note)
    device = pick_device(options.device, world.local_rank)
    if why := why_on_cpu(options.device, device):
        note(why)
    world.progress.enter("loading the weights")
    scorer = load_scorer(options, device, note)
    labels = labels_of(scorer, options.label_type)
    agree(world, "images", lambda: _record(files, scorer), "searching for images and loading the weights")
    predictions, channel = Predictions(), world.channel(_FOREVER)
    world.progress.enter("classifying")
    shown = ScoringProgress(len(files)) if world.is_first else nullcontext()
    workers = options.workers or usual_workers(device, world.local_size)
    with ThreadPoolExecutor(workers) as pool, shown as progress:
        for batch in _decoded(files, scorer, options.batch_size, pool, world):
            skipped = [(file, crop) for file, crop in batch if isinstance(crop, str)]
            crops = [(file, crop) for file, crop in batch if not isinstance(crop, str)]
            part = skipped, _classify(scorer, labels, crops, options, device) if crops else []
            world.progress.tick()
            with world.progress.waiting():
                parts = channel.gather(part) or []
            for skipped, found in parts:
                for file, reason in skipped:
                    predictions.skipped[file] = reason
                    note(f"skipped {file}: {reason}")
                for prediction in found:
                    predictions.found.append(prediction)
                    show(prediction)
                if progress:
                    progress.advance(len(skipped) + len(found))
    return predictions


def _record(files: Sequence[Path], scorer: Scorer) -> Record:
    """What the ranks must have in common: the images, by their names, and the weights."""
    names = xxhash.xxh3_64_hexdigest(b"\0".join(map(os.fsencode, files)))
    return {**data_record({}, scorer.model), "other images": (names, f"{len(files):,} files")}


def _images(paths: tuple[Path, ...], note: Note) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside, others = images_below(path)
            kinds = ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in others.most_common(5))
            if not inside:
                raise UserError(f"--input {path} holds no image{f', only other files ({kinds})' if kinds else ''}.")
            if kinds:
                note(f"{path}: left out {others.total():,} files that are no images by their suffix ({kinds})")
            found += inside
        else:
            found.append(path)
    return found


def _decoded(
    files: Sequence[Path], scorer: Scorer, batch_size: int, pool: ThreadPoolExecutor, world: World
) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Files with their crops, batch by batch; the next batch is decoded while the caller computes with this one.

    This rank's batches, as many on each rank; the last may be empty.
    """
    waiting: list[list[tuple[Path, Future[np.ndarray | str]]]] = []
    for first in range(0, len(files), batch_size * world.size):
        first += batch_size * world.rank
        waiting.append([(file, pool.submit(_crop, file, scorer)) for file in files[first : first + batch_size]])
        if len(waiting) == 2:
            yield [(file, crop.result()) for file, crop in waiting.pop(0)]
    for batch in waiting:
        yield [(file, crop.result()) for file, crop in batch]


def _crop(file: Path, scorer: Scorer) -> np.ndarray | str:
    """uint8 (S, S, 3), cropped as in validation; the reason where there is no image in the file."""
    pixels = read_image(file)
    if isinstance(pixels, str):
        return pixels
    size, interpolation = scorer.spec.img_size, FILTERS[scorer.interpolation]
    sides = np.array(pixels.shape[:1]), np.array(pixels.shape[1:2])
    plan = EvalPlan(*sides, img_size=size, crop_pct=scorer.spec.crop_pct, batch_size=1, interpolation=interpolation)
    return crop_and_resize(pixels, plan.batch(0, 0, np.zeros(1, np.int64)), 0, size)


@torch.inference_mode()
def _classify(
    scorer: Scorer,
    labels: list[str],
    crops: list[tuple[Path, np.ndarray]],
    options: PredictOptions,
    device: torch.device,
) -> list[Prediction]:
    images_NHWC = torch.from_numpy(np.stack([crop for _, crop in crops])).to(device)
    with torch.autocast(device.type, dtype=DTYPES[options.amp_dtype], enabled=options.amp):
        logits = scorer.model(scorer.augment.normalize(images_NHWC.permute(0, 3, 1, 2))).float()
    top = logits.topk(min(options.topk, scorer.num_classes))
    shares = logits.softmax(1).gather(1, top.indices)
    rows = zip(crops, top.indices.tolist(), shares.tolist(), top.values.tolist(), strict=True)
    return [Prediction(file, [labels[n] for n in found], p, found, raw) for (file, _), found, p, raw in rows]


def _outputs(options: PredictOptions) -> list[Path]:
    """The files to write, whose folders are made now. Raises `UserError`."""
    paths = [options.output] if options.output else []
    if options.output and options.output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {options.output} must end in .csv or .json.")
    if options.results_file or options.results_dir:
        named = options.results_file or Path(options.model or "predictions")
        base = (options.results_dir or Path()) / named
        suffixes = () if base.suffix in (".csv", ".json") else options.results_format
        paths += [with_suffix_of(base, suffix) for suffix in suffixes] or [base]
    for path in paths:
        make_folder_of(path)
    return paths


@dataclass(frozen=True)
class _Printer:
    """Predictions as lines on stdout. Raises `BrokenPipeError` when nobody reads them and no file is asked for."""

    output_type: str
    is_written: bool

    def __call__(self, p: Prediction) -> None:
        values = [f"{share:.1%}" for share in p.probabilities]
        if self.output_type == "logit":
            values = [f"{logit:.3f}" for logit in p.logits]
        shown = zip(p.classes[:SHOWN], values[:SHOWN], strict=True)
        print(one_line(f"{p.file}  " + "  ".join(f"{name} {value}" for name, value in shown)), flush=True)
        if not self.is_written and is_unread():
            raise BrokenPipeError


def images_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and its sub-folders, sorted, and how many other files there are by suffix.

    What is hidden or a file server's own is neither.
    """
    below = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in below if not any(map(is_of_the_system, path.relative_to(folder).parts))]
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    return images, Counter(path.suffix.lower() for path in files if path.suffix.lower() not in image_suffixes())


def read_image(file: Path) -> np.ndarray | str:
    """uint8 (H, W, 3) as the converter makes it: upright, 8 bits, on white; the reason where that cannot be had.

    Of an animation the first picture. A suffix proves nothing, so only `formats` are tried, whatever it is.
    """
    try:
        with Image.open(file, formats=formats()) as image:
            return np.asarray(upright_rgb(image))
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        return "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
