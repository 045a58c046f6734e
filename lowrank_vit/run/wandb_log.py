"""Weights & Biases: a copy of the run's numbers that never holds the run up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import Failures, UserError
from lowrank_vit.common.terminal import printable
from lowrank_vit.common.threads import Jobs

INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 120.0
"""Time for the last uploads; after that the files on disk are complete and can be sent later."""


AXES = {
    "epoch": ("train_loss", "lr", "img_per_s", "data_wait", "data_wait_rank", "eval_*"),
    "update": ("train/*",),
    "spec_update": ("spec/*", "spec_ema/*"),
}
"""The axis of each metric. No name fits two patterns: W&B would take any of them, another one in each run."""


class WandbLog:
    """One W&B run. Once its server or its library fails, that is said, and no more is sent.

    Names: what timm's training script logs once an epoch keeps its names (`train_loss`, `eval_top1`, `lr`), against
    `epoch`; each log interval is under `train/...` against `update`; spectra are under `spec/...` and `spec_ema/...`
    against `spec_update`, since they are finished some updates after the weights were copied.
    """

    def __init__(self, run: Any, run_dir: Path, say: Callable[[str], object]) -> None:
        """`run`: a W&B run, None for nothing; `say` is told when something goes wrong."""
        self._run, self._run_dir, self._say = run, run_dir, say
        self.run_id: str = run.id if run else ""
        """Identifier with which a resumed run goes on."""
        self._failures = Failures("lines were not sent to W&B", say)
        for axis, names in AXES.items() if run else ():
            self._call("define_metric", axis)
            for name in names:
                self._call("define_metric", name, step_metric=axis)

    @classmethod
    def start(
        cls,
        project: str,
        run_dir: Path,
        config: dict[str, Any],
        *,
        tags: tuple[str, ...] = (),
        resume_id: str = "",
        say: Callable[[str], object] = terminal.say,
        init_timeout_s: float = INIT_TIMEOUT_S,
    ) -> WandbLog:
        """Start a run, or go on with the one of `resume_id`.

        Where the server does not answer the run is kept on disk (W&B's offline mode); where that fails, too, that is
        said and nothing is sent. Raises `UserError` without a login, which would otherwise be noticed only after the
        training.
        """
        import wandb  # heavy: only where asked for
        from wandb.errors import AuthenticationError, UsageError

        # Absolute, since W&B's service is a process of its own, which may have been started in another folder.
        where = str(run_dir.absolute())
        named = _plain({"project": project, "name": run_dir.name, "config": config, "tags": list(tags)})
        arguments: dict[str, Any] = {"dir": where, "settings": wandb.Settings(init_timeout=init_timeout_s), **named}
        if resume_id:
            arguments |= {"id": resume_id, "resume": "allow"}
        try:
            run = wandb.init(**arguments)
        except (UsageError, AuthenticationError) as error:
            raise _cannot_start(error) from error
        except Exception as error:  # whatever it is: training matters more
            reason = str(error).partition("\n")[0]
            say(f"warning: W&B's server does not answer ({reason}); the run is kept on disk. {_sync_advice(run_dir)}")
            try:
                run = wandb.init(**arguments, mode="offline")
            except Exception as offline_error:  # whatever it is: training matters more
                say(f"warning: W&B cannot keep the run on disk either ({offline_error}); it goes on without W&B.")
                run = None
        return cls(run, run_dir, say)

    def log(self, values: dict[str, Any]) -> None:
        """Send values; one of them is the axis."""
        self._call("log", values)

    def _call(self, method: str, *args: Any, **options: Any) -> None:
        if self._run is None:
            self._failures.count += self._failures.count > 0
            return
        try:
            getattr(self._run, method)(*args, **options)
        except Exception as error:  # whatever it is: training matters more
            self._run = None
            self._failures.note(
                f"W&B failed ({error}); logging to files goes on without it. {_sync_advice(self._run_dir)}"
            )

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """Send what is left, for at most `timeout_s`."""
        self._failures.tell()
        if self._run is None:
            return
        failures: list[BaseException] = []

        def finish(run: Any) -> None:
            try:
                run.finish()
            except BaseException as error:  # SystemExit, too: training matters more
                failures.append(error)

        jobs: Jobs[Any] = Jobs(finish, lambda _, error: failures.append(error), "wandb-finish")
        jobs.put(self._run)
        self._run = None
        jobs.close(timeout_s)
        if jobs.is_busy or failures:
            reason = failures[0] if failures else f"not done after {timeout_s:.0f} s"
            self._say(f"warning: W&B could not send everything ({reason}). {_sync_advice(self._run_dir)}")


def _plain(value: Any) -> Any:
    """The same with text that W&B can send: a name may hold bytes that are not UTF-8."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def check_login() -> None:
    """Raise `UserError` where a run would be sent to W&B's server without a login. May ask for a key in a terminal."""
    import wandb
    from wandb.errors import AuthenticationError, UsageError

    try:
        # The environment first: in a process that has used W&B before, its settings are of then.
        if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in ("online", "shared"):
            wandb.login()
    except (UsageError, AuthenticationError) as error:
        raise _cannot_start(error) from error
    except Exception:  # a server that does not answer is met when the run starts
        return


def _cannot_start(error: Exception) -> UserError:
    from wandb.errors import AuthenticationError

    is_login = isinstance(error, AuthenticationError) or "api key" in str(error).lower()
    advice = (
        "Log in with `wandb login`, or log to files only with WANDB_MODE=offline in the environment."
        if is_login
        else "Change the --wandb option that it names, or leave --log-wandb out."
    )
    return UserError(f"--log-wandb: Weights & Biases cannot start: {error} {advice}")


def _sync_advice(run_dir: Path) -> str:
    return f"Send it later with: wandb sync {run_dir}/wandb/*run-*"
