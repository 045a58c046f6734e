"""The bench `end-to-end`: training from a .beton with the full recipe, split into the phases of a step.

The loop is the trainer's own, with a listener. It is compared with the same step on a batch that stays on the device
and, on CUDA, with the decoder alone while that step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.harness.limits import products_case
from benchmarks.harness.measure import Case, Result, Samples, measure, nothing
from benchmarks.training.decoding import DecodingBeside
from benchmarks.training.run import AUGMENTATION, Options, TrainingRun, training_run
from benchmarks.training.timed_steps import PHASES, Phases, Round, batches_ahead

LIMITS = (
    "A round is a stretch of one epoch of one run, from where the decoder's queue is steady, with one line of the log; "
    "no checkpoint, validation or beginning of an epoch is in it.",
    "On a CPU the augmentation is in the trainer's thread; on CUDA it runs beside the step before, on the loader's "
    "stream, so its time is not part of the step's.",
    "forward: normalising, mixing, model and loss; optimizer: with clipping and zero_grad; other: the rest of "
    "the loop, the seeding of the step, the meter, the schedule and the log.",
)


def run(
    options: Options, note: Callable[[str], object] = nothing, keep: Callable[[Result], object] = nothing
) -> Result:
    """Measure both cases and the phases.

    The result also has the sections workload, shares (of the step's time, 0-1), bottleneck, queue (waiting decoded
    batches, by round) and refreshes (of the spectra, by round). Raises `UserError`.
    """
    with training_run(options, note) as training:
        return measure_end_to_end(training, note, keep)


def measure_end_to_end(
    training: TrainingRun,
    note: Callable[[str], object] = nothing,
    keep: Callable[[Result], object] = nothing,
    *,
    decodes_alone: bool = True,
) -> Result:
    """As `run`, for an existing run; on CUDA also the decoder alone, unless `decodes_alone` is False."""
    load, timed, device = training.load, training.timed, training.device
    spectra = f"every {training.spec_every} updates" if training.spec_every else "once a round"
    is_watched = timed.trainer.config.spectra.spec_monitor
    watched = f"--spec-monitor, a refresh {spectra}" if is_watched else "--no-spec-monitor"
    real = f"{' '.join(AUGMENTATION)} {watched}"
    repeated = f"the set {training.times} times over; " if training.times > 1 else ""
    real = f"{timed.trainer.setup.description}; {repeated}{real}; {load.steps} steps a round"
    cases = {
        "end_to_end": Case(timed.run, training.items, "img/s", real, timed.before, timed.after),
        "synthetic": held_case(training, f"the same on one batch that stays, no monitor: {training.setting}"),
    }
    ratios = {"end_to_end_vs_synthetic": ("end_to_end", "synthetic")}
    beside = None
    if decodes_alone and device.type == "cuda" and timed.trainer.setup.train_loader.name != "resident":
        beside = DecodingBeside(training)
        cases["decoder_beside_step"] = beside.case()
    if training.train_flops:
        cases["product_limit"] = products_case(training.train_flops, training.items, "img/s", device, training.dtype)
        ratios["mfu_end_to_end"] = ("end_to_end", "product_limit")
    with closing(beside) if beside else nullcontext():
        result = measure(
            "end-to-end",
            cases,
            ratios,
            environment=training.environment,
            repeats=training.repeats,
            limits=LIMITS,
            note=note,
            keep=lambda so_far: keep(_with_smaller(so_far)),
        )
    result = _with_smaller(result)
    overlaps = frozenset({"augment"} if device.type == "cuda" else ())
    rounds = timed.rounds[-training.repeats :]
    phases = Phases.of([one.seconds for one in rounds], load.steps, overlaps)
    result = _with_phases(result, phases, training.about())
    said, seen = what_was_seen(rounds, load.steps, training.config.data.prefetch, is_watched=is_watched)
    return replace(result, limits=(*said, *result.limits), extra={**result.extra, **seen})


def _with_smaller(result: Result) -> Result:
    """Add the ratio to the slower of step and decoder, round by round."""
    names = ("end_to_end", "synthetic", "decoder_beside_step")
    if not set(names) <= set(result.cases):
        return result
    rounds = zip(*(result.cases[name].samples for name in names), strict=True)
    smaller = Samples(tuple(end_to_end / min(limits) for end_to_end, *limits in rounds))
    return replace(result, ratios={**result.ratios, "end_to_end_vs_smaller": smaller})


def held_case(training: TrainingRun, setting: str, steps: int | None = None) -> Case:
    """Images per second of the run's step on a batch that stays on the device."""
    count = steps or training.load.steps

    def run() -> None:
        training.timed.held(count)

    return Case(run, training.load.batch_size * count, setting=setting)


def what_was_seen(
    rounds: Sequence[Round], steps: int, prefetch: int, *, is_watched: bool = True
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Sentences about the loader's queue and the monitor, and the sections `queue` and `refreshes`."""
    queue: dict[str, Any] = {
        "prefetch": prefetch,
        "mean": [one.queue_depth for one in rounds],
        "at_start": [one.waiting_at_start for one in rounds],
        "at_end": [one.waiting_at_end for one in rounds],
    }
    refreshes = {
        "by_round": [one.refreshes for one in rounds],
        "skipped": [one.skipped for one in rounds],
        "seconds_after_the_round": [one.refresh_tail_s for one in rounds],
    }
    ahead, tail = batches_ahead(prefetch), max(refreshes["seconds_after_the_round"])
    said = [f"When a batch was asked for, {median(queue['mean']):.2g} decoded ones waited, of {prefetch} at most."]
    of_spectra = (
        f"Refreshes of the spectra: {sum(refreshes['by_round'])} in {len(rounds)} rounds, "
        f"{sum(refreshes['skipped'])} skipped; the longest went on for {tail:.2g} s after its round."
    )
    if is_watched:
        said.append(of_spectra)
    if steps < 4 * ahead:
        said.insert(0, f"Of {steps} batches a round up to {ahead} may be decoded before it: a smoke test.")
    if is_watched and (lacking := refreshes["by_round"].count(0)):
        said.insert(0, f"{lacking} of {len(rounds)} rounds had no refresh of the spectra, so the monitor was idle.")
    return tuple(said), {"queue": queue, "refreshes": refreshes}


def _with_phases(result: Result, phases: Phases, about: dict[str, Any]) -> Result:
    texts = {
        "data": "waiting for data",
        "augment": "flips, operations",
        "inputs": "normalising, mixing and erasing, as far as they are not compiled with the model",
        "monitor": "noting weights to refresh",
    }
    cases = dict(result.cases)
    for name in PHASES:
        cases[f"phase_{name}"] = Samples(phases.ms[name], "ms/step", texts.get(name, ""))
    shares = phases.shares()
    slowest = phases.bottleneck()
    found = f"The bottleneck is {slowest}: {shares[slowest]:.0%} of a step."
    extra = {**about, "shares": shares, "bottleneck": slowest}
    return replace(result, cases=cases, limits=(found, *result.limits), extra=extra)
