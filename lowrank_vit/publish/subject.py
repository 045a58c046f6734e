"""The exported model: that of a checkpoint, as it was validated, and the facts that its run tells of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.model.create import InputSpec
from lowrank_vit.model.hub import CONFIG, LOCAL
from lowrank_vit.model.low_rank import merge, ranks_of
from lowrank_vit.model.weight_files import COMPRESSION
from lowrank_vit.model.weights import Checkpoint, read_checkpoint
from lowrank_vit.publish.options import ExportOptions
from lowrank_vit.report.read import Run, read_run
from lowrank_vit.report.spectra.values import spectra_plot
from lowrank_vit.score.options import ModelOptions
from lowrank_vit.score.results import interval
from lowrank_vit.score.scorer import load_scorer

CHECKPOINTS = ("model_best.pth.tar", "last.pth.tar")
"""The first of these in a run's directory is exported."""


@dataclass(frozen=True)
class Score:
    """A score on the validation set."""

    name: str
    percent: float
    interval: tuple[float, float] | None
    """95 % confidence, in percent; None if the number of images is unknown."""


@dataclass(frozen=True)
class Subject:
    """A model to export."""

    name: str
    """timm's name of the model."""
    model: nn.Module
    """The model with plain layers, on the CPU."""
    spec: InputSpec
    interpolation: str
    class_names: list[str] | None
    """One for each output; None if the checkpoint does not name them."""
    is_ema: bool
    checkpoint: Checkpoint
    args: dict[str, Any]
    """The run's flags by name; empty for a file of another program."""
    merged: str = ""
    """A sentence on the layers that were merged; empty if none were."""
    run: Run | None = None
    scores: list[Score] = field(default_factory=list)
    num_images: int | None = None
    """Images in the validation set."""
    scored_at: int | None = None
    """Updates of the weights that were scored; None without scores."""
    picture: bytes | None = None
    """A plot of its spectra during training, as PNG."""

    @property
    def updates(self) -> int | None:
        """How many updates the weights have had; None if the checkpoint does not tell."""
        step: Any = self.checkpoint.content.get("step")
        return int(step["num_updates"]) if isinstance(step, dict) and "num_updates" in step else None


def find_checkpoint(run: Path) -> Path:
    """The file of a run that is exported, or `run` itself if it is one. Raises `UserError`."""
    folder = run if run.is_dir() else run.parent
    is_of_timm = (folder / CONFIG).is_file() and not (folder / "args.yaml").exists()
    if is_of_timm and (run.is_dir() or run.suffix == ".safetensors"):
        raise UserError(
            f"{run} is in timm's hub layout already: timm loads it by the name {LOCAL}:{folder}, and "
            f"`hf upload NAME {folder}` sends it to the hub. Give a run's directory, or a checkpoint."
        )
    if not run.is_dir():
        return run
    found = next((path for name in CHECKPOINTS if (path := run / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{run} has neither {' nor '.join(CHECKPOINTS)}: nothing was saved there yet, or it is not a run. Give a "
            "run's directory, or a checkpoint."
        )
    return found


def read_subject(options: ExportOptions, say: Say = terminal.say) -> Subject:
    """Read the model, its run and its scores.

    Raises:
        UserError: the file has no weights, not the wanted ones, or some that are not finite; timm does not know the
            model; or it has factors or adapters and --no-merge was given.
    """
    path = find_checkpoint(options.run)
    checkpoint = read_checkpoint(path)
    if not checkpoint.arch:
        raise UserError(
            f"{path} does not name its model, so it cannot be built. Export a checkpoint that a run has saved, "
            f"such as {CHECKPOINTS[0]}."
        )
    is_ema = checkpoint.starts_from_ema if options.weights == "auto" else options.weights == "ema"
    if ("state_dict_ema" if is_ema else "state_dict") not in checkpoint.content:
        other = "raw" if is_ema else "ema"
        raise UserError(f"--weights {options.weights}: {path} has no such weights. Give --weights {other}.")
    scorer = load_scorer(ModelOptions(checkpoint=path, use_ema=is_ema), torch.device("cpu"), say, checkpoint)
    model, ranks, lora = scorer.model, ranks_of(scorer.model), checkpoint.lora
    if (ranks or lora) and not options.merge:
        what = f"{len(ranks)} factorised layers" if ranks else f"adapters at {len(lora.layers) if lora else 0} layers"
        raise UserError(
            f"--no-merge: {path} has {what}, which timm cannot load. Leave --no-merge out: they are merged into layers "
            "of their original shapes."
        )
    merge(model)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path} is not exported: its {name} has values that are not finite, so the model is worthless. Give "
                "an older checkpoint of the run."
            )
    run = _run_of(path)
    scores, num_images, scored_at = _scores(checkpoint, run, is_ema=is_ema)
    return Subject(
        scorer.name,
        model,
        scorer.spec,
        scorer.interpolation,
        scorer.class_names() if scorer.trained_names else None,
        is_ema,
        checkpoint,
        scorer.args,
        _merged_in_words(ranks, len(lora.layers) if lora else 0, lora.rank if lora else 0),
        run,
        scores,
        num_images,
        scored_at,
        spectra_plot(run) if run else None,
    )


def _run_of(path: Path) -> Run | None:
    """The run whose directory holds a checkpoint; None for a file by itself."""
    try:
        return read_run(path.parent) if (path.parent / "args.yaml").exists() else None
    except UserError:
        return None


def _merged_in_words(ranks: Mapping[str, int], adapters: int, rank: int) -> str:
    if ranks:
        low, high = min(ranks.values()), max(ranks.values())
        of = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"{len(ranks)} layers were products of two factors ({of}). Here each is that product, in its original "
            "shape, since timm has no factorised layers: the numbers are the same, the file is as large as that of "
            "the whole model."
        )
    if adapters:
        return f"It was tuned with LoRA: adapters of rank {rank} at {adapters} layers, merged into these here."
    return ""


def _scores(checkpoint: Checkpoint, run: Run | None, *, is_ema: bool) -> tuple[list[Score], int | None, int | None]:
    """The scores of the latest validation up to these weights, the number of images, and the updates before it."""
    content, prefix = checkpoint.content, "eval_ema_" if is_ema else "eval_"
    told: Any = content.get("val_samples")
    count = told if isinstance(told, int) and told > 0 else None
    compression: Any = content.get(COMPRESSION)
    step: Any = content.get("step")
    if run and isinstance(step, dict) and "update" in run.epochs:
        rows = [n for n, update in enumerate(run.epochs["update"]) if update <= step.get("num_updates", -1)]
        of_row = [(name, run.epochs.get(f"{prefix}{key}")) for name, key in (("top-1", "top1"), ("top-5", "top5"))]
        found = [(name, float(column[rows[-1]])) for name, column in of_row if rows and column is not None]
        known = [_score(name, percent, count) for name, percent in found if math.isfinite(percent)]
        return known, count, int(run.epochs["update"][rows[-1]]) if known else None
    if isinstance(compression, dict) and isinstance(compression.get("top1"), int | float):
        return [_score("top-1", float(compression["top1"]), count)], count, None
    return [], count, None


def _score(name: str, percent: float, count: int | None) -> Score:
    return Score(name, percent, interval(percent, count) if count else None)
