"""Choose how much of a batch a GPU's JPEG engine decodes (`--hw-decoder-load auto`) so that the step never waits.

The CPU's threads and the GPU's cores decode the rest beside the step. So the largest share is chosen whose speed is
`ENOUGH` times the step's own; if none is, the fastest. The engine and the GPU's cores need not give the same bits, so a
run keeps the share that it began with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.data.decode.backend import USUAL_SHARE, Backend, FedStep, LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.speeds import Key, dali_version, keep, kept, kept_or_measured, key_of, measure
from lowrank_vit.plan.plans import EvalPlan, TrainPlan

SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Shares that are measured."""
ENOUGH = 1.2
"""A loader this many times as fast as the step never lets it wait."""
WAITING = 0.05
"""If a run waits for data for more than this share of the time, the loader counts as too slow."""
FROM_STORAGE = 0.1
"""If more than this share of the data is read from storage, the storage may be what is slow."""
_HARDWARE = 3  # nvjpegBackend_t NVJPEG_BACKEND_HARDWARE, nvjpeg.h
_NO_ENGINE = (7, 9)  # nvjpegStatus_t ARCH_MISMATCH and IMPLEMENTATION_NOT_SUPPORTED
_STEP = "step"


@dataclass(frozen=True)
class EngineShare:
    """The chosen share, and the measurements behind the choice."""

    share: float
    why: str
    """The reason in words."""
    speeds: Mapping[float, float]
    """Images per second by share, on the slowest rank."""
    beton: Beton
    key: Key
    """The key under which the speeds are kept."""
    step: FedStep | None

    def recheck(self, img_per_s: float, waited: float, read_bytes: float = 0.0) -> str:
        """Keep the speeds of a run's first updates for later runs; return a line if the loader is too slow, else "".

        A share's speed is kept only if another share is better, and not if storage may have been too slow, since that
        slows all shares down, and only once. The run itself keeps its share, on which its pixels depend.

        Args:
            img_per_s: images per second of one GPU.
            waited: share of the time that it waited for data, 0-1.
            read_bytes: bytes read from storage per image, on average.
        """
        step_speed, speeds, is_kept = img_per_s / max(1 - waited, 0.01), dict(self.speeds), True
        if self.step:
            is_kept = keep(self.beton, self.step.key, {_STEP: step_speed})
        if waited <= WAITING:
            return ""
        line = f"the run waits for the loader {waited:.0%} of the time: {img_per_s:,.0f} img/s a GPU with "
        line += f"--hw-decoder-load {self.share:g}"
        if (from_storage := read_bytes / max(self.beton.stored_bytes / self.beton.num_samples, 1.0)) > FROM_STORAGE:
            return (
                f"{line}, and {min(from_storage, 1.0):.0%} of the data came from storage, which may be the slow part. "
                "--stage-dir may help, see the guide"
            )
        if speeds.get(self.share, 0.0) > img_per_s:  # it decodes faster alone than beside a step
            speeds[self.share] = img_per_s
        better = pick(speeds, step_speed) if speeds else self.share
        if better == self.share or speeds[better] <= img_per_s:
            return f"{line}, and no share is known to be faster. More --workers or --stage-dir may help, see the guide"
        is_kept &= keep(self.beton, self.key, _by_text(speeds))
        advice = "the next run takes it" if is_kept else f"give the next run --hw-decoder-load {better:g}"
        found = f"A share of {better:g} was measured at {speeds[better]:,.0f}"
        return f"{line}. {found}: {advice}; this one keeps its own, on which its pixels depend"


def choose_share(
    beton: Beton,
    plan: TrainPlan | EvalPlan,
    device: torch.device,
    options: LoaderOptions,
    measured: Callable[[], dict[str, float]],
    *,
    gpu: str | None = None,
    has_engine: bool | None = None,
) -> EngineShare | None:
    """The share for DALI on a GPU, the same on all ranks that leave it open; None if the options set one.

    It is `USUAL_SHARE` in evaluation, whose scores must not depend on a measurement of speed, and for a set whose first
    samples do not decode.

    Args:
        beton: the images.
        plan: which of them are wanted, and how they are cut.
        device: the GPU.
        options: how to decode. Their `hw_decoder_load` is None if it is to be chosen.
        measured: measures images per second by share, see `measure_shares`.
        gpu: the GPU's name, or that of its MIG slice; default: torch's.
        has_engine: whether it has a JPEG engine; default: nvJPEG's answer.
    """
    if isinstance(plan, EvalPlan) or not beton.num_jpeg:
        return None if options.hw_decoder_load is not None else _fixed(USUAL_SHARE, "", beton)
    own: Sequence[Any] | None = None
    gpu = gpu or torch.cuda.get_device_name(device)
    of_dali = {"dali": dali_version(), "fancy": options.jpeg_fancy_upsampling}
    rest = {"gpu": gpu, "batch_size": plan.batch_size, "ranks": plan.world_size, **of_dali}
    key = key_of(beton, plan, options.workers, **rest)
    if options.hw_decoder_load is None:
        has_engine = has_jpeg_engine(device) if has_engine is None else has_engine
        own = [{"0": 0.0}, f"{gpu} has no JPEG engine", None, ""]
        if has_engine:
            own = [*kept_or_measured(beton, key, map(_text, SHARES), measured), *_speed_of(options.step, beton)]
    said = [one for one in options.of_all_ranks(own) if one is not None]
    if options.hw_decoder_load is not None:
        return None
    if failed := next((origin for speeds, origin, *_ in said if not speeds), ""):
        return _fixed(USUAL_SHARE, failed, beton)
    texts = set[str].intersection(*(set(speeds) for speeds, *_ in said))
    speeds = {float(text): min(one[0][text] for one in said) for text in texts}
    if set(speeds) == {0.0}:
        return _fixed(0.0, next(one[1] for one in said if len(one[0]) == 1), beton)
    step_speed, step_origin = max(((one[2], one[3]) for one in said), key=lambda one: one[0] or 0.0)
    share = pick(speeds, step_speed)
    table = ", ".join(f"{one:g} {speed:,.0f}" for one, speed in sorted(speeds.items()))
    why = f"{said[0][1]}, img/s by share: {table}; {_reason(speeds[share], step_speed, step_origin)}"
    return EngineShare(share, why, speeds, beton, key, options.step)


def pick(speeds: Mapping[float, float], step_speed: float | None) -> float:
    """The largest share with `ENOUGH` times the step's images per second; the fastest if there is none, or no speed."""
    enough = [share for share, speed in speeds.items() if step_speed and speed >= ENOUGH * step_speed]
    return max(enough) if enough else max(speeds, key=lambda share: (speeds[share], share))


def measure_shares(open_with: Callable[[float], Backend], plan: TrainPlan, device: torch.device) -> dict[str, float]:
    """Images per second by share; 0 for one that fails. One after the other, so that only one pipeline takes memory.

    Raises the last error if all fail.
    """
    speeds: dict[str, float] = {}
    for share in SHARES:
        try:
            speeds |= measure({_text(share): open_with(share)}, plan, device)
        except (RuntimeError, UserError):
            speeds[_text(share)] = 0.0
            if share == SHARES[-1] and not any(speeds.values()):
                raise
    return speeds


def has_jpeg_engine(device: torch.device, nvjpeg: Any = None) -> bool:
    """Whether a GPU, or a MIG slice of it, has a JPEG engine that nvJPEG can use; True if nvJPEG does not say.

    That is so if nvJPEG is missing, or fails for another reason, such as memory: then a measurement shows what is fast.
    `nvjpeg`: the library; default: that of DALI and torch.
    """
    try:
        nvjpeg = nvjpeg or ctypes.CDLL(_nvjpeg_path())
    except OSError:
        return True
    torch.empty(1, device=device)  # makes its context this thread's, which nvJPEG uses
    handle = ctypes.c_void_p()
    status = nvjpeg.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == 0:
        nvjpeg.nvjpegDestroy(handle)
    return status not in _NO_ENGINE


def _nvjpeg_path() -> str:
    try:
        files = metadata.files("nvidia-nvjpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name.startswith("libnvjpeg.so")), "libnvjpeg.so")


def _speed_of(step: FedStep | None, beton: Beton) -> tuple[float | None, str]:
    """Images per second of the step, measured on this set or estimated, and the origin of that in words."""
    if step is None:
        return None, ""
    if speed := kept(beton, step.key).get(_STEP):
        return speed, "measured in a run before"
    return step.estimate, "estimated from its arithmetic"


def _reason(speed: float, step_speed: float | None, origin: str) -> str:
    if not step_speed:
        return "the fastest"
    of_step = f"{ENOUGH:g} times the step's {step_speed:,.0f} ({origin})"
    return f"the largest with {of_step}" if speed >= ENOUGH * step_speed else f"the fastest, as none has {of_step}"


def _fixed(share: float, why: str, beton: Beton) -> EngineShare:
    return EngineShare(share, why, {}, beton, {}, None)


def _text(share: float) -> str:
    return f"{share:g}"


def _by_text(speeds: Mapping[float, float]) -> dict[str, float]:
    return {_text(share): speed for share, speed in speeds.items()}
