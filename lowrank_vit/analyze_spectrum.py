"""`python -m lowrank_vit.analyze_spectrum --checkpoint FILE`: the spectra of a saved model as tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from data_prep.errors import UserError, exit_cleanly
from lowrank_vit.engine.checkpoint import read_checkpoint
from lowrank_vit.spectral.analyze import analyze_weights, as_json, print_tables, write_json
from lowrank_vit.spectral.select import DEFAULT_TARGETS


@dataclass(frozen=True)
class Options:
    """Singular values of a checkpoint's weight matrices: tables here, numbers in <save-dir>/<model>_spectral.json."""

    checkpoint: Path
    """A checkpoint of this project or of timm, e.g. output/<experiment>/last.pth.tar."""
    use_ema: bool = False
    """Read the averaged weights instead of the raw ones."""
    targets: str = DEFAULT_TARGETS
    """Comma-separated endings of module names."""
    topk: int = 8
    """How many singular values to list from each end."""
    interval: int = 1
    """Distance between the listed ones: 1 lists 1, 2, 3, ...; 10 lists 1, 11, 21, ..."""
    save_dir: Path = Path("out")
    """Where the JSON goes; made if missing."""


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments).

    Raises:
        UserError: the checkpoint cannot be read, a target matches nothing, or the output cannot be written.
    """
    options = tyro.cli(Options, args=argv, prog="python -m lowrank_vit.analyze_spectrum")
    if min(options.topk, options.interval) < 1:
        raise UserError(f"--topk {options.topk} --interval {options.interval}: expected 1 or more for both")
    checkpoint = read_checkpoint(options.checkpoint)
    layers = analyze_weights(checkpoint.weights(options.use_ema), options.targets)
    name = checkpoint.arch or options.checkpoint.name.split(".")[0]  # a bare state dict does not tell its model
    meta = {
        "model": name,
        "checkpoint": str(options.checkpoint),
        "epoch": checkpoint.epoch,
        "use_ema": options.use_ema,
        "targets": options.targets,
        "torch": torch.__version__,
    }
    path = options.save_dir / f"{name}_spectral.json"
    write_json(as_json(layers, meta, options.topk, options.interval), path)
    console = Console()
    weights = "EMA weights" if options.use_ema else "raw weights"
    console.print(f"{name}, epoch {checkpoint.epoch}, {weights}")
    print_tables(layers, console)
    console.print(f"wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    exit_cleanly(main)
