"""The bench `training`: measurements with the one compiled step of a run, one figure at a time.

The benches `step`, `end-to-end`, `augment` and `spectral` measure more, and compile their own steps. If `all` measures
several of these figures in one process, the run and its step are made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks import augment
from benchmarks.harness.limits import products_case
from benchmarks.harness.measure import Case, Result, Samples, environment, measure, nothing, reason_of
from benchmarks.step import timm_case
from benchmarks.training import run as training_room
from benchmarks.training.budget import ceilings_of, limits_ms
from benchmarks.training.end_to_end import held_case, measure_end_to_end
from benchmarks.training.kernels import profiled
from benchmarks.training.monitored import EVERY, MonitorOfBlocks
from benchmarks.training.run import TrainingRun, key_of, prepare, training_run
from lowrank_vit.common.devices import pick_device

Figure = Literal["prepare", "step", "end-to-end", "monitor", "augment", "kernels"]
TIMMS = "timm_step"
"""Name of timm's table of kernels."""
WARM_UP_STEPS = 20
"""Compiled steps before the first round, for compilation, autotuning and allocation."""
LIMITS = (
    "Ours normalises, mixes and erases in the step; timm's images are normalised and its targets soft before: its "
    "loader does that.",
    "timm's train.py as it stands takes AdamW without fused; it is given fused here, as --opt-kwargs fused=True does.",
)


@dataclass(frozen=True)
class Options(training_room.Options):
    """Options of the bench."""

    figure: Annotated[Figure, tyro.conf.arg(metavar="NAME")] = "step"
    """step, beside timm's; end-to-end, with data, beside without; monitor: a refresh every 10 updates, beside none;
    augment: the operations beside the step; kernels: where the time of the step and of a run goes; prepare: none, but
    the set is made, and on cuda the decoder's speeds are measured, for those that follow."""
    step_steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: --steps)")] = None
    """Steps a round in figures that read no data."""
    without_decoder: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """On cuda, leave out of end-to-end how fast the decoder alone is beside the step."""
    augment_batch: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by the device)")] = (
        None
    )
    """Images a batch in the figure augment; by default 1024 on cuda and 256 on a CPU."""
    augment_batches: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by the device)")
    ] = None
    """Batches a round in the figure augment; by default 60 on cuda and 8 on a CPU."""


def run(
    options: Options, note: Callable[[str], object] = nothing, keep: Callable[[Result], object] = nothing
) -> Result:
    """Measure the figure. Raises `UserError`."""
    if options.figure == "prepare":
        prepare(key_of(options), note)
        return Result("prepare", environment(pick_device(options.device).type), {}, {})
    with training_run(options, note) as training:
        steps = options.step_steps or training.load.steps
        if options.figure == "end-to-end":
            return measure_end_to_end(training, note, keep, decodes_alone=not options.without_decoder)
        if options.figure == "kernels":
            return _kernels(training, steps, note)
        cases, ratios, more = _FIGURES[options.figure](training, options, steps)
        surroundings = training.environment
        if options.figure == "step":  # so that it is not lost while timm's step is compiled
            ours = {name: case for name, case in cases.items() if name.startswith("ours")}
            keep(measure("step", ours, {}, environment=surroundings, repeats=1, warmup=0))
        result = measure(
            options.figure,
            cases,
            ratios,
            environment=surroundings,
            repeats=training.repeats,
            limits=LIMITS if options.figure == "step" else (),
            note=note,
            keep=keep,
        )
        return replace(result, extra={**training.about(steps), **more})


_Figure = tuple[dict[str, Case], dict[str, tuple[str, str]], dict[str, Any]]
"""Cases, ratios, and further sections."""


def _step(training: TrainingRun, options: Options, steps: int) -> _Figure:
    way = training.way
    cases = {
        f"ours_{way}": _ours(training, steps),
        f"timm_{way}": _timms(training, steps),
    }
    ratios = {f"{way}_vs_timm_{way}": (f"ours_{way}", f"timm_{way}")}
    if training.train_flops:
        items = training.load.batch_size * steps
        cases["product_limit"] = products_case(training.train_flops, items, "img/s", training.device, training.dtype)
        ratios |= {f"mfu_{name}": (name, "product_limit") for name in (f"ours_{way}", f"timm_{way}")}
    return cases, ratios, {}


def _monitor(training: TrainingRun, options: Options, steps: int) -> _Figure:
    setup = training.timed.trainer.setup
    beside, updates = MonitorOfBlocks(setup.model, setup.ema.module if setup.ema else None), 0

    def watched() -> None:
        nonlocal updates
        first = updates
        training.timed.held(steps, lambda n: beside.observe(first + n))
        updates += steps

    without = _ours(training, steps)
    setting = f"the same with a refresh every {EVERY} updates, model and EMA; the last one is waited for afterwards"
    cases = {
        "step": without,
        "step_with_monitor": replace(without, run=watched, setting=setting, before=beside.start, after=beside.stop),
    }
    return cases, {"with_monitor_vs_without": ("step_with_monitor", "step")}, {"refreshes": beside.figures}


def _augment(training: TrainingRun, options: Options, steps: int) -> _Figure:
    of_batch, of_round = augment.SIZES[training.device.type]
    batch, batches = options.augment_batch or of_batch, options.augment_batches or of_round
    cases = augment.our_cases(batch, batches, training.load.img_size, training.device)
    cases["step"] = _ours(training, steps)
    ratios = {
        "full_recipe_share_of_limit": ("full_recipe", "copy_limit"),
        "full_recipe_vs_step": ("full_recipe", "step"),
    }
    return cases, ratios, {"recipe": augment.RECIPE, "augment_batch": batch, "augment_batches": batches}


def _timms(training: TrainingRun, steps: int) -> Case:
    """Timm's step, which is compiled once per run."""
    if training.timms is None:
        make = partial(timm_case, training.load, training.device, training.way, training.config)
        training.timms = Case.of_peer(make)
    run = training.timms.run
    if not isinstance(run, partial):  # it could not be made, as its run will tell
        return training.timms
    return replace(training.timms, run=partial(run.func, steps), items=training.load.batch_size * steps)


def _ours(training: TrainingRun, steps: int) -> Case:
    setting = f"{training.setting}, loss meter; images normalised, mixed and erased in the step"
    warm_up = partial(training.timed.held, WARM_UP_STEPS) if training.way == "compiled" else nothing
    return replace(held_case(training, setting, steps), first=warm_up)


_FIGURES: dict[str, Callable[[TrainingRun, Options, int], _Figure]] = {
    "step": _step,
    "monitor": _monitor,
    "augment": _augment,
}


def _kernels(training: TrainingRun, steps: int, note: Callable[[str], object]) -> Result:
    """Profile steps: tables in the section `kernels`, their sums as cases, and the budget of a step."""
    timed, device = training.timed, training.device
    note("profiling the step")
    timed.held(WARM_UP_STEPS if training.way == "compiled" else 1)
    tables = {"step": profiled(partial(timed.held, steps), steps, device)}
    note("profiling timm's step")
    failed = dict[str, str]()
    timms = _timms(training, steps)
    try:
        timms.first()
        tables[TIMMS] = profiled(timms.run, steps, device)
    except Exception as error:  # a peer's code
        failed[TIMMS] = reason_of(error)
    note("profiling the run")
    around = timed.before, timed.after
    tables["end_to_end"] = profiled(timed.run, training.load.steps, device, *around)
    what = "kernels and copies of the device" if device.type == "cuda" else "torch's operators on the host"
    cases = {
        name: Samples((table["ms"],), "ms/step", f"all {what}, of {table['steps']} steps")
        for name, table in tables.items()
    }
    limits = (
        f"One profile each, of {what}. What runs on several streams at once counts for each of them.",
        "Shares are of a step's time by the clock, as it takes without a profile.",
    )
    limit = None
    if training.dtype is torch.bfloat16:  # the limits are for bfloat16
        limit = limits_ms(timed.trainer.setup.model, training.load.batch_size, ceilings_of(device))
    groups = {name: table["groups"] for name, table in tables.items()}
    shown = {"limit": limit, "timm": groups.get(TIMMS), "ours": groups["step"]}
    extra = {**training.about(steps), "kernels": tables, "budget": shown}
    return Result("kernels", training.environment, cases, {}, limits, extra, failed, frozenset(failed))
