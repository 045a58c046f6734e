"""Predict the classes of images with a checkpoint, or with published weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from data_prep.formats.image_formats import formats
from data_prep.formats.jpeg import upright_rgb
from lowrank_vit.common.devices import DTYPES, pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError
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
from lowrank_vit.score.kept import Part, keeping
from lowrank_vit.score.listing import ImageList, digest_of_stats
from lowrank_vit.score.options import PredictOptions
from lowrank_vit.score.results import (
    Prediction,
    ScoringProgress,
    csv_columns,
    csv_rows,
    json_items,
    make_folder_of,
    with_suffix_of,
)
from lowrank_vit.score.scorer import Scorer, labels_of, load_scorer

SHOWN = 3
"""Predictions of an image that the terminal shows."""
Note = Callable[[str], object]
_DECIDE_NO_ROW = ("--output", "--results-dir", "--results-file", "--results-format", "--no-console-results")
_FOREVER = timedelta(days=365)
"""The threads that watch the ranks report one that makes no progress."""


def classify(options: PredictOptions, note: Note, world: World, failing: Failing) -> None:
    """Classify on the ranks of `world`, not yet joined; the first prints and writes files.

    Memory does not grow with the number of images: rows are appended as batches finish, see `score.kept`. Raises
    `UserError`, also if no image could be read.
    """
    device = pick_device(options.device, world.local_rank)
    with joined(world, device, lambda: run_record(options, device)), failing.watched():
        _classify_and_write(options, note if world.is_first else lambda text: None, world)


def _classify_and_write(options: PredictOptions, note: Note, world: World) -> None:
    outputs = _outputs(options)
    if outputs and world.is_first:
        for path in outputs:
            make_folder_of(path)
        output_is_in_files()
    with _Job(options, note, world) as job, ExitStack() as stack:
        channel = world.channel(_FOREVER)
        kept = stack.enter_context(keeping(outputs, job.key(), job.is_same, note)) if _keeps(outputs, world) else None
        first = world.from_first(kept.num_images if kept else 0)
        world.progress.enter("classifying")
        shown = ScoringProgress(len(job.files), done=first) if world.is_first else nullcontext()
        progress = stack.enter_context(shown)
        num_found = kept.num_found if kept else 0
        for part in job.parts(first, {path.suffix for path in outputs}):
            with world.progress.waiting():
                parts = channel.gather(part) or []
            if kept:
                kept.add(parts)
            for one in parts:
                for file, reason in one.skipped:
                    note(f"skipped {file}: {reason}")
                for line in one.shown:
                    print(line, flush=True)
                    if not outputs and is_unread():
                        raise BrokenPipeError
                num_found += one.num_found
                if progress:
                    progress.advance(one.num_images)
        if kept:
            kept.finish(outputs, csv_columns(job.num_columns, **_columns_of(options)))
    if world.is_first and not num_found:
        raise UserError(f"None of the {len(job.files)} files could be read as an image.")


def _keeps(outputs: Sequence[Path], world: World) -> bool:
    return bool(outputs) and world.is_first


def _columns_of(options: PredictOptions) -> dict[str, Any]:
    return {"index": options.include_index, "value": "" if options.exclude_output else options.output_type}


class _Job:
    """The images, the model, and this rank's share of the batches, which the ranks take in turn; a context."""

    def __init__(self, options: PredictOptions, note: Note, world: World) -> None:
        """Search for the images and load the weights; all ranks must have the same. Raises `UserError`."""
        options.check()
        self._options, self._world = options, world
        world.progress.enter("searching for images")
        self._stack = ExitStack()
        with self._stack as stack:
            self.files = stack.enter_context(ImageList(options.input, options.batch_size, note))
            self._device = device = pick_device(options.device, world.local_rank)
            if why := why_on_cpu(options.device, device):
                note(why)
            world.progress.enter("loading the weights")
            self._scorer = scorer = load_scorer(options, device, note)
            self._labels = labels_of(scorer, options.label_type)
            agree(world, "images", self._record, "searching for images and loading the weights")
            workers = options.workers or usual_workers(device, world.local_size)
            self._pool = stack.enter_context(ThreadPoolExecutor(workers))
            self._stack = stack.pop_all()
        self.num_columns = min(options.topk, scorer.num_classes)
        """Classes an image."""

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _record(self) -> Record:
        """The record on which the ranks must agree: the names of the images, and the weights."""
        shown = f"{len(self.files):,} files"
        return {**data_record({}, self._scorer.model), "other images": (self.files.digest, shown)}

    def key(self) -> Record:
        """Everything that decides a row, except what `is_same` checks."""
        scorer, labels = self._scorer, "\0".join(self._labels).encode(errors="surrogateescape")
        look = f"{scorer.spec} {scorer.interpolation} {scorer.name}"
        of_run = {k: v for k, v in run_record(self._options, self._device).items() if k not in _DECIDE_NO_ROW}
        own = {"other names of the classes": (xxhash.xxh3_64_hexdigest(labels), ""), "how images look": (look, look)}
        return {**of_run, **self._record(), **own}

    def is_same(self, first: int, stats: list[str]) -> bool:
        """Whether the images from number `first` on still have the sizes and times in `stats`, one for each batch."""
        numbers = range(first // self._options.batch_size, first // self._options.batch_size + len(stats))
        return stats == list(self._pool.map(digest_of_stats, map(self.files.batch, numbers)))

    def parts(self, first: int, suffixes: Collection[str]) -> Iterator[Part]:
        """The part that each of this rank's batches adds, equally many on each rank; the last may be empty."""
        columns = _columns_of(self._options)
        writers = {suffix: json_items if suffix == ".json" else csv_rows for suffix in suffixes}
        is_shown = not self._options.no_console_results
        for files, skipped, found in self.batches(first):
            rows = {suffix: write(found, **columns) for suffix, write in writers.items()}
            named = [(str(file), reason) for file, reason in skipped]
            shown = [_line(prediction, self._options.output_type) for prediction in found if is_shown]
            stats = digest_of_stats(files) if files and suffixes else ""
            yield Part(len(files), len(found), rows, named, stats, shown)

    def batches(self, first: int) -> Iterator[tuple[list[Path], list[tuple[Path, str]], list[Prediction]]]:
        """This rank's batches from image `first` on: files, files that are not images with the reason, predictions."""
        for batch in self._decoded(first):
            skipped = [(file, crop) for file, crop in batch if isinstance(crop, str)]
            crops = [(file, crop) for file, crop in batch if not isinstance(crop, str)]
            given = self._labels, crops, self._options, self._device
            found = _classify(self._scorer, *given) if crops else []
            self._world.progress.tick()
            yield [file for file, _ in batch], skipped, found

    def _decoded(self, first: int) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
        """Files with their crops, batch by batch; the next one is decoded while the caller computes with this one."""
        waiting: list[list[tuple[Path, Future[np.ndarray | str]]]] = []
        for start in range(first, len(self.files), self._options.batch_size * self._world.size):
            files = self.files.batch(start // self._options.batch_size + self._world.rank)
            waiting.append([(file, self._pool.submit(_crop, file, self._scorer)) for file in files])
            if len(waiting) == 2:
                yield [(file, crop.result()) for file, crop in waiting.pop(0)]
        for batch in waiting:
            yield [(file, crop.result()) for file, crop in batch]


def _crop(file: Path, scorer: Scorer) -> np.ndarray | str:
    """uint8 (S, S, 3), cropped as in validation; a string with the reason if the file has no image."""
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
    """The files to write. Raises `UserError`."""
    paths = [options.output] if options.output else []
    if options.output and options.output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {options.output} must end in .csv or .json.")
    if options.results_file or options.results_dir:
        named = options.results_file or Path(options.model or "predictions")
        base = (options.results_dir or Path()) / named
        suffixes = () if base.suffix in (".csv", ".json") else options.results_format
        paths += [with_suffix_of(base, suffix) for suffix in suffixes] or [base]
    return paths


def _line(p: Prediction, output_type: str) -> str:
    """A prediction for the terminal."""
    values = [f"{share:.1%}" for share in p.probabilities]
    if output_type == "logit":
        values = [f"{logit:.3f}" for logit in p.logits]
    shown = zip(p.classes[:SHOWN], values[:SHOWN], strict=True)
    return one_line(f"{p.file}  " + "  ".join(f"{name} {value}" for name, value in shown))


def read_image(file: Path) -> np.ndarray | str:
    """uint8 (H, W, 3) as the converter makes it: upright, 8 bits, on white; a string with the reason if that fails.

    Of an animation, the first picture. A suffix proves nothing: all of `formats` are tried, and no others.
    """
    try:
        with Image.open(file, formats=formats()) as image:
            return np.asarray(upright_rgb(image))
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        return "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
