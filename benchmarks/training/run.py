"""A training run with the full recipe that several figures share, so that its step is compiled once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.harness.measure import DEFAULT_REPEATS, Case, check_repeats, environment, nothing
from benchmarks.harness.sets import converted, link_repeated, made_anew, open_given, photographs, times_for
from benchmarks.prep import CACHE
from benchmarks.step import RECIPE, WORKLOADS, Workload, config_of, dtype_of
from benchmarks.training.timed_steps import TimedSteps, updates_of_rounds
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.devices import pick_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.training.setup import set_up

AUGMENTATION = (
    *("--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--remode", "pixel"),
    *("--mixup", "0.8", "--cutmix", "1.0"),
)
STEPS = {"cuda": 40, "cpu": 20}
"""Steps per round, by device: many times what a loader decodes ahead, and at least half a second."""
SPARE_ROUNDS = 3
"""Rounds that an epoch must have besides those that count: a warm-up round, and those of the profile."""

_BY_DEVICE = "(default: by the device)"


@dataclass(frozen=True)
class Options:
    """Options of the benches that train."""

    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: photographs)")] = None
    """Train from this .beton instead of the bench's photographs."""
    count: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Photographs of 500 x 375 pixels, made once and kept in data/bench."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_BY_DEVICE)] = None
    """timm model; vit_small_patch16_224 on cuda, vit_tiny_patch16_224 on a CPU."""
    img_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Side of the images, pixels; by default 224 on cuda and 64 on a CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"], metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Images a step; by default 256 on cuda and 64 on a CPU."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Measured steps a round, after some that warm up; by default 40 on cuda and 20 on a CPU. A set that is too short
    is repeated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains: compiled in bfloat16 on cuda, eager in float32 on a CPU."""
    loader: Literal["auto", "resident", "dali", "ffcv"] = "dali"
    """Decode backend, as for training; auto would keep the bench's few photographs decoded in memory."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """CPU threads that decode; on cuda by default those of training, which leaves two cores."""
    spec_every: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: once a round)")] = None
    """Updates between two refreshes of the spectra. Updates between rounds count, too."""
    spec_monitor: bool = True
    """Watch the spectra. Without the monitor the step runs on the device's default stream, after the batches that are
    prepared there."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted sets are kept."""

    def workload(self, device: torch.device) -> Workload:
        """The device's workload with the given options. Raises `UserError`."""
        for name in ("count", "img_size", "batch_size", "steps", "workers", "spec_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
        given = {name: getattr(self, name) for name in ("model", "img_size", "batch_size", "steps")}
        given["steps"] = given["steps"] or STEPS[device.type]
        return replace(WORKLOADS[device.type], **{name: value for name, value in given.items() if value is not None})


class TrainingRun:
    """The run in rounds, ready to be timed, with its description for the results."""

    def __init__(self, options: Options, note: Callable[[str], object] = nothing) -> None:
        """Make the set and the run, without any update. Raises `UserError`."""
        check_repeats(options.repeats)
        self.device = pick_device(options.device)
        self.load, self.repeats, self.spec_every = options.workload(self.device), options.repeats, options.spec_every
        if self.device.type == "cpu":
            torch.set_num_threads(available_cores())
        self.environment = environment(self.device.type)
        self.way = way_on(self.device)
        with ExitStack() as stack:
            self.config, self.times = _config(options, self.load, self.device, stack, note)
            note("opening the data and making the steps")
            rounds = options.repeats + SPARE_ROUNDS
            watched = options.spec_monitor
            timed = TimedSteps(self.config, self.load.steps, options.spec_every, rounds, is_watched=watched)
            self.timed = stack.enter_context(timed)
            self._stack = stack.pop_all()
        setup = self.timed.trainer.setup
        self.train_flops, self.items = setup.train_flops, self.load.batch_size * self.load.steps
        self.dtype = dtype_of(self.config)
        self.timms: Case | None = None
        """timm's step of the same model, if a figure needs it."""
        self.attention = attention_backend(setup.model, self.load.batch_size, self.dtype, self.device)
        self.setting = (
            f"{self.load.model}, {self.load.img_size} px, batch {self.load.batch_size}, {self.way}, AdamW, EMA"
        )

    def about(self, steps: int | None = None) -> dict[str, Any]:
        """Sections of a result about the workload and how it was run; `steps`: per round, if they differ."""
        setup, load = self.timed.trainer.setup, replace(self.load, steps=steps or self.load.steps)
        data = setup.config.data  # with the values chosen for options that were not given
        return {
            "workload": {name: getattr(load, name) for name in ("model", "img_size", "batch_size", "steps")},
            "attention": self.attention,
            "loader": {
                "backend": setup.train_loader.name,
                "hw_decoder_load": data.hw_decoder_load,
                "workers": data.workers,
                "prefetch": data.prefetch,
            },
            "description": list(setup.description),
        }

    def close(self) -> None:
        """End the run and remove its files."""
        self._stack.close()


_kept: ContextVar[dict[Options, TrainingRun] | None] = ContextVar("kept", default=None)


@contextmanager
def kept_open() -> Generator[None]:
    """Within this context a run stays open for the next figure with the same options, unless its loop has ended."""
    runs: dict[Options, TrainingRun] = {}
    token = _kept.set(runs)
    try:
        yield
    finally:
        _kept.reset(token)
        for run in reversed(runs.values()):  # each has set its signal handlers over those of the one before
            run.close()


@contextmanager
def training_run(options: Options, note: Callable[[str], object] = nothing) -> Generator[TrainingRun]:
    """The run of these options: a new one, or within `kept_open` an existing one. Raises `UserError`."""
    runs, key = _kept.get(), key_of(options)
    run = (runs or {}).get(key) or TrainingRun(key, note)
    if runs is not None:
        runs[key] = run
    try:
        yield run
    finally:
        if runs is None or run.timed.is_over:
            run.close()
            if runs is not None:
                del runs[key]


def key_of(options: Options) -> Options:
    """The run's options only, without further options of a bench."""
    return Options(**{field.name: getattr(options, field.name) for field in fields(Options)})


def attention_backend(model: torch.nn.Module, batch_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Torch's name of the attention backend of the model's blocks; "unknown" if it cannot be found."""
    try:
        block: Any = model.get_submodule("blocks.0.attn")
        embedding: Any = model.get_submodule("patch_embed")
        tokens = embedding.num_patches + 1
        q = torch.zeros(batch_size, block.num_heads, tokens, block.head_dim, dtype=dtype, device=device)
        q.requires_grad_()
        chosen = torch._fused_sdp_choice(q, q, q)  # pyright: ignore[reportPrivateUsage]
        return torch.nn.attention.SDPBackend(chosen).name.lower()
    except Exception:  # a private function of torch, and the model may have other blocks
        return "unknown"


def with_data(synthetic: Config, folder: Path, flags: list[str]) -> Config:
    """The same run with the .beton files of `folder`."""
    data = parse(["--data-dir", str(folder), "--epochs", "1000", *RECIPE, *flags], prog="bench")
    sizes = {"batch_size": synthetic.data.batch_size, "img_size": synthetic.data.img_size}
    # The bench does not validate; a small validation batch keeps that loader small.
    of_data = replace(data.data, **sizes, validation_batch_size=1)
    return replace(synthetic, data=of_data, augment=data.augment)


def way_on(device: torch.device) -> str:
    """How steps are run on the device: "compiled" or "eager"."""
    return "compiled" if device.type == "cuda" else "eager"


def prepare(options: Options, note: Callable[[str], object] = nothing) -> None:
    """Make the set of a run, and measure the decoder's speeds, which are stored beside it. Raises `UserError`."""
    device = pick_device(options.device)
    with ExitStack() as stack:
        config, _ = _config(options, options.workload(device), device, stack, note)
        note("opening the data")
        setup = set_up(config)
        for loader in (setup.train_loader, setup.val_loader):
            if loader:
                loader.close()


def _config(
    options: Options, load: Workload, device: torch.device, stack: ExitStack, note: Callable[[str], object]
) -> tuple[Config, int]:
    """The run's configuration, and how often the set is repeated in its training set."""
    base = config_of(load, device, way_on(device))
    folder, times = _data_folder(options, load, base, stack, note)
    workers = options.workers or (available_cores() if device.type == "cpu" else None)
    decoding = ["--loader", options.loader, *(["--workers", str(workers)] if workers else [])]
    return with_data(base, folder, [*decoding, *AUGMENTATION]), times


def _data_folder(
    options: Options, load: Workload, config: Config, stack: ExitStack, note: Callable[[str], object]
) -> tuple[Path, int]:
    """A folder with train.beton and val.beton, from --data or photographs, and how often the set is in train.beton.

    It is repeated until an epoch is longer than all rounds. The folder of photographs is kept, with its measured
    speeds.
    """
    if options.data is not None:
        beton = open_given(options.data)
    else:
        photos = photographs(options.scratch, options.count, note)
        note("converting")
        beton = converted(photos, "", ImageOptions())
    updates = updates_of_rounds(config, load.steps, options.repeats + SPARE_ROUNDS)
    times = times_for(beton.num_samples, load.batch_size, updates)
    if options.data is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _link(beton, folder, times)
        return folder, times
    folder = options.scratch / f"{beton.path.stem}_{times}_times"
    if not folder.is_dir():
        with made_anew(folder) as made:
            _link(beton, made, times)
    return folder, times


def _link(beton: Beton, folder: Path, times: int) -> None:
    link_repeated(beton.parts, folder / "train.beton", times)
    link_repeated(beton.parts, folder / "val.beton", 1)
