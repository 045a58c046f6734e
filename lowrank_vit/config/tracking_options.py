"""Options of trackers, which get a run's numbers beside its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.option_types import MAY_CHANGE

TrackerName = Literal["wandb", "tensorboard", "trackio", "mlflow", "none"]


@dataclass(frozen=True)
class Tracking:
    """Trackers that get a copy of the numbers; none of them ever stops a run."""

    tracker: Annotated[tuple[TrackerName, ...], MAY_CHANGE] = ()
    """Also send the numbers to these trackers, one or several. tensorboard needs no account."""
    log_wandb: Annotated[bool, MAY_CHANGE] = False
    """The same as --tracker wandb: Weights & Biases. WANDB_MODE=offline works without a network."""
    wandb_project: Annotated[str, MAY_CHANGE] = "lowrank-vit"
    """Project name in Weights & Biases and trackio, experiment name in MLflow."""
    wandb_tags: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """Tags of the run in its trackers."""
    wandb_resume_id: Annotated[str, MAY_CHANGE] = ""
    """Continue this W&B run; default with --resume: the checkpoint's."""
    wandb_spec: Annotated[Literal["means", "types", "first-last", "all"], MAY_CHANGE] = "means"
    """Which numbers of the spectra each tracker gets. means: twelve metrics by type, and two of each matrix. types: all
    means by type. first-last: also everything of the first and last block. all: everything."""


def trackers(options: Tracking) -> tuple[str, ...]:
    """The chosen trackers, each once. Raises `UserError` if two options choose differently."""
    chosen = tuple(dict.fromkeys(options.tracker))
    typed, sent = " ".join(chosen), tuple(name for name in chosen if name != "none")
    if options.log_wandb and chosen and "wandb" not in chosen:
        raise UserError(
            f"--log-wandb means --tracker wandb, and --tracker {typed} says otherwise. Leave one of them out (a file's "
            f"with --no-log-wandb), or write --tracker {' '.join(('wandb', *sent))}."
        )
    if "none" in chosen and len(chosen) > 1:
        raise UserError(f"--tracker {typed}: none stands alone. Leave it out, or the others.")
    return ("wandb",) if options.log_wandb and not chosen else sent
