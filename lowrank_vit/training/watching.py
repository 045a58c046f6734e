"""The spectral monitor of a run, and the switches to low rank that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lowrank_vit.config.tracking_options import trackers
from lowrank_vit.data.decode.resident_set import free_bytes
from lowrank_vit.model.flops import train_flops_per_image
from lowrank_vit.ranks.world import World
from lowrank_vit.run.metrics import last_recorded
from lowrank_vit.run.outputs import SPECTRA, Outputs
from lowrank_vit.run.spectral_records import Preparing, expected_held, expected_sizes, held_in_words, sizes_in_words
from lowrank_vit.run.state import Position
from lowrank_vit.spectral.watching.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from lowrank_vit.training.setup import Setup

_REFRESH_TIMEOUT = timedelta(minutes=10)
"""How long to wait for the spectra of a rank that hangs."""


def make_monitor(
    setup: Setup, position: Position, run_dir: Path, world: World, say: Callable[[str], object]
) -> SpectralMonitor:
    """The monitor of a run, which continues from `position`; connected to --lowrank-train if that is on."""
    options, tracking, low_rank = setup.config.spectra, setup.config.tracking, setup.low_rank
    done = position.num_updates if position.is_begun else None
    recorded = -1 if done is None else last_recorded(run_dir, "spec", done)
    threads, full_every = options.spec_cpu_threads or default_cpu_threads(), options.spec_full_every or 1
    numbers = options.spec_topk, options.spec_interval, options.spec_solver, options.spec_on_cpu, threads
    monitor = SpectralMonitor(
        setup.model,
        setup.ema.module if setup.ema else None,
        targets=options.spec_targets,
        every=options.spec_every,
        store_dir=run_dir / SPECTRA,
        settings=SpectralSettings(*numbers, full_every, options.spec_updates),
        split_qkv=options.spec_split_qkv,
        circuits=options.spec_circuits,
        limit_gb=options.spec_store_gb,
        resumed_update=done,
        recorded_update=world.from_first(recorded),
        last_update=setup.num_epochs * setup.plan.updates_per_epoch,
        ranks=world.channel(_REFRESH_TIMEOUT, agrees=True),
        optimizer=setup.optimizer,
        on_full=low_rank.see if low_rank else None,
        prepare=Preparing(options.spec_log, tracking.wandb_spec if trackers(tracking) else None),
        say=say,
    )
    if low_rank:
        low_rank.wait = monitor.wait
    weight = next(setup.model.parameters())
    of_ranks: dict[str, Any] = {"ranks": world.size, "is_first": world.is_first, "updates": options.spec_updates}
    of_records = options.spec_topk, options.spec_interval
    held = expected_held(monitor.matrices, 2 if setup.ema else 1, weight.element_size(), *of_records, **of_ranks)
    if warning := held_in_words(held, free_bytes(weight.device), str(weight.device)):
        say(warning)
    return monitor


def size_of_records(monitor: SpectralMonitor | None, setup: Setup) -> list[str]:
    """A line about the size of all spectral records of the run; none without a monitor."""
    if monitor is None:
        return []
    options = setup.config.spectra
    kinds, indices = 2 if setup.ema else 1, (options.spec_topk, options.spec_interval)
    sizes = expected_sizes(monitor.matrices, kinds, *indices, options.spec_full_every or 1, options.spec_log)
    refreshes = setup.num_epochs * setup.plan.updates_per_epoch // options.spec_every + 1
    told = refreshes, kinds * len(monitor.matrices), options.spec_store_gb, options.spec_log
    return [sizes_in_words(sizes, *told)]


def observe(monitor: SpectralMonitor, setup: Setup, outputs: Outputs, update: int) -> bool:
    """Start a refresh of the spectra if one is due, after acting on the previous refresh; log both.

    Returns whether the model has changed by a switch.
    """
    is_changed = False
    if setup.low_rank and monitor.is_due(update):
        is_changed = setup.low_rank.at_refresh(update)
        after_switch(setup, outputs, is_changed=is_changed)
    monitor.observe(update)
    outputs.log_spectra(monitor.prepared_records())
    return is_changed


def after_switch(setup: Setup, outputs: Outputs, *, is_changed: bool) -> None:
    """Count the model's FLOPs again if it `is_changed`, and log the events."""
    assert setup.low_rank
    if is_changed:
        setup.train_flops = train_flops_per_image(setup.model, setup.spec.img_size)
    outputs.log_low_rank(setup.low_rank.events())


class SwitchSpeed:
    """Images per second before and after a switch, reported after the first log interval without compilation."""

    def __init__(self) -> None:
        self._newest: float | None = None
        self._switch: tuple[int, float | None] | None = None

    def begin(self, update: int) -> None:
        """Note a switch at update `update`."""
        self._switch = update, self._newest

    def see(self, img_per_s: float) -> tuple[dict[str, Any], str] | None:
        """Note a warm interval's speed. For the first one after a switch, returns numbers and a line for the log."""
        switch, self._switch, self._newest = self._switch, None, img_per_s
        if switch is None:
            return None
        update, before = switch
        line = f"after the switch at {update}: {img_per_s:,.0f} img/s{f', before {before:,.0f}' if before else ''}"
        return {"switch": update, "img_per_s_before": before, "img_per_s": img_per_s}, line


def finish_spectra(monitor: SpectralMonitor, outputs: Outputs) -> None:
    """Wait for the last refresh, log it, and report skipped and failed refreshes."""
    monitor.close()
    outputs.log_spectra(monitor.prepared_records())
    say = outputs.display.say  # rank 0 has the figures of all ranks
    if monitor.skipped:
        say(
            f"{_counted(monitor.skipped)} skipped because the previous one was still running; a larger --spec-every "
            "avoids this"
        )
    if monitor.failed:
        say(f"{_counted(monitor.failed)} not finished; the first error is above. Training missed nothing")


def _counted(refreshes: int) -> str:
    return "1 spectral refresh was" if refreshes == 1 else f"{refreshes} spectral refreshes were"
