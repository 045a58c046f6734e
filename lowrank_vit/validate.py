"""`python -m lowrank_vit.validate`: score a checkpoint, or published weights, on a validation set."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from data_prep.sources.image_folder import count_remarks
from lowrank_vit.common import terminal
from lowrank_vit.common.devices import DTYPES, pick_device
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import fitted_help
from lowrank_vit.config.check import check_ranges
from lowrank_vit.config.option_types import POSITIVE
from lowrank_vit.config.options import LoaderName
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.loader import OnBadSample
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, kind_of, locate_validation
from lowrank_vit.data.sets.provenance import remarks
from lowrank_vit.data.sets.staging import stage
from lowrank_vit.model.class_match import Classes, Order, Trust, match
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.score.evaluate import Evaluator, Scores
from lowrank_vit.score.results import (
    Counted,
    ScoringProgress,
    class_rows,
    interval,
    make_folder_of,
    picture_beside,
    rows_to_csv,
    scores_to_dict,
    timm_columns,
    with_suffix_of,
)
from lowrank_vit.score.scorer import ModelOptions, Scorer, load_scorer


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Score a model. Model, size, crop and data default to those that the checkpoint was trained with."""

    data: Annotated[Path | None, arg(aliases=["--data-dir"])] = None
    """A .beton file, or a folder of images or .beton files; default: what the checkpoint was validated on."""
    dataset: str = ""
    """folder or nothing: what --data holds; torch/cifar100; digits. Without --data the default is the checkpoint's."""
    dataset_download: bool = False
    """torch/cifar100: download the archive where it is missing or damaged."""
    split: Annotated[str, arg(aliases=["--val-split"])] = ""
    """Name of the set in --data; timm's synonyms count. Default: that of the checkpoint's validation."""
    nested_classes: Literal["", "leaf", "merge", "top"] = ""
    """Which folders of images are classes, as for training; default: as the checkpoint's run had it, else leaf."""
    trust_labels: bool = False
    """Where names cannot be matched, label N of the data is output N of the model."""
    class_order: Order = "timm"
    """Of the outputs of a model that names no classes: timm's order of the class folders, or torchvision's."""
    beton_dir: Path | None = None
    """Where images are converted to; default: DATA/.lowrank_vit."""
    stage_dir: Path | None = None
    """Copy the .beton file to this folder on a fast local disk, once, and read the copy."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 128
    """Images a step."""
    loader: LoaderName = "auto"
    """Decode backend."""
    workers: Annotated[int, arg(aliases=["-j"]), POSITIVE] = 4
    """CPU threads that decode."""
    on_bad_sample: OnBadSample = "error"
    """A damaged sample: stop, or leave it out and say so."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What --amp computes in."""
    tta: Literal[0, 2] = 0
    """2: score the mean of each image and its mirror image."""
    per_class: Path | None = None
    """Write a table of the classes to this .csv file, and a picture of the confusions beside it."""
    json: Path | None = None
    """Write all scores to this .json file."""
    results_file: Path | None = None
    """The same to a .json file, or a line with timm's columns to a .csv file."""
    results_format: Literal["csv", "json"] = "csv"
    """The form of --results-file where its name does not tell."""


def validate(options: Options, say: Callable[[str], object] = terminal.say) -> Scores:
    """Load the weights and score them on every sample exactly once. Raises `UserError`."""
    return _validate(options, say)[0]


def _validate(options: Options, say: Callable[[str], object]) -> tuple[Scores, Scorer]:
    check_ranges(options)
    for path, suffix in _written(options).items():
        if path.suffix != suffix:
            flag = "--per-class" if path == options.per_class else "--json"
            raise UserError(f"{flag} {path} must end in {suffix}.")
        make_folder_of(path)
    device = pick_device(options.device)
    scorer = load_scorer(options, device, say)
    path = _find_data(options, scorer.args)
    beton, spec = Beton(path), scorer.spec
    _follow_model(scorer, beton, options, say)
    batch_size = min(options.batch_size, beton.num_samples)
    plan = EvalPlan(
        beton.heights,
        beton.widths,
        img_size=spec.img_size,
        crop_pct=spec.crop_pct,
        batch_size=batch_size,
        interpolation=FILTERS[scorer.interpolation],
    )
    decoding = LoaderOptions(options.loader, options.workers, on_bad_sample=options.on_bad_sample)
    loader, line = open_loader(beton, plan, device, decoding)
    say(line)
    for remark in remarks(beton, spec.img_size, spec.crop_pct):
        say(f"note: {remark}")
    precision: dict[str, Any] = {"amp": options.amp, "amp_dtype": DTYPES[options.amp_dtype]}
    evaluate = Evaluator(scorer.model, scorer.augment, **precision, compile=False, tta=options.tta)
    try:
        with ScoringProgress(beton.num_samples) as progress:
            scores = evaluate(Counted(loader, progress), batch_size, by_class=options.per_class is not None)
    finally:
        loader.close()
    _write_files(options, scores, scorer, beton)
    return scores, scorer


def _written(options: Options) -> dict[Path, str]:
    """The files that will be written, and the suffix of each."""
    files: dict[Path, str] = {}
    if options.per_class:
        files[options.per_class] = ".csv"
    if options.json:
        files[options.json] = ".json"
    if options.results_file:
        path = with_suffix_of(options.results_file, options.results_format)
        files[path] = path.suffix
    return files


def _write_files(options: Options, scores: Scores, scorer: Scorer, beton: Beton) -> None:
    look = {"img_size": scorer.spec.img_size, "crop_pct": scorer.spec.crop_pct, "interpolation": scorer.interpolation}
    content: dict[str, Any] = {
        "checkpoint": str(options.checkpoint) if options.checkpoint else None,
        "weights": "ema" if options.use_ema else "model" if options.checkpoint else scorer.origin,
        "model": scorer.name,
        "data": str(beton.path),
        **look,
        "tta": options.tta,
        **scores_to_dict(scores),
    }
    try:
        if options.per_class:
            names = scorer.class_names(beton.classes)
            content["classes"] = class_rows(scores, names)
            options.per_class.write_text(rows_to_csv(content["classes"]), encoding="utf-8", errors="surrogateescape")
            from lowrank_vit.report.confusion_plot import confusion_plot  # draws: only where asked for

            assert scores.confusion is not None
            subtitle = f"{content['model']}  ·  {scores.num_samples:,} samples  ·  top-1 {scores.top1:.2f} %"
            picture = confusion_plot(scores.confusion.numpy(), names, subtitle)
            picture_beside(options.per_class).write_bytes(picture)
        for path, suffix in _written(options).items():
            if suffix == ".json":
                path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            elif path != options.per_class:
                parameters = sum(parameter.numel() for parameter in scorer.model.parameters())
                row = {"model": scorer.name, **look, **timm_columns(scores), "param_count": round(parameters / 1e6, 2)}
                path.write_text(rows_to_csv([row]), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}.") from error


def _follow_model(scorer: Scorer, beton: Beton, options: Options, say: Callable[[str], object]) -> None:
    """Give the set the labels of the model's outputs. Raises `UserError` if they cannot be compared."""
    of_data = Classes(str(beton.path), beton.num_classes, beton.classes)
    for remark in count_remarks(beton.path, beton.path.stem, beton.classes or (), beton.num_samples):
        say(remark)
    trust = Trust(options.trust_labels, options.class_order)
    found = match(of_data, scorer.classes, trust, _own_data(scorer, beton.path))
    for remark in found.remarks:
        say(f"note: {remark}")
    if len(found.outputs) < scorer.num_classes:
        say(f"note: all {scorer.num_classes:,} outputs of the model can win, also those whose class the data lack")
    beton.relabel(found.outputs, found.names)


def _own_data(scorer: Scorer, path: Path) -> str:
    folder = scorer.args.get("data-dir")
    own = f"the data it was trained on, --data {folder}" if folder else "the data it was trained on with --data"
    return f"Give {own}, or a checkpoint that was trained on {path}."


def _find_data(options: Options, args: dict[str, Any]) -> Path:
    """The `.beton` to score, converted and staged now if need be; `args` are the flags of the checkpoint's run."""
    split = options.split or str(args.get("val-split") or "validation")
    where = DataOptions(options.dataset, None, options.dataset_download, options.beton_dir, val_split=split)
    nested: Any = options.nested_classes or args.get("nested-classes") or "leaf"
    where = replace(where, on_bad=options.on_bad_sample, nested=nested)
    dataset = str(args.get("dataset") or "")
    if options.data is None and kind_of(options.dataset or dataset) == kind_of(dataset):  # the checkpoint's own
        kept = {name: Path(value) for name in ("data-dir", "beton-dir") if (value := args.get(name))}
        beton_dir = options.beton_dir or kept.get("beton-dir")
        where = replace(where, dataset=dataset, data_dir=kept.get("data-dir"), beton_dir=beton_dir)
    path = locate_validation(options.data, where)
    return stage(path, options.stage_dir) if options.stage_dir else path


@dataclass(frozen=True, kw_only=True)
class _CommandLine(Options):
    """The options, and timm's old form `validate.py DIR --checkpoint ...`."""

    dir: Positional[Annotated[Path | None, arg(metavar="[DATA]")]] = None
    """The same as --data DATA."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, score, print."""
    argv = sys.argv[1:] if argv is None else argv
    prog = usage_name("lowrank_vit.validate")
    argv = fit_flags(argv, "validate", terminal.say)
    with fitted_help(argv):
        options = tyro.cli(_CommandLine, args=argv, prog=prog, description=Options.__doc__)
    if options.dir is not None and options.data is not None:
        raise UserError(f"{options.dir} and --data {options.data}: give the data once.")
    options = replace(options, data=options.data or options.dir)
    scores, scorer = _validate(options, terminal.say)
    terminal.say(f"{scorer.origin}, {scores.num_samples:,} samples")
    for name, percent in (("top-1", scores.top1), ("top-5", scores.top5)):
        low, high = interval(percent, scores.num_samples)
        print(f"  {name}  {percent:6.2f} %   95 % interval {low:.2f} to {high:.2f}")
    print(f"  loss   {scores.loss:.4f}")
    if not math.isfinite(scores.loss):
        print("note: the loss is not finite, so some outputs are not either, and no score of them means anything")
    written = (options.per_class and picture_beside(options.per_class), *_written(options))
    if files := ", ".join(str(path) for path in written if path):
        terminal.say(f"written: {files}")


if __name__ == "__main__":
    exit_cleanly(main)
