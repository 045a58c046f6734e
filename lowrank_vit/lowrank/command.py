"""The command `compress`: from a checkpoint and images to a table, files and smaller checkpoints."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.common.devices import pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import pasteable_command
from lowrank_vit.lowrank.allocation import least_budget
from lowrank_vit.lowrank.calibration import Moments, blocks_of, calibrate
from lowrank_vit.lowrank.curve import (
    Point,
    Subject,
    constant_candidates,
    constant_of,
    decompose,
    in_turn,
    layers_alone,
    plain_spectra,
    point,
    spectra_of,
)
from lowrank_vit.lowrank.images import Images
from lowrank_vit.lowrank.latency import ROUNDS, Speed, forward_of, layer_speeds, time_in_turns
from lowrank_vit.lowrank.layers import costs_of, save_compressed
from lowrank_vit.lowrank.options import CompressOptions, Curve
from lowrank_vit.lowrank.results import Result, check_out, print_points, write_files
from lowrank_vit.lowrank.targets import find_targets, parts_of_targets
from lowrank_vit.lowrank.truncate import Decomposition
from lowrank_vit.model.hub import find_model, source_of
from lowrank_vit.model.low_rank import merge, ranks_of
from lowrank_vit.model.weight_files import COMPRESSION
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.report.compression.read import NAME
from lowrank_vit.run.directory import environment
from lowrank_vit.score.results import ScoringProgress, interval, make_folder_of
from lowrank_vit.score.scorer import Scorer, load_scorer

ROOM_BYTES = 2 << 30
"""Memory for the factors of the models that are scored in one pass."""
_LATENCY_IMAGES = (1, 32)
_INPUT = ("model-kwargs", "img-size", "crop-pct", "mean", "std")
"""Flags that a checkpoint keeps because it cannot be used without them."""
Say = Callable[[str], object]


def compress(options: CompressOptions, say: Say = terminal.say) -> Result | None:
    """Measure a curve or make one model; print a table and write the requested files. Raises `UserError`.

    Returns None for `svd` without data, which measures nothing.
    """
    job = _Job(options, say)
    return job.without_data() if options.data.data is None else job.run()


class _Job:
    """One call of the command: the model, its targets and the output paths."""

    def __init__(self, options: CompressOptions, say: Say) -> None:
        self.options, self.say = options, say
        files = options.files
        for path in (files.save, files.merge, files.out and files.out / NAME):
            if path:
                make_folder_of(path)
        self.device = pick_device(options.running.device)
        if why := why_on_cpu(options.running.device, self.device):
            say(why)
        source = options.source
        self.scorer: Scorer = load_scorer(source, self.device, say)
        model = self.scorer.model
        say(f"{self.scorer.origin}: {self.scorer.name}, {sum(p.numel() for p in model.parameters()):,} parameters")
        if kind := self.scorer.half_precision:
            say(f"note: the file's weights are {kind}; they are compressed and saved as float32")
        if ranks := ranks_of(model):
            merge(model)
            whole = sum(p.numel() for p in model.parameters())
            say(
                f"note: {len(ranks)} layers are factorised already; their products are compressed, and budgets are "
                f"shares of the model with these products: {whole:,} parameters"
            )
        img_size = self.scorer.spec.img_size
        targets = find_targets(model, source.targets, img_size=img_size, say=say)
        parts = parts_of_targets(model, targets, source.split)
        self.subject = Subject(model, targets, parts, costs_of(model, targets, img_size=img_size, parts=parts))
        self.fingerprint = fingerprint(model.state_dict())
        if options.files.out:
            check_out(options.files.out, self.fingerprint)
        for flag, path in (("--save", options.files.save), ("--merge", options.files.merge)):
            if path and path.exists():
                self._check_free(flag, path)
        self.budgets = self._budgets()
        self.method = "kfac" if "kfac" in options.methods else options.methods[-1]
        """The method used for the constant, for the layers' sensitivities and for the models whose latency is
        measured."""

    def _budgets(self) -> tuple[float, ...]:
        """The budgets that the model can have. Raises `UserError` if a requested one is too small."""
        by, given = self.options.curve.by, self.options.budgets
        least = least_budget(self.subject.costs, by)
        kept = tuple(budget for budget in given if budget >= least)
        if len(kept) == len(given):
            return kept
        what = "parameters" if by == "params" else "FLOPs"
        needs = (
            f"rank 1 of every target and the layers that stay whole need {100 * least:.2f} % of the model's {what}, "
            f"more than a budget of {min(given):g}"
        )
        if kept and self.options.curve.budgets == Curve.budgets:
            self.say(f"note: {needs}; budgets that are too small are left out")
            return kept
        flag = "--budget" if self.options.files.budget is not None else "--budgets"
        raise UserError(f"{flag}: {needs}. Give at least {_rounded_up(least)}, or more layers with --targets.")

    def _check_free(self, flag: str, path: Path) -> None:
        """Raise `UserError` if `path` exists and is not this command's result for the same weights."""
        about: Any = read_checkpoint(path, flag).content.get(COMPRESSION)
        if not isinstance(about, dict) or about.get("fingerprint") != self.fingerprint:
            of = about.get("checkpoint", "another one") if isinstance(about, dict) else "not a compressed model"
            raise UserError(f"{flag} {path} exists and has other weights ({of}). Give another name.")

    def without_data(self) -> None:
        """Make one model by `svd` and save it without scoring."""
        with ScoringProgress(len(self.subject.targets), "decomposing by svd", "layers") as bar:
            found = decompose(self.subject, "svd", None, bar.advance)
        made = point(self.subject, found, "svd", self.options.allocations[0], self.budgets[0], self.options.curve.by)
        self._save(made, 0)

    def run(self) -> Result:
        """Score every point, print the table, write the requested files."""
        options = self.options
        with Images(options, self.scorer, self.device, self.say) as images:
            result = self._measured(images)
        _print(result, self.say)
        failures: list[str] = []
        try:
            if options.files.out:
                if options.curve.latency:
                    result.latency = self._latency(result.points)
                self._write(options.files.out, result, images)
        except UserError as error:  # the checkpoint is still written if the folder cannot be
            failures.append(str(error))
        try:
            if options.files.budget is not None:
                self._save(result.points[0], images.num_calibration)
        except UserError as error:
            failures.append(str(error))
        if failures:
            raise UserError(" ".join(failures))
        return result

    def _measured(self, images: Images) -> Result:
        """Calibrate, make the points of each method in turn, and score as many in a pass as memory allows."""
        options, subject = self.options, self.subject
        with ScoringProgress(images.num_calibration, "calibrating") as bar:
            moments = self._calibrated(images, bar)
        if images.num_calibration_classes == 1 < self.scorer.num_classes:
            self.say("note: all calibration images are of one class, so the moments say little about the others")
        (original,) = images.score([subject.model])
        whole = {"params": subject.costs.count({}), "flops": subject.costs.count({}, "flops")}
        result = Result(original, whole, [])
        result.shapes = {name: (layer.out_features, layer.in_features) for name, layer in subject.targets.items()}
        result.parts = subject.parts
        if options.curve.sequential and "svd" in options.methods:
            self.say("note: svd needs no moments, so --sequential does not change it")
        if options.files.out and "svd" not in options.methods:
            with ScoringProgress(len(subject.targets), "spectra of the weights as they are", "layers") as bar:
                result.spectra["svd"] = plain_spectra(subject, bar.advance)
        waiting: list[Point] = []
        for method in options.methods:
            for made in self._points_of(method, images, moments, result):
                if waiting and sum(one.size for one in waiting) + made.size > ROOM_BYTES:
                    result.points += self._scored(images, waiting)
                    waiting = []
                waiting.append(made)
        result.points += self._scored(images, waiting)
        return result

    def _points_of(
        self, method: str, images: Images, moments: Mapping[str, Moments], result: Result
    ) -> Generator[Point]:
        """The points of one method; its decompositions are freed afterwards."""
        subject, curve = self.subject, self.options.curve
        with ScoringProgress(len(subject.targets), f"decomposing by {method}", "layers") as bar:
            found = decompose(subject, method, moments, bar.advance)
        result.spectra[method] = spectra_of(found)
        if method == self.method:
            self._constant(images, found, result)
            self._layers_alone(images, found, result)
        for allocation in self.options.allocations:
            for budget in self.budgets:
                made = point(subject, found, method, allocation, budget, curve.by)
                yield self._in_turn(images, made) if curve.sequential and method != "svd" else made

    def _scored(self, images: Images, points: Sequence[Point]) -> list[Point]:
        scores = images.score([self.subject.with_factors(one.factors) for one in points])
        return [one.scored(each, keep=self._is_kept(one)) for one, each in zip(points, scores, strict=True)]

    def _is_kept(self, one: Point) -> bool:
        """Whether a point's model is needed after scoring, to be saved or to measure its latency."""
        files = self.options.files
        is_needed = files.budget is not None or (files.out is not None and self.options.curve.latency)
        return is_needed and one.method == self.method and one.allocation == self.options.allocations[0]

    def _calibrated(self, images: Images, bar: ScoringProgress) -> dict[str, Moments]:
        subject, seen = self.subject, [0]

        def progress(count: int) -> None:
            bar.advance(count - seen[0])
            seen[0] = count

        of_data = images.calibration()
        seed, pieces = self.options.data.seed, subject.parts
        return calibrate(subject.model, of_data, subject.targets, seed=seed, pieces=pieces, progress=progress)

    def _in_turn(self, images: Images, made: Point) -> Point:
        blocks = len(blocks_of(self.subject.targets))
        doing = f"{made.method} at {made.budget:g}, block after block"
        with ScoringProgress(blocks * images.num_calibration, doing) as bar:
            return in_turn(self.subject, made, images.calibration, self.options.data.seed, bar.advance)

    def _constant(self, images: Images, found: Mapping[str, Decomposition], result: Result) -> None:
        candidates = constant_candidates(self.subject, found, self.method)
        models = [self.subject.with_factors(one.factors) for one in candidates]
        scores = images.score([self.subject.model, *models], "calibration")
        result.constant, result.constant_from = constant_of(self.subject, candidates, scores)

    def _layers_alone(self, images: Images, found: Mapping[str, Decomposition], result: Result) -> None:
        is_measured = self.options.curve.measure_layers
        result.layers_by = self.method
        result.layers = layers_alone(self.subject, found, with_factors=is_measured)
        if is_measured:
            result.layer_scores = images.score([self.subject.with_factors(one.factors) for one in result.layers])

    def _latency(self, points: Sequence[Point]) -> dict[str, Any]:
        """Times of the original and of the kept points, and from which rank a layer gets faster, by device."""
        kept = [one for one in points if one.factors]
        shapes = list(dict.fromkeys((one.rows, one.columns, one.parts) for one in self.subject.costs.layers.values()))
        tokens = max(one.tokens for one in self.subject.costs.layers.values())
        devices = list(dict.fromkeys((torch.device("cpu"), self.device)))
        models, layers = list[dict[str, Any]](), list[dict[str, Any]]()
        total = len(devices) * ROUNDS * (len(_LATENCY_IMAGES) * (1 + len(kept)) + 9 * len(shapes))
        with ScoringProgress(total, "timing", "samples") as bar:
            for device in devices:
                smaller = (self.subject.with_factors(one.factors) for one in kept)
                tested = [_on(device, model) for model in (self.subject.model, *smaller)]
                for count in _LATENCY_IMAGES:
                    size = self.scorer.spec.img_size
                    images = torch.zeros(count, 3, size, size, device=device).to(memory_format=torch.channels_last)
                    speeds = time_in_turns([forward_of(m, images) for m in tested], device, tick=bar.advance)
                    for made, speed in zip((None, *kept), speeds, strict=True):
                        models.append(_timed(made, speed, self.subject) | {"device": str(device), "images": count})
                found = layer_speeds(shapes, _LATENCY_IMAGES[-1] * tokens, device, tick=bar.advance)
                layers += [one.content() | {"device": str(device)} for one in found]
        return {"models": models, "layers": layers}

    def _write(self, out: Path, result: Result, images: Images) -> None:
        options, scorer = self.options, self.scorer
        source = {
            **self._origin(),
            "fingerprint": self.fingerprint,
            "model": scorer.name,
            "img_size": scorer.spec.img_size,
        }
        calibration = {"set": str(images.train.path), "images": images.num_calibration, "seed": options.data.seed}
        about = {
            "source": source,
            "data": str(images.val.path),
            "by": options.curve.by,
            "split": options.source.split,
            "sequential": options.curve.sequential,
            "calibration": calibration,
            "environment": environment(self.device),
        }
        written = write_files(result.content(about), out)
        terminal.output_is_in_files()
        self.say(f"written: {', '.join(map(str, written))}")
        self.say(f"to see it as a page: {pasteable_command('lowrank_vit.report')} {out}")

    def _origin(self) -> dict[str, str]:
        source = self.options.source
        file = source.checkpoint or source.pretrained_path
        return {"checkpoint": str(file or self.scorer.origin), "weights": "ema" if source.use_ema else "model"}

    def _save(self, made: Point, num_calibration: int) -> None:
        """Write the checkpoints of a point, with a description of how they were made."""
        if not made.ranks:
            self.say(f"note: every layer fits whole in a budget of {made.budget:g}: nothing is compressed")
        options, files = self.options, self.options.files
        about: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            **self._origin(),
            **{name: getattr(made, name) for name in ("method", "allocation", "budget", "params", "flops")},
            "by": options.curve.by,
            "targets": options.source.targets,
            "split": options.source.split,
            "sequential": made.sequential,
            "calibration_images": num_calibration,
            "seed": options.data.seed,
        }
        if made.scores:
            about |= {"top1": made.scores.top1, "loss": made.scores.loss}
        given = {name: getattr(options.source, name.replace("-", "_")) for name in _INPUT}
        args = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v}
        path = options.source.checkpoint or options.source.pretrained_path
        source = read_checkpoint(path) if path else None
        if source is None and source_of(options.source.model):
            source = find_model(options.source.model).weights()
        model = self.subject.with_factors(made.factors)
        for path, is_merged in ((files.save, False), (files.merge, True)):
            if path is None:
                continue
            if is_merged:
                merge(model)
            save_compressed(model, path, source, self.scorer.name, about, args)
            terminal.output_is_in_files()
            size = sum(parameter.numel() for parameter in model.parameters())
            what = "original shapes" if is_merged else f"{len(made.factors)} factorised layers"
            self.say(f"wrote {path}: {size:,} parameters, {what}, weights as `state_dict`")


def _on(device: torch.device, model: nn.Module) -> nn.Module:
    """The model itself if it is on the device, otherwise a copy there."""
    is_there = next(model.parameters()).device == device
    return model if is_there else copy.deepcopy(model).to(device)


def _timed(made: Point | None, speed: Speed, subject: Subject) -> dict[str, Any]:
    flops = subject.costs.count(made.ranks if made else {}, "flops")
    of = {"method": made and made.method, "allocation": made and made.allocation, "budget": made and made.budget}
    return {**of, "flops": flops, **speed.content()}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a state dict, in hex; identifies one state of the weights."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rounded_up(share: float) -> str:
    return f"{math.ceil(1e4 * share) / 1e4:g}"


def _print(result: Result, say: Say) -> None:
    """Print the original's scores, the table and notes on it."""
    low, high = interval(result.original.top1, len(result.original.losses_N))
    say(
        f"original: top-1 {result.original.top1:.2f} % (95 %: {low:.2f} to {high:.2f}), "
        f"loss {result.original.loss:.4f}, {len(result.original.losses_N):,} samples"
    )
    print_points(result, result.points, Console(highlight=False))
    if result.constant_from:
        say("±: one standard error of differences paired by sample")
        unclear = "" if result.constant_from["is_clear"] else ", on which no rise was clear"
        say(f"predicted with a constant of {result.constant:.3g}, from the calibration images{unclear}")
        if any(one.sequential for one in result.points):
            say("predictions and constant are for the same ranks without --sequential")
