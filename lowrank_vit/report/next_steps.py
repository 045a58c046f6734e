"""What to do with a run directory next, as commands that can be pasted: said when a run ends and in its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_vit.common.program import pasteable_command
from lowrank_vit.report.reached import better_weights

WIDTH = 76
"""Columns of a command; beyond them it goes on in the next line."""


@dataclass(frozen=True)
class Step:
    """One thing to do."""

    what: str
    """In a few words."""
    words: tuple[str, ...]
    """The command's words as they are typed; those that belong together are one."""

    def command(self, indent: str = "") -> str:
        """The command, on several lines where it is long."""
        lines = [indent]
        for word in self.words:
            if len(lines[-1]) + len(word) > WIDTH and lines[-1].strip():
                lines[-1] += "\\"
                lines.append(indent + "    ")
            lines[-1] += word + " "
        return "\n".join(line.rstrip() for line in lines)


def shown(path: Path) -> str:
    """A path as it can be typed here: without links like output/latest, which may point elsewhere tomorrow."""
    absolute = path.resolve()
    below = absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
    return shlex.quote(str(below))


def next_steps(
    run_dir: Path, args: Mapping[str, Any], *, is_finished: bool, is_drawn: bool = False, launcher: str = ""
) -> list[Step]:
    """What makes sense with what the directory holds; `args` are the run's flags.

    `is_drawn`: there is a report, and no newer numbers. `launcher` stands before `-m lowrank_vit.train` where it is not
    one process, such as "torchrun ...".
    """
    run, steps = shown(run_dir), list[Step]()
    train = f"{launcher} -m lowrank_vit.train" if launcher else pasteable_command("lowrank_vit.train")
    config = f"--config {run}/args.yaml"
    if not is_finished:
        if (run_dir / "last.pth.tar").exists():
            steps.append(Step("Go on with it", (train, config, f"--resume {run}/last.pth.tar")))
        else:
            steps.append(Step("Nothing was saved yet: begin anew", (train, config)))
    if not is_drawn:
        steps.append(Step("Draw it", (pasteable_command("lowrank_vit.report"), run)))
    if args.get("synthetic"):
        data = () if args.get("data-dir") else ("--data-dir DATA",)
        steps.append(Step("Compare its img/s with those of your data", (train, config, "--no-synthetic", *data)))
    elif (run_dir / "model_best.pth.tar").exists():
        best = f"--checkpoint {run}/model_best.pth.tar"
        ema = ("--use-ema",) if better_weights(run_dir / "model_best.pth.tar") == "ema" else ()
        steps += [
            Step("Singular values of its weights", (pasteable_command("lowrank_vit.analyze_spectrum"), *ema, best)),
            Step("Score it again, with 95 % intervals", (pasteable_command("lowrank_vit.validate"), *ema, best)),
            Step("Classify images", (pasteable_command("lowrank_vit.inference"), "IMAGE_OR_FOLDER", *ema, best)),
        ]
    if any(run_dir.glob("wandb/offline-run-*")):
        steps.append(Step("Send what was kept for Weights & Biases", ("wandb sync", f"{run}/wandb/offline-run-*")))
    return steps
