"""Starting a run (new, from --resume, or from an earlier attempt's checkpoint), and saving its state for that."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import kind_of, leaves, may_change, with_options, word_for_none
from lowrank_vit.config.options import Config, Optim
from lowrank_vit.config.tracking_options import trackers
from lowrank_vit.lowrank.switching.groups import regroup
from lowrank_vit.model.hub import find_model, is_of, source_of, with_source
from lowrank_vit.model.lora import KEY as LORA
from lowrank_vit.model.lora import lora_of
from lowrank_vit.model.low_rank import ranks_of
from lowrank_vit.model.optimizer import epochs_in_all
from lowrank_vit.model.weights import BETTER, LOWRANK_RANKS, Checkpoint, read_checkpoint
from lowrank_vit.ranks.world import World
from lowrank_vit.run.checkpoints import IS_FINITE
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.metrics import NEVER, last_recorded
from lowrank_vit.run.outputs import SPECTRA
from lowrank_vit.run.state import RunState
from lowrank_vit.spectral.watching.store import SpectraStore
from lowrank_vit.training import launch
from lowrank_vit.training.loading import LOADERS
from lowrank_vit.training.saved_state import LOW_RANK, check_counts, check_state, load_optimizer
from lowrank_vit.training.setup import Setup, silent

_DECIDING = ("spec-monitor", "spec-every", "spec-full-every", "spec-targets", "spec-split-qkv", "spec-on-cpu")
"""The monitor's options that decide when --lowrank-train factorises layers."""


@dataclass(frozen=True)
class Start:
    """The start of a run, agreed on by all ranks before setup."""

    config: Config
    """Options, with --resume set if an earlier attempt has left a checkpoint, and with the meaning of an older run."""
    resumed: Checkpoint | None
    earlier: Path | None
    """The directory of an earlier attempt, to be reused."""
    names: list[str]
    """The names by which a restart recognises this launch, see `launch.py`; empty without torchrun."""


def find_start(config: Config, world: World) -> Start:
    """Find where the run starts: rank 0 looks and tells the others. Raises `UserError`."""
    run = config.run
    world.progress.enter("looking for a checkpoint")
    names = launch.names(world)
    earlier = None
    if world.is_first and names:
        earlier = launch.earlier_folder(run.output, run.experiment, run.resume, names)
    own = launch.own_checkpoint(earlier) if earlier else None
    resume, earlier = world.from_first((own or run.resume, earlier))
    if world.is_first and not resume and not earlier:
        RunDir.require_free(run.output, run.experiment)  # before converting data in vain
    config = replace(config, run=replace(run, resume=resume))
    resumed = _read_alike(resume, world) if resume else None
    if source_of(config.model.model):
        kept = resumed.args if resumed else {}
        is_known = is_of(config.model.model, str(kept.get("model-from", "")))
        flags = kept if is_known else find_model(config.model.model).flags() if world.is_first else None
        config = with_source(config, world.from_first(flags))
    if resumed:
        config = as_resumed(config, resumed, terminal.say if world.is_first else silent)
    return Start(config, resumed, earlier, names)


def finished(start: Start, world: World) -> tuple[RunState, int] | None:
    """The state of a finished run and its number of epochs; None if anything is left to do.

    Rank 0 looks and tells the others. A run with W&B, or with an interrupted refresh of the spectra, counts as
    unfinished.
    """
    resumed, config, done = start.resumed, start.config, None
    if world.is_first and resumed and "wandb" not in trackers(config.tracking):
        check_state(resumed)
        state = RunState()
        updates = resumed.training_state("step")["num_updates"]
        state.load_state_dict(resumed.training_state("progress"), updates)
        updates_per_epoch = updates // max(1, state.position.epoch)
        num_epochs = epochs_in_all(config.optim, updates_per_epoch)
        if state.position.epoch >= num_epochs:
            check_counts(resumed, updates_per_epoch)
        if state.position.epoch >= num_epochs and not _has_spectra_to_do(config, resumed.path.parent, updates):
            run_dir = RunDir.reopen(resumed.path.parent)  # nobody else uses it; unfinished files are removed
            if start.earlier == resumed.path.parent:  # so that this attempt's next run is told from this one
                run_dir.write_text(launch.MARK, launch.mark(run_dir.path, start.names))
            run_dir.close()
            done = state, num_epochs
    return world.from_first(done)


def _has_spectra_to_do(config: Config, folder: Path, updates: int) -> bool:
    kept = SpectraStore(folder / SPECTRA, 0).kept_update(updates)
    return config.spectra.spec_monitor and kept > last_recorded(folder, "spec", updates)


def _read_alike(path: Path, world: World) -> Checkpoint:
    """Read the checkpoint, which must be the same file on every rank. Raises `UserError`."""
    advice = "It must be on a disk that all nodes see: choose --output or --resume there."
    resumed = read_checkpoint(path) if world.is_first else None
    expected = world.from_first(_size_and_updates(path, resumed) if resumed else None)
    if resumed:
        return resumed
    try:
        resumed = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"On {socket.gethostname()}: {error} Rank 0 could read that file. {advice}") from error
    found = _size_and_updates(path, resumed)
    if found != expected:
        raise UserError(
            f"{path} on {socket.gethostname()} is not the file that rank 0 has read: (bytes, updates) are {found} "
            f"here and {expected} there. {advice}"
        )
    return resumed


def _size_and_updates(path: Path, checkpoint: Checkpoint) -> tuple[int, int]:
    step = checkpoint.content.get("step")
    return path.stat().st_size, step.get("num_updates", -1) if isinstance(step, dict) else -1


def open_run_dir(start: Start, default_name: str) -> RunDir:
    """Open or create the run directory, on rank 0. Raises `UserError`."""
    run = start.config.run
    folder = start.resumed.path.parent if start.resumed else start.earlier
    run_dir = RunDir.reopen(folder) if folder else RunDir.create(run.output, run.experiment, default_name)
    if start.names:
        run_dir.write_text(launch.MARK, launch.mark(run_dir.path, start.names))
    if not start.resumed:
        run_dir.forget()
    return run_dir


def capture(setup: Setup, state: RunState) -> dict[str, Any]:
    """Make a checkpoint's content in timm's layout, only tensors and plain values (loads with `weights_only=True`).

    Call it between two updates, on all ranks together. All get the same, except for statistics of normalisation.
    """
    step, position, config = setup.step.state_dict(), state.position, setup.config
    content: dict[str, Any] = {
        "version": 2,  # version of timm's layout
        meaning.KEY: meaning.now(),
        "arch": config.model.model,
        "epoch": position.epoch - 1,  # the last finished epoch
        "state_dict": setup.model.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "metric": state.best.best_metric,
        BETTER: state.best.better,
        "progress": state.state_dict(),
        "step": {"num_updates": position.num_updates, **step},
        IS_FINITE: _is_finite(setup) & (step["meter"]["bad_update"] == NEVER),
        # The loader's position, now or when it is next asked: an epoch at its end is not yet finished.
        "data": {**setup.train_loader.state_dict(), "epoch": position.epoch, "update": position.updates_done},
        LOADERS: {"train": setup.train_loader.name, **({"val": setup.val_loader.name} if setup.val_loader else {})},
        "num_classes": setup.num_classes,
        "class_names": setup.class_names,
        **({"val_samples": setup.val_loader.plan.num_samples} if setup.val_loader else {}),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(setup.spec).items()},
        "args": {name: _plain(value) for name, _, value in leaves(config)},
    }
    if ranks := ranks_of(setup.model):
        content[LOWRANK_RANKS] = ranks
    if lora := lora_of(setup.model):
        content[LORA] = lora.content()
    if setup.ema:
        content["state_dict_ema"] = setup.ema.module.state_dict()
    if setup.low_rank:
        content[LOW_RANK] = setup.low_rank.state_dict()
    return content


@torch.no_grad()
def _is_finite(setup: Setup) -> Tensor:
    """Whether weights, EMA and optimizer are finite: a bool tensor () on the device, computed asynchronously."""
    tensors = [*setup.model.parameters(), *(setup.ema.module.parameters() if setup.ema else ())]
    states = (value for state in setup.optimizer.state.values() for value in state.values())
    tensors += [value for value in states if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]
    return torch.nn.utils.get_total_norm(tensors).isfinite()


def as_resumed(config: Config, resumed: Checkpoint, say: Callable[[str], object]) -> Config:
    """`config` with the values that options newer than the run need to keep the run's own meaning.

    Only options at their defaults are changed, and `say` reports each. Raises `UserError` for options of another run,
    and if this program cannot continue the run as it began.
    """
    resumed.training_state("args")
    number, args = resumed.meaning, resumed.checked_args()
    meaning.check_can_go_on(number, args, str(resumed.path))
    before, usual = meaning.values_before(number, args), {name: value for name, _, value in leaves(Config())}
    given = {name: value for name, _, value in leaves(config)}
    for change in meaning.changes_since(number, args):
        old = {name: before[name] for name in change.before if name not in args and given[name] == usual[name]}
        config = with_options(config, old)
        if old:
            values = ", ".join(f"--{name} {_plain(value)}" for name, value in old.items())
            say(f"note: {resumed.path} is from an older run: {change.what}. It continues as it began: {values}")
    left_open = [
        name
        for name, hint, value in leaves(config)
        if value is None and (kind_of(hint).element is bool or word_for_none(hint))
    ]
    config = with_options(config, {name: args[name] for name in left_open if name in args})  # what the run has chosen
    _check_same_run(config, resumed)
    return config


def restore(setup: Setup, state: RunState, resumed: Checkpoint) -> None:
    """Restore all state except weights and EMA, which the setup has. Raises `UserError` before anything is used."""
    check_state(resumed)
    check_counts(resumed, setup.plan.updates_per_epoch)
    try:
        groups = resumed.training_state("optimizer").get("param_groups")
        regroup(setup.optimizer, setup.scheduler, setup.model, groups if isinstance(groups, list) else [])
    except UserError as error:
        raise UserError(f"{resumed.path} cannot be resumed: {error}") from error
    load_optimizer(setup.optimizer, resumed)
    progress, step = resumed.training_state("progress"), resumed.training_state("step")
    state.load_state_dict(progress, step["num_updates"])
    try:
        setup.step.load_state_dict(step)
        setup.train_loader.load_state_dict(resumed.training_state("data"))
    except UserError as error:
        raise UserError(f"{resumed.path}: {error}") from error
    if setup.low_rank:
        setup.low_rank.load_state_dict(resumed.training_state(LOW_RANK))
    # Within an epoch, the optimizer's saved learning rates are those of the interrupted run, to the bit.
    if state.position.updates_done == 0:
        setup.scheduler.step(state.position.epoch)
    setup.scheduler.step_update(state.position.num_updates)


def _check_same_run(config: Config, resumed: Checkpoint) -> None:
    """Raise `UserError` for options that would make it another run: the optimizer's state belongs to the old ones."""
    usual = {
        name: _plain(value) for name, _, value in leaves(Config())
    }  # the meaning of an option that the run did not know
    args = {**usual, **meaning.values_before(resumed.meaning, resumed.args), **resumed.args}
    is_low_rank = config.lowrank.lowrank_train != "none"
    follows = _has_shortened_warmup(config.optim, args)
    changed = [
        f"--{name} was {args[name]}, now {_plain(value)}"
        for name, hint, value in leaves(config)
        if (not may_change(hint) or (is_low_rank and name in _DECIDING)) and args[name] != _plain(value)
        if not (name == "warmup-epochs" and follows)
    ]
    if changed:
        raise UserError(
            f"{resumed.path} belongs to a run with other options: {'; '.join(changed)}. Resume with the run's "
            f"own (--config {resumed.path.parent / 'args.yaml'}), or start a new run from its weights with "
            "--initial-checkpoint."
        )


def _has_shortened_warmup(now: Optim, args: dict[str, Any]) -> bool:
    """Whether the run and this command have the same --warmup-epochs, except that few --epochs have shortened it.

    The longer of the two is the requested one; the other was shortened by a smaller number of epochs.
    """
    before, epochs = args["warmup-epochs"], args["epochs"]
    if now.warmup_prefix or not isinstance(before, int) or not isinstance(epochs, int):
        return False
    asked = max(before, now.warmup_epochs)
    return (before, now.warmup_epochs) == (min(asked, epochs - 1), min(asked, now.epochs - 1))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
