"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.trackers.tracker import About, Table, Tracker

INIT_TIMEOUT_S = 60.0
AXES = {
    "epoch": ("train_loss", "lr", "img_per_s", "data_wait", "data_wait_rank", "eval_*"),
    "update": ("train/*",),
    "spec_update": ("spec/*", "spec_ema/*"),
}
"""The metrics of each axis. No name may match two patterns: W&B would choose one at random in each run."""
_NOT_IN_A_PROJECT = "/\\#?%:"
"""Characters that W&B refuses in a project's name."""


class WandbRun(Tracker):
    """One W&B run. If a run was killed and resumed, repeated updates appear twice."""

    def __init__(self, run: Any, about: About) -> None:
        """`run` is W&B's own object."""
        self._run, self.id = run, run.id
        self.advice = f"Send it later with: wandb sync {about.run_dir}/wandb/*run-*"
        for axis, names in AXES.items():
            run.define_metric(axis)
            for name in names:
                run.define_metric(name, step_metric=axis)

    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Send one row. W&B knows from `AXES` which value is the axis."""
        self._run.log(dict(values))

    def log_table(self, spectra: Table) -> None:
        """Send the table as an artifact of the run, named `scalars`."""
        import wandb

        artifact = wandb.Artifact(f"spectra-{self.id}", type="spectra")
        artifact.add(wandb.Table(columns=[*spectra.columns], data=[*spectra.rows]), "scalars")
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Send the remaining rows."""
        self._run.finish()


def start(about: About, resume_id: str, say: Callable[[str], object]) -> Tracker:
    """Start a run, or continue the one of `resume_id`.

    If the server does not answer, the run is kept on disk (W&B's offline mode). Raises `UserError` without a login,
    which would otherwise only be noticed after training.
    """
    import wandb  # heavy: only if requested
    from wandb.errors import AuthenticationError, UsageError

    arguments: dict[str, Any] = {"project": about.project, "name": about.name, "config": about.config}
    arguments |= {"dir": str(about.run_dir), "tags": list(about.tags)}
    arguments["settings"] = wandb.Settings(init_timeout=INIT_TIMEOUT_S)
    if resume_id:
        arguments |= {"id": resume_id, "resume": "allow"}
    try:
        run = wandb.init(**arguments)
    except (UsageError, AuthenticationError) as error:
        raise _cannot_start(error) from error
    except BaseException as error:  # whatever it is: training matters more
        reason = str(error).partition("\n")[0]
        say(
            f"warning: W&B's server does not answer ({reason}); the run is kept on disk. Send it later with: "
            f"wandb sync {about.run_dir}/wandb/*run-*"
        )
        run = wandb.init(**arguments, mode="offline")
    return WandbRun(run, about)


def check(project: str) -> None:
    """Raise `UserError` for a project name that W&B refuses, or if a login is missing for an online run.

    May ask for an API key in a terminal.
    """
    if wrong := [one for one in _NOT_IN_A_PROJECT if one in project]:
        raise UserError(
            f"--wandb-project {project}: W&B does not allow `{wrong[0]}` in a project name. Choose one without any of "
            f"{' '.join(_NOT_IN_A_PROJECT)}"
        )
    import wandb
    from wandb.errors import AuthenticationError, UsageError

    try:
        # The environment first: if the process has used W&B before, its settings are from then.
        if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in ("online", "shared"):
            wandb.login()
    except (UsageError, AuthenticationError) as error:
        raise _cannot_start(error) from error
    except Exception:  # a server that does not answer is handled when the run starts
        return


def _cannot_start(error: Exception) -> UserError:
    from wandb.errors import AuthenticationError

    is_login = isinstance(error, AuthenticationError) or "api key" in str(error).lower()
    advice = (
        "Log in with `wandb login`, or log to files only with WANDB_MODE=offline in the environment."
        if is_login
        else "Change the --wandb option that it names, or leave out --log-wandb and --tracker wandb."
    )
    return UserError(f"--tracker wandb: Weights & Biases cannot start: {error} {advice}")
