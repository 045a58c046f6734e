"""`python -m lowrank_vit.train`: train a ViT from `.beton` files and watch its spectra."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import CONFIGS, bundled_names, check_versions, pasteable_command, usage_name
from lowrank_vit.common.terminal import duration, output_is_in_files, say
from lowrank_vit.config.flags import parse, without_seeds
from lowrank_vit.config.option_types import leaves
from lowrank_vit.config.options import Config
from lowrank_vit.config.timm_flags import with_long_names

if TYPE_CHECKING:
    from lowrank_vit.ranks.failing import Failing
    from lowrank_vit.ranks.world import World
    from lowrank_vit.training.trainer import Result


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, and print the result and the next steps. Under torchrun: one of the ranks."""
    argv = sys.argv[1:] if argv is None else argv
    config = None if "WORLD_SIZE" in os.environ else _read(argv)  # before torch is loaded, which takes seconds
    if config and config.run.seeds:
        _train_series(argv, config)
        return
    from lowrank_vit.ranks.failing import as_rank

    as_rank(lambda world, failing: _train(argv, config or _read(argv), world, failing))


def _read(argv: list[str]) -> Config:
    if not argv and not Path("data").exists():
        others = ", ".join(name for name in bundled_names(CONFIGS) if name != "quickstart")
        raise UserError(
            "Nothing says what to train on. Give a ready-made run, --config quickstart (also: "
            f"{others}); or your images, --data-dir DIR with train/CLASS/ and val/CLASS/ in it; or --dataset digits, "
            "which comes with the program. --help lists all options."
        )
    config = parse(argv, usage_name("lowrank_vit.train"))
    if config.run.seeds and "WORLD_SIZE" in os.environ:
        raise UserError(
            "--seeds starts one run after another, each in a process of its own, and torchrun has started the ranks of "
            "one run. Start torchrun once for each: --seed N --experiment NAME-seedN; `report` on all of them compares."
        )
    check_versions()
    return config


def _train_series(argv: list[str], config: Config) -> None:
    """One run for each of --seeds, then their scores. Exits with the code of the first run that failed."""
    from lowrank_vit.report.compare.scores import read_scores, table_of_seeds
    from lowrank_vit.report.status import Step, shown
    from lowrank_vit.training.series import own_command, run_series, unused_name

    output_is_in_files()
    seeds, output = config.run.seeds or (), config.run.output
    name = config.run.experiment or unused_name(output, default_name(argv, config), seeds)
    plain = without_seeds(argv)
    command = [*own_command(argv, "lowrank_vit.train"), *plain]

    def is_done(run: Path) -> bool:
        status = read_scores(run).status
        return status is not None and status.is_finished

    done = run_series(config, command, name, is_done)
    whole = [run for run in done.runs if not run.exit_code and is_done(run.path)]
    if whole and (table := table_of_seeds([run.seed for run in whole], [run.path for run in whole])):
        say("\n".join(["", f"{len(whole)} of {len(seeds)} seeds; sd: standard deviation (n - 1)", "", *table]))
    steps: list[Step] = []
    if len(whole) > 1:
        compared = (shown(run.path) for run in whole)
        steps.append(Step("Draw them side by side", (pasteable_command("lowrank_vit.report"), *compared)))
    if len(whole) < len(seeds):
        again = [*map(shlex.quote, plain), f"--seeds {' '.join(map(str, seeds))}"]
        again += [] if config.run.experiment else [f"--experiment {shlex.quote(name)}"]
        steps.append(Step("Go on with the series", (pasteable_command("lowrank_vit.train"), *again)))
    if done.stopped_by:
        say(f"\nthe series was stopped by {done.stopped_by}; {len(whole)} of {len(seeds)} runs are finished")
    for run in done.failed:
        say(f"the run with seed {run.seed} has failed (exit code {run.exit_code}): {run.path}")
    if steps:
        say("\n".join(["", "next:", *(step.command("  ") for step in steps)]))
    if done.failed:
        code = done.failed[0].exit_code
        sys.exit(code if code > 0 else 1)


def _train(argv: list[str], config: Config, world: World, failing: Failing) -> None:
    from lowrank_vit.common.devices import pick_device
    from lowrank_vit.ranks.joining import joined
    from lowrank_vit.ranks.records import run_record
    from lowrank_vit.ranks.signs import Limits
    from lowrank_vit.training.stop import NO_LAUNCHER
    from lowrank_vit.training.trainer import train

    output_is_in_files()
    device = pick_device(config.step.device, world.local_rank)
    limits = Limits(config.run.rank_timeout, config.run.init_timeout)
    with joined(world, device, lambda: run_record(config, device), limits), failing.watched(limits):
        result = train(config, default_name(argv, config), world, failing)
        if world.is_first:
            say(_farewell(result, config, world))
    if result.stopped_by == NO_LAUNCHER or (result.stopped_by and failing.has_lost_launcher):
        sys.exit(1)  # so that another node's torchrun, if it still runs, restarts the run
    is_own_process = multiprocessing.parent_process() is None  # else a Python parent waits for our result
    if result.is_repeated and os.environ.get("TORCHELASTIC_RUN_ID") and is_own_process:
        # The run was finished when torchrun restarted this. Whatever ended the earlier attempt, even at the
        # interpreter's exit, must not fail the launch.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def default_name(argv: list[str], config: Config) -> str:
    """How a run directory's name begins: the configuration file's name, else the model's."""
    argv = with_long_names(argv)
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag == "--config":
            return Path(value).stem
        if flag.startswith("--config="):
            return Path(flag).stem
    of_hub = re.split(r"[:/@]", config.model.model.rstrip("/"))  # hf-hub:OWNER/NAME@COMMIT, local-dir:DIR
    return config.model.model if len(of_hub) == 1 else of_hub[2 if config.model.model.startswith("hf") else -1]


def _farewell(result: Result, config: Config, world: World) -> str:
    from lowrank_vit.report.status import next_steps, shown
    from lowrank_vit.report.switching.read import in_words, read_switching

    run = result.run_dir
    args = {name: value for name, _, value in leaves(config)}
    launcher = "torchrun ..." if world.size > 1 else ""
    steps = next_steps(run, args, is_finished=not result.stopped_by, launcher=launcher)
    if result.stopped_by:
        heading = f"stopped by {result.stopped_by} after update {result.num_updates}; everything is saved"
    elif result.best is None:
        heading = f"{result.num_updates} updates" + ("" if result.is_repeated else f" in {duration(result.train_s)}")
    else:
        how_long = "" if result.is_repeated else f", {duration(result.train_s)} of training"
        heading = "\n".join([f"{_best(result)}{how_long}", *_whose(result)])
    if config.lowrank.lowrank_train != "none" and (switching := read_switching(run)):
        heading = "\n".join([heading, *in_words(switching)])
    there = (f"    {name:<20}{what}" for name, pattern, what in _FILES if any(run.glob(pattern)))
    commands = (step.command("  ") for step in steps)
    return "\n".join(["", heading, "", f"  {shown(run)}/", *there, "", "next:", *commands])


_FILES = (
    ("args.yaml", "args.yaml", "every option; --config on it repeats the run"),
    ("metrics.jsonl", "metrics.jsonl", "numbers of training and validation, means of spectra"),
    ("summary.csv", "summary.csv", "one row an epoch"),
    ("spectra/", "spectra/*.npz", "spectra and every number of them, files for each refresh"),
    ("last.pth.tar", "last.pth.tar", "to resume from"),
    ("model_best.pth.tar", "model_best.pth.tar", "the best weights"),
    ("tensorboard/", "tensorboard/*/events.*", "the numbers for TensorBoard"),
    ("mlflow/", "mlflow/mlflow.db", "the numbers for MLflow"),
    ("wandb/", "wandb/run-*", "sent to Weights & Biases"),
    ("wandb/", "wandb/offline-run-*", "kept for Weights & Biases, not sent yet"),
)
"""A run's files: the name, a pattern that finds them, and their use."""


def _best(result: Result) -> str:
    name, percent = ("loss", "") if result.metric == "loss" else (result.metric.replace("top", "top-"), " %")
    return f"{name} {result.best:.4g}{percent} (best, epoch {result.best_epoch + 1})"


def _whose(result: Result) -> list[str]:
    """A line about both scores of the best epoch, if there is an EMA."""
    if "ema" not in result.best_scores:
        return []
    percent = "" if result.metric == "loss" else " %"
    own, ema = (f"{result.best_scores[weights]:.4g}{percent}" for weights in ("model", "ema"))
    if result.best_scores["ema"] == result.best:
        return [f"of the EMA's weights; the model's own have {own}"]
    return [f"of the model's own weights; the EMA's have {ema}"]


if __name__ == "__main__":
    exit_cleanly(main)
