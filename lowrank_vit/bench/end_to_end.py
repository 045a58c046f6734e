"""The bench `end-to-end`: training from a .beton with the full recipe, split into the phases of a step.

The loop is the trainer's without its logs and checkpoints; beside it runs the same step on synthetic images.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from data_prep.convert import convert_image_folder
from data_prep.errors import UserError
from lowrank_vit.bench.environment import environment
from lowrank_vit.bench.limits import products_case, wait
from lowrank_vit.bench.measure import DEFAULT_REPEATS, Case, Result, Samples, measure, nothing
from lowrank_vit.bench.phases import PHASES, Phases, TimedSteps
from lowrank_vit.bench.photos import ensure_photos
from lowrank_vit.bench.prep import CACHE
from lowrank_vit.bench.step import RECIPE, WORKLOADS, Workload, config_of, dtype_of, endless
from lowrank_vit.config import parse
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.engine.setup import make_parts, pick_device
from lowrank_vit.options import Config

AUGMENTATION = (
    *("--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--remode", "pixel"),
    *("--mixup", "0.8", "--cutmix", "1.0"),
)
LIMITS = (
    "No logs, checkpoints or validation are in the loop.",
    "On a CPU the augmentation is in the trainer's thread; on CUDA it runs beside the step before, on the loader's "
    "stream, so its time is not part of the step's.",
    "forward: normalising, mixing, model and loss; backward: with the meter and clipping; optimizer: with zero_grad; "
    "other: the rest of the loop, the seeding of the step and the schedule.",
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
    """Steps a round; 20 or 4."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains: compiled in bfloat16 on cuda, eager in float32 on a CPU."""
    loader: Literal["auto", "resident", "dali", "ffcv"] = "dali"
    """Decode backend, as for training; auto would keep the bench's few photographs decoded in memory."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """CPU threads that decode."""
    spec_every: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Updates between two refreshes of the spectra."""
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
        return replace(WORKLOADS[device.type], **{name: value for name, value in given.items() if value is not None})


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure both cases and the phases.

    Beside cases and ratios the result holds the sections workload, phases (ms a step, all samples), shares (of the
    step's time, 0-1) and bottleneck. Raises `UserError`.
    """
    device = pick_device(options.device)
    load = options.workload(device)
    cores = len(os.sched_getaffinity(0))
    if device.type == "cpu":
        torch.set_num_threads(cores)
    surroundings = environment(device.type)
    way = "compiled" if device.type == "cuda" else "eager"
    with ExitStack() as stack:
        folder = _data_folder(options, stack, note)
        decoding = ["--loader", options.loader, "--workers", str(options.workers or cores)]
        config = _real(config_of(load, device, way), folder, [*decoding, *AUGMENTATION])
        note("opening the data and making the steps")
        training = stack.enter_context(TimedSteps(config, load.steps, options.spec_every))
        synthetic = make_parts(config_of(load, device, way), None)
        assert isinstance(synthetic.train_loader, SyntheticLoader)
        batches = endless(synthetic.train_loader)
        synthetic.model.train()

        def synthetic_steps() -> None:
            for _ in range(load.steps):
                synthetic.step(next(batches))
            wait(device)

        items = load.batch_size * load.steps
        setting = f"{load.model}, {load.img_size} px, batch {load.batch_size}, {way}, AdamW, EMA"
        real = f"{' '.join(AUGMENTATION)} --spec-monitor --spec-every {options.spec_every}"
        cases = {
            "end_to_end": Case(training.run, items, setting=f"{training.description}; {real}", after=training.collect),
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
        phases = Phases.of(training.rounds[-options.repeats :], load.steps, overlaps)
    return _with_phases(result, phases, load)


def _with_phases(result: Result, phases: Phases, load: Workload) -> Result:
    texts = {
        "data": "waiting for data",
        "augment": "flips, operations, erasing",
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


def _data_folder(options: Options, stack: ExitStack, note: Callable[[str], object]) -> Path:
    """A folder with train.beton and val.beton, of --data or of photographs that are made once."""
    if options.data is not None:
        if not options.data.is_file():
            raise UserError(f"--data {options.data} is not a file. Give a .beton that `python -m data_prep` wrote.")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("train.beton", "val.beton"):
            (folder / name).symlink_to(options.data.resolve())
        return folder
    photos = ensure_photos(options.scratch / f"photos_{options.count}", options.count, note=note)
    folder = options.scratch / f"end_to_end_{options.count}"
    folder.mkdir(parents=True, exist_ok=True)
    note("converting")
    for name in ("train.beton", "val.beton"):
        convert_image_folder(photos, folder / name)  # finds itself done where it was
    return folder
