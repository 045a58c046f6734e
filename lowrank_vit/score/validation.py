"""Score a checkpoint, or published weights, on a validation set, and write files with the scores."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_prep.sources.image_folder import count_remarks
from lowrank_vit.common import terminal
from lowrank_vit.common.devices import DTYPES, pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_all
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions, usual_workers
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import (
    FINDING,
    KINDS,
    DataOptions,
    columns_of,
    kind_of,
    locate_validation,
    without_split,
)
from lowrank_vit.data.sets.provenance import remarks
from lowrank_vit.model.class_match import Classes, Trust, match
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.ranks.agree import agree, gatherer, once
from lowrank_vit.ranks.failing import Failing
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.records import data_record, run_record
from lowrank_vit.ranks.world import World
from lowrank_vit.score.confusions import Counts
from lowrank_vit.score.evaluate import Evaluator, Scores
from lowrank_vit.score.options import ValidateOptions
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
from lowrank_vit.score.scorer import Scorer, load_scorer


def score(options: ValidateOptions, world: World, failing: Failing) -> None:
    """Score on the ranks of `world`, not yet joined; the first prints and writes files. Raises `UserError`."""
    device = pick_device(options.device, world.local_rank)
    with joined(world, device, lambda: run_record(options, device)), failing.watched():
        scores, scorer, beton = _validate(options, terminal.say if world.is_first else _silent, world)
        if world.is_first:
            _print_and_write(options, scores, scorer, beton)


def _silent(line: str) -> None:
    pass


def _print_and_write(options: ValidateOptions, scores: Scores, scorer: Scorer, beton: Beton) -> None:
    terminal.say(f"{scorer.origin}, {scores.num_samples:,} samples")
    for name, percent in (("top-1", scores.top1), ("top-5", scores.top5)):
        low, high = interval(percent, scores.num_samples)
        print(f"  {name}  {percent:6.2f} %   95 % interval {low:.2f} to {high:.2f}")
    print(f"  loss   {scores.loss:.4f}")
    if not math.isfinite(scores.loss):
        print("note: the loss is not finite, so some outputs are not either, and the scores mean nothing")
    sys.stdout.flush()
    if files := _files(options, scores, scorer, beton):  # after the scores, which a full disk must not cost
        write_all(files)
        terminal.output_is_in_files()
        terminal.say(f"written: {', '.join(map(str, files))}")


def validate(options: ValidateOptions, say: Callable[[str], object] = terminal.say) -> Scores:
    """Load the weights, score them on every sample exactly once, write files. Raises `UserError`."""
    scores, scorer, beton = _validate(options, say, World())
    write_all(_files(options, scores, scorer, beton))
    return scores


def _validate(options: ValidateOptions, say: Callable[[str], object], world: World) -> tuple[Scores, Scorer, Beton]:
    """Score this rank's share of the samples; the scores of all on every rank, those of classes on the first."""
    options.check()
    for path, suffix in _written(options).items():
        if path.suffix != suffix:
            flag = "--per-class" if path == options.per_class else "--json"
            raise UserError(f"{flag} {path} must end in {suffix}.")
        if world.is_first:
            make_folder_of(path)
    device = pick_device(options.device, world.local_rank)
    if why := why_on_cpu(options.device, device):
        say(why)
    world.progress.enter("loading the weights")
    scorer = load_scorer(options, device, say)
    world.progress.enter(FINDING)
    path = _find_data(options, scorer.args, say, world)
    beton, spec = Beton(path), scorer.spec
    follow_model(scorer, beton, Trust(options.trust_labels, options.class_order), say)
    agree(world, "data", lambda: data_record({"set": beton}, scorer.model), "opening the data")
    batch_size = min(options.batch_size, beton.num_samples)
    plan = EvalPlan(
        *beton.sides,
        img_size=spec.img_size,
        crop_pct=spec.crop_pct,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.size,
        interpolation=FILTERS[scorer.interpolation],
    )
    decoding = LoaderOptions(
        options.loader,
        options.workers or usual_workers(device, world.local_size),
        on_bad_sample=options.on_bad_sample,
        of_all_ranks=gatherer(world, "loader", "choosing a loader"),
    )
    loader, line = open_loader(beton, plan, device, decoding, say=world.say)
    say(line)
    for remark in remarks(beton, spec.img_size, spec.crop_pct):
        say(f"note: {remark}")
    precision: dict[str, Any] = {"amp": options.amp, "amp_dtype": DTYPES[options.amp_dtype]}
    by_class = options.per_class is not None
    channel = world.channel(timedelta(days=365)) if by_class else None  # of hanging ranks `failing` tells
    evaluate = Evaluator(scorer.model, scorer.augment, **precision, compile=False, tta=options.tta)
    world.progress.enter("scoring")
    try:
        with ScoringProgress(beton.num_samples) if world.is_first else nullcontext() as progress:

            def advance(images: int) -> None:
                world.progress.tick()
                if progress:
                    progress.advance(images * world.size)  # those of the other ranks, which come as fast

            def gather(part: Counts) -> list[Counts] | None:
                with world.progress.waiting():
                    return channel.gather(part) if channel else [part]

            scores = evaluate(Counted(loader, advance), batch_size, world.sum, gather, by_class=by_class)
    finally:
        loader.close()
    return scores, scorer, beton


def _written(options: ValidateOptions) -> dict[Path, str]:
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


def _files(
    options: ValidateOptions, scores: Scores, scorer: Scorer, beton: Beton
) -> dict[Path, Callable[[], str | bytes]]:
    """The files to write, each with a function that makes its content."""
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
    parameters = sum(parameter.numel() for parameter in scorer.model.parameters())
    row = {"model": scorer.name, **look, **timm_columns(scores), "param_count": round(parameters / 1e6, 2)}
    files: dict[Path, Callable[[], str | bytes]] = {}
    if options.per_class:
        names = scorer.class_names(beton.classes)
        content["classes"] = class_rows(scores, names)
        subtitle = f"{content['model']}  ·  {scores.num_samples:,} samples  ·  top-1 {scores.top1:.2f} %"
        files[options.per_class] = lambda: rows_to_csv(content["classes"])
        files[picture_beside(options.per_class)] = lambda: _confusions(scores, names, subtitle)
    for path, suffix in _written(options).items():
        if suffix == ".json":
            files[path] = lambda: json.dumps(content, indent=1, allow_nan=False) + "\n"
        elif path != options.per_class:
            files[path] = lambda: rows_to_csv([row])
    return files


def _confusions(scores: Scores, names: list[str], subtitle: str) -> bytes:
    from lowrank_vit.report import confusion_plot as plot  # loads matplotlib

    confusions = scores.confusions
    assert confusions is not None
    pairs, counts = confusions.most_frequent_mistakes(plot.MISTAKES)
    true, predicted = pairs // len(names), pairs % len(names)
    columns = true, predicted, counts, confusions.totals_C()[true]
    mistakes = [plot.Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return plot.confusion_plot(confusions.binned(plot.classes_a_cell(len(names))), mistakes, names, subtitle)


def follow_model(scorer: Scorer, beton: Beton, trust: Trust, say: Callable[[str], object]) -> None:
    """Give the set the labels of the model's outputs. Raises `UserError` if they cannot be compared."""
    of_data = Classes(str(beton.path), beton.num_classes, beton.classes)
    for remark in count_remarks(beton.path, beton.path.stem, beton.classes or (), beton.num_samples):
        say(remark)
    found = match(of_data, scorer.classes, trust, _own_data(scorer, beton.path))
    for remark in found.remarks:
        say(f"note: {remark}")
    if len(found.outputs) < scorer.num_classes:
        say(f"note: all {scorer.num_classes:,} outputs of the model compete, also those of classes not in the data")
    beton.relabel(found.outputs, found.names)


def _own_data(scorer: Scorer, path: Path) -> str:
    folder = scorer.args.get("data-dir")
    own = f"the data it was trained on, --data {folder}" if folder else "the data it was trained on with --data"
    return f"Give {own}, or a checkpoint that was trained on {path}."


def _find_data(options: ValidateOptions, args: dict[str, Any], say: Callable[[str], object], world: World) -> Path:
    """The `.beton` to score, converted and staged now if need be; `args` are the flags of the checkpoint's run."""
    asked = without_split(options.dataset, None, "--data")[0]
    of_run = "" if asked != options.dataset else str(args.get("val-split") or "")  # --dataset may name a split
    split = options.split or of_run or DataOptions.val_split
    where = DataOptions(
        options.dataset, None, options.dataset_download, options.beton_dir, val_split=split, flag="--data"
    )
    nested: Any = options.nested_classes or args.get("nested-classes") or "leaf"
    where = replace(where, on_bad=options.on_bad_sample, nested=nested)
    kept = {name: Path(value) for name in ("data-dir", "beton-dir") if (value := args.get(name))}
    dataset, data_dir = without_split(str(args.get("dataset") or ""), kept.get("data-dir"))
    kind = kind_of(dataset)
    is_same = kind_of(asked or dataset, where.flag) == kind and (kind not in KINDS or asked in ("", dataset))
    if options.data is None and is_same:  # the checkpoint's own
        beton_dir = options.beton_dir or kept.get("beton-dir")
        where = replace(where, dataset=options.dataset or dataset, data_dir=data_dir, beton_dir=beton_dir)
    given = {key: value for key in ("input_key", "target_key", "class_map") if (value := getattr(options, key))}
    if is_same and kind_of(where.dataset, where.flag) in KINDS:
        given = {**columns_of(args), **given}
    where = replace(where, **given)
    return locate_validation(options.data, where, say, options.stage_dir, once(world, "sets", FINDING))
