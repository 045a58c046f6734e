"""The bench `end-to-end`: training from a .beton with the full recipe, split into the phases of a step.

The loop is the trainer's own, listened to; beside it runs the same step on synthetic images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.harness.limits import products_case, wait
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, Samples, environment, measure, nothing
from benchmarks.harness.sets import converted, link_repeated, open_given, photographs, times_for
from benchmarks.prep import CACHE
from benchmarks.step import RECIPE, WORKLOADS, Workload, config_of, dtype_of, endless
from benchmarks.timed_steps import PHASES, Phases, Round, TimedSteps, batches_ahead, updates_of_rounds
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.devices import pick_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.training.setup import set_up

AUGMENTATION = (
    *("--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--remode", "pixel"),
    *("--mixup", "0.8", "--cutmix", "1.0"),
)
STEPS = {"cuda": 40, "cpu": 20}
"""Steps a round, by device: many times what a loader decodes ahead, and half a second at least."""
LIMITS = (
    "A round is a stretch of one epoch of one run, from where the decoder's queue is steady, with one line of the log; "
    "no checkpoint, validation or beginning of an epoch is in it.",
    "On a CPU the augmentation is in the trainer's thread; on CUDA it runs beside the step before, on the loader's "
    "stream, so its time is not part of the step's.",
    "forward: normalising, mixing, model and loss; optimizer: with clipping and zero_grad; other: the rest of "
    "the loop, the seeding of the step, the meter, the schedule and the log.",
)

_BY_DEVICE = "(default: by the device)"


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: photographs)")] = None
    """Train from this .beton instead of the bench's photographs."""
    count: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Photographs of 500 x 375 pixels, made once and kept in data/bench."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_BY_DEVICE)] = None
    """timm model; vit_small_patch16_224 on cuda, vit_tiny_patch16_224 on a CPU."""
    img_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Side of the images, pixels; 224 or 64."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"], metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Images a step; 256 or 64."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Steps a round, after some that do not count; 40 or 20. A set that is too short for them is repeated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains: compiled in bfloat16 on cuda, eager in float32 on a CPU."""
    loader: Literal["auto", "resident", "dali", "ffcv"] = "dali"
    """Decode backend, as for training; auto would keep the bench's few photographs decoded in memory."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """CPU threads that decode."""
    spec_every: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: once a round)")] = None
    """Updates between two refreshes of the spectra, counted through the run, with those between rounds."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Rounds that count, after one that does not. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted sets are kept."""

    def workload(self, device: torch.device) -> Workload:
        """Of the device, with what was given over it. Raises `UserError`."""
        for name in ("count", "img_size", "batch_size", "steps", "workers", "spec_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
        given = {name: getattr(self, name) for name in ("model", "img_size", "batch_size", "steps")}
        given["steps"] = given["steps"] or STEPS[device.type]
        return replace(WORKLOADS[device.type], **{name: value for name, value in given.items() if value is not None})


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure both cases and the phases.

    Beside cases and ratios the result holds the sections workload, shares (of the step's time, 0-1), bottleneck, queue
    (decoded batches that waited, by round) and refreshes (of the spectra, by round). Raises `UserError`.
    """
    device = pick_device(options.device)
    load = options.workload(device)
    cores = available_cores()
    if device.type == "cpu":
        torch.set_num_threads(cores)
    surroundings = environment(device.type)
    way = "compiled" if device.type == "cuda" else "eager"
    with ExitStack() as stack:
        decoding = ["--loader", options.loader, "--workers", str(options.workers or cores)]
        base = config_of(load, device, way)
        folder, times = _data_folder(options, load, base, stack, note)
        config = _real(base, folder, [*decoding, *AUGMENTATION])
        note("opening the data and making the steps")
        training = stack.enter_context(TimedSteps(config, load.steps, options.spec_every, options.repeats + 1))
        synthetic = set_up(base, None)
        assert isinstance(synthetic.train_loader, SyntheticLoader)
        batches = endless(synthetic.train_loader)
        synthetic.model.train()

        def synthetic_steps() -> None:
            for _ in range(load.steps):
                synthetic.step(next(batches))
            wait(device)

        items = load.batch_size * load.steps
        setting = f"{load.model}, {load.img_size} px, batch {load.batch_size}, {way}, AdamW, EMA"
        spectra = f"every {options.spec_every} updates" if options.spec_every else "once a round"
        real = f"{' '.join(AUGMENTATION)} --spec-monitor, a refresh {spectra}"
        repeated = f"the set {times} times over; " if times > 1 else ""
        real = f"{training.trainer.setup.description}; {repeated}{real}; {load.steps} steps a round"
        cases = {
            "end_to_end": Case(training.run, items, "img/s", real, training.before, training.after),
            "synthetic": Case(synthetic_steps, items, setting=f"the same without data or monitor: {setting}"),
        }
        ratios = {"end_to_end_vs_synthetic": ("end_to_end", "synthetic")}
        if synthetic.train_flops:
            dtype = dtype_of(config)
            cases["product_limit"] = products_case(synthetic.train_flops, items, "img/s", device, dtype)
            ratios["mfu_end_to_end"] = ("end_to_end", "product_limit")
        result = measure(
            "end-to-end", cases, ratios, environment=surroundings, repeats=options.repeats, limits=LIMITS, note=note
        )
        overlaps = frozenset({"augment"} if device.type == "cuda" else ())
        rounds = training.rounds[-options.repeats :]
        phases = Phases.of([one.seconds for one in rounds], load.steps, overlaps)
    result = _with_phases(result, phases, load)
    said, seen = what_was_seen(rounds, load.steps, config.data.prefetch)
    return replace(result, limits=(*said, *result.limits), extra={**result.extra, **seen})


def what_was_seen(rounds: Sequence[Round], steps: int, prefetch: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Of the loader's queue and of the monitor: sentences for the reader, and the sections `queue` and `refreshes`."""
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
    said = [
        f"When a batch was asked for, {median(queue['mean']):.2g} decoded ones waited, of {prefetch} at most.",
        f"Refreshes of the spectra: {sum(refreshes['by_round'])} in {len(rounds)} rounds, "
        f"{sum(refreshes['skipped'])} skipped; the longest went on for {tail:.2g} s after its round.",
    ]
    if steps < 4 * ahead:
        said.insert(0, f"Of {steps} batches a round up to {ahead} may be decoded before it: a smoke test.")
    if lacking := refreshes["by_round"].count(0):
        said.insert(0, f"{lacking} of {len(rounds)} rounds had no refresh of the spectra, so the monitor was idle.")
    return tuple(said), {"queue": queue, "refreshes": refreshes}


def _with_phases(result: Result, phases: Phases, load: Workload) -> Result:
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
    about = {"model": load.model, "img_size": load.img_size, "batch_size": load.batch_size, "steps": load.steps}
    extra = {"workload": about, "shares": shares, "bottleneck": slowest}
    return replace(result, cases=cases, limits=(found, *result.limits), extra=extra)


def _real(synthetic: Config, folder: Path, flags: list[str]) -> Config:
    """The same run from the .beton files of `folder`."""
    data = parse(["--data-dir", str(folder), "--epochs", "1000", *RECIPE, *flags], prog="bench")
    sizes = {"batch_size": synthetic.data.batch_size, "img_size": synthetic.data.img_size}
    # The bench validates nothing; a small validation batch keeps its loader small.
    of_data = replace(data.data, **sizes, validation_batch_size=1)
    return replace(synthetic, data=of_data, augment=data.augment)


def _data_folder(
    options: Options, load: Workload, config: Config, stack: ExitStack, note: Callable[[str], object]
) -> tuple[Path, int]:
    """A folder with train.beton and val.beton, of --data or of photographs, and how often the set is in train.beton.

    So often that an epoch is longer than all rounds.
    """
    if options.data is not None:
        beton = open_given(options.data)
    else:
        photos = photographs(options.scratch, options.count, note)
        note("converting")
        beton = converted(photos, "", ImageOptions())
    updates = updates_of_rounds(config, load.steps, options.repeats + 1)
    times = times_for(beton.num_samples, load.batch_size, updates)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    link_repeated(beton.parts, folder / "train.beton", times)
    link_repeated(beton.parts, folder / "val.beton", 1)
    return folder, times
