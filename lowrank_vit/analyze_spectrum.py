"""`python -m lowrank_vit.analyze_spectrum`: the spectra of saved or pretrained weights as tables, JSON and arrays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from data_prep.errors import UserError, exit_cleanly
from lowrank_vit.engine.checkpoint import read_checkpoint
from lowrank_vit.spectral.analyze import (
    Analysis,
    Precision,
    analyze_weights,
    arrays_of,
    as_json,
    choose_weights,
    compare,
    drift_as_json,
    write_arrays,
    write_json,
)
from lowrank_vit.spectral.ends import Solver
from lowrank_vit.spectral.refresh import Settings
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.tables import print_analysis, print_drift


@dataclass(frozen=True)
class Options:
    """Spectra of weight matrices: tables here, numbers in <save-dir>/<model>_spectral.json."""

    checkpoint: Path | None = None
    """A checkpoint of this project or of timm, e.g. output/<experiment>/last.pth.tar."""
    use_ema: bool = False
    """Read a checkpoint's averaged weights instead of the raw ones."""
    model: str = ""
    """timm model name; with --pretrained its published weights are analyzed, else it only names the output."""
    pretrained: bool = False
    """Fetch timm's weights of --model (needs a network or timm's cache)."""
    compare: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="BEFORE AFTER")] = None
    """Instead: how far two checkpoints of one model lie apart, in <save-dir>/<model>_drift.json."""
    targets: str = DEFAULT_TARGETS
    """Comma-separated endings of module names."""
    split_qkv: bool = False
    """Take Q, K and V as three matrices."""
    topk: int = 8
    """How many singular values and vectors to record from each end."""
    interval: int = 1
    """Distance between the recorded ones: 1 lists 1, 2, 3, ...; 10 lists 1, 11, 21, ..."""
    solver: Solver = "gram64"
    """float64 Gram matrix, certified, or the slow reference: float64 SVD."""
    dtype: Precision = "float64"
    """float32: a plain float32 SVD, to see what it loses."""
    svd_on_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    full: bool = False
    """Save all singular values, and with --save-vectors all vectors, to <save-dir>/<model>_vectors.<format>."""
    save_vectors: bool = False
    """Save the recorded vectors there."""
    format: Literal["npz", "pt"] = "npz"
    """Of the saved arrays."""
    save_dir: Path = Path("out")
    """Where files go; made if missing."""


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments).

    Raises:
        UserError: the weights cannot be read, a target matches nothing, flags contradict, or output cannot be written.
    """
    options = tyro.cli(Options, args=argv, prog="python -m lowrank_vit.analyze_spectrum")
    if min(options.topk, options.interval) < 1:
        raise UserError(f"--topk {options.topk} --interval {options.interval}: expected 1 or more for both")
    sources = [bool(options.checkpoint), options.pretrained, bool(options.compare)]
    if sum(sources) != 1:
        raise UserError("Give one of --checkpoint FILE, --model NAME --pretrained, or --compare BEFORE AFTER.")
    console = Console(highlight=False)
    if options.compare:
        _compare(options, options.compare, console)
    else:
        _analyze(options, console)


def _analyze(options: Options, console: Console) -> None:
    if options.checkpoint:
        weights, meta = _read(options, options.checkpoint)
    else:
        weights, meta = _fetch(options)
    analysis = _solve(options, weights)
    name = meta["model"]
    path = options.save_dir / f"{name}_spectral.json"
    write_json(as_json(analysis, meta | _settings(options)), path)
    written = [path]
    if options.full or options.save_vectors:
        path = options.save_dir / f"{name}_vectors.{options.format}"
        write_arrays(arrays_of(analysis, vectors=options.save_vectors, full=options.full), path)
        written.append(path)
    epoch = f"epoch {meta['epoch'] + 1}, " if meta["epoch"] >= 0 else ""
    console.print(f"{name}, {epoch}{'EMA' if options.use_ema else 'raw'} weights")
    print_analysis(analysis, console)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def _compare(options: Options, paths: tuple[Path, Path], console: Console) -> None:
    (before, old), (after, new) = (_read(options, path) for path in paths)
    drift = compare(_solve(options, before), _solve(options, after))
    meta = {"model": new["model"], "before": old, "after": new, **_settings(options)}
    content = drift_as_json(drift, meta | {"topk": options.topk, "interval": options.interval})
    path = options.save_dir / f"{new['model']}_drift.json"
    write_json(content, path)
    weights = "EMA weights" if options.use_ema else "raw weights"
    console.print(f"{new['model']}, {weights}, epoch {old['epoch'] + 1} to {new['epoch'] + 1}")
    print_drift(drift, content["types"], console)
    console.print(f"wrote {path}", soft_wrap=True)


def _solve(options: Options, state: dict[str, Tensor]) -> Analysis:
    device = torch.device("cuda" if torch.cuda.is_available() and not options.svd_on_cpu else "cpu")
    weights = choose_weights(state, options.targets, options.split_qkv, device)
    threads = len(os.sched_getaffinity(0))
    settings = Settings(options.topk, options.interval, options.solver, options.svd_on_cpu, threads)
    return analyze_weights(weights, settings, options.dtype)


def _read(options: Options, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    checkpoint = read_checkpoint(path)
    # A bare state dict does not tell its model.
    name = options.model or checkpoint.arch or path.name.split(".")[0]
    meta = {"model": name, "checkpoint": str(path), "epoch": checkpoint.epoch, "use_ema": options.use_ema}
    return checkpoint.weights(options.use_ema), meta


def _fetch(options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import timm

    if not options.model:
        raise UserError("--pretrained: give the timm model's name too, e.g. --model vit_small_patch16_224.")
    if options.use_ema:
        raise UserError("--use-ema reads a checkpoint's averaged weights; leave it out with --pretrained.")
    if not timm.is_model(options.model):
        near = timm.list_models(f"*{options.model.split('.')[0][:8]}*")[:5]
        raise UserError(f"--model {options.model}: timm has no such model. Similar: {', '.join(near) or 'none'}.")
    try:
        model = timm.create_model(options.model, pretrained=True)
    except Exception as error:  # a missing network, cache or weight file fails in many ways
        raise UserError(
            f"--model {options.model} --pretrained: its weights cannot be had: {error}. Connect to a network, or "
            "give a file with --checkpoint."
        ) from error
    return model.state_dict(), {"model": options.model, "checkpoint": "pretrained", "epoch": -1, "use_ema": False}


def _settings(options: Options) -> dict[str, Any]:
    names = ("targets", "split_qkv", "solver", "dtype")
    return {name: getattr(options, name) for name in names} | {"torch": torch.__version__}


if __name__ == "__main__":
    exit_cleanly(main)
