"""`python -m lowrank_vit.augment --preview FILE.png`: draw what the other training flags do to images."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import require_one_process, usage_name
from lowrank_vit.common.terminal import output_is_in_files, say
from lowrank_vit.config.command_line import asks_for_help, show_help
from lowrank_vit.config.data_options import Data
from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import expanded
from lowrank_vit.config.options import Augment as AugmentOptions
from lowrank_vit.config.options import Run

HELP = """Draw what augmentation does: each operation at every level, and a batch as the model sees it, with its labels.

The flags are those of lowrank_vit.train, all of which are taken; here are those that change the picture.
"""


@dataclass(frozen=True)
class _Shown:
    """The flags that --help lists; `parse` reads them, and all others of training."""

    preview: Annotated[Path, arg(metavar="FILE.png")]
    """The picture to draw."""
    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """A run's configuration; flags given beside it win."""
    data_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: data)")] = None
    """Where train.beton is; where there is none, photographs that ship with scikit-image are shown."""
    batch_size: Annotated[int, arg(metavar="N")] = 24
    """Images of the batch, at most 24."""
    img_size: Annotated[int, arg(metavar="N")] = 224
    """Side of the square image, pixels."""
    scale: Annotated[tuple[float, float], arg(metavar="LEAST GREATEST")] = Data.scale
    """Random resized crop: share of the image's area."""
    ratio: Annotated[tuple[float, float], arg(metavar="LEAST GREATEST")] = Data.ratio
    """Random resized crop: aspect ratio, width / height."""
    hflip: float = Data.hflip
    """Probability of a horizontal flip."""
    vflip: float = Data.vflip
    """Probability of a vertical flip."""
    seed: int = Run.seed
    """Another one draws other crops and operations."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own). Raises `UserError`."""
    require_one_process("lowrank_vit.augment")
    argv = sys.argv[1:] if argv is None else argv
    prog = usage_name("lowrank_vit.augment")
    if not argv or asks_for_help(argv):
        show_help(_Shown, argv or ["--help"], prog, HELP)
    path, flags = _take_preview(argv)
    if path is None:
        parse([*flags, "--no-amp", "--no-compile"])  # another wrong option first; without looking for a GPU
        raise UserError("--preview FILE.png is missing: the picture to draw.")
    if path.suffix.lower() != ".png":
        raise UserError(f"--preview {path} does not end in .png.")
    config = parse(flags, prog=f"{prog} --preview FILE.png")
    from lowrank_vit.model.hub import find_model, source_of, with_source  # torch takes seconds, which a wrong option
    from lowrank_vit.report.augment_preview import preview  # must not cost

    if source_of(config.model.model):
        config = with_source(config, find_model(config.model.model).flags())
    picture = preview(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    except OSError as error:
        raise UserError(f"--preview {path} cannot be written: {error.strerror}.") from error
    output_is_in_files()
    say(f"wrote {path}")


def _take_preview(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The picture's path (None if not given), and the rest of the command line."""
    for n, token in enumerate(argv):
        if token.startswith("--preview="):
            return expanded(token.removeprefix("--preview="), "--preview"), argv[:n] + argv[n + 1 :]
        if token == "--preview":
            behind = argv[n + 1 : n + 2]
            if not behind or behind[0].startswith("-"):
                return None, argv[:n] + argv[n + 1 :]
            return expanded(behind[0], "--preview"), argv[:n] + argv[n + 2 :]
    return None, argv


if __name__ == "__main__":
    exit_cleanly(main)
