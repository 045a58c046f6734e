"""Common parts of the decode backends: their options, the schedule they decode, source pixels, and errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.arguments import SHARE, check_choice, check_number, check_whole
from lowrank_vit.common.devices import cuda_path
from lowrank_vit.common.resources import available_cores
from lowrank_vit.data.batch import Batch
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan

_KEPT_TIMES = 256
USUAL_SHARE = 0.35
"""`--hw-decoder-load` if nothing is measured: the fastest on an H100 with 14 to 16 threads."""


def _alone(said: Any) -> list[Any]:
    return [said]


@dataclass(frozen=True)
class FedStep:
    """The training step that a loader feeds, on one GPU."""

    key: Mapping[str, Any]
    """Everything that its speed depends on; plain values."""
    estimate: float | None
    """Upper bound of its images per second, until they are measured; None: unknown."""


@dataclass(frozen=True)
class LoaderOptions:
    """How to decode; see the flags of the same names."""

    loader: str = "auto"
    """auto, or the name of a module beside this one: resident, dali or ffcv."""
    workers: int = 4
    prefetch: int = 2
    hw_decoder_load: float | None = USUAL_SHARE
    """None: a measured one, see `jpeg_engine.py`."""
    on_bad_sample: Literal["error", "skip"] = "error"
    of_all_ranks: Callable[[Any], list[Any]] = _alone
    """Turns a rank's value into the list of all ranks' values, so that `auto` chooses the same on all of them."""
    say: Callable[[str], object] | None = None
    """Called with the progress of long work; None, as on all ranks but one: nothing is shown."""
    jpeg_fancy_upsampling: bool = True
    step: FedStep | None = None
    """The step for which the JPEG engine's share is chosen."""
    before: str = ""
    """The loader that a run has decoded with so far, which `auto` takes again if it can; empty: a new run."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a value outside its range."""
        check_whole(workers=self.workers, prefetch=self.prefetch)
        check_choice(("error", "skip"), on_bad_sample=self.on_bad_sample)
        if self.hw_decoder_load is not None:
            check_number(SHARE, hw_decoder_load=self.hw_decoder_load)


def usual_workers(device: torch.device, sharing: int = 1) -> int:
    """Default number of threads that decode: 4, or with a GPU, which decodes too, all cores but 2.

    Those 2 launch the step's work and feed the decoder. `sharing`: processes that share this machine's cores.
    """
    return max(1, (available_cores() - 2) // sharing) if cuda_path(device) else 4


class Schedule:
    """The rest of an epoch: each batch, with its ids, is planned when it is asked for, so none waits for the others.

    Backends ask for plans in threads of their own, so that drawing them costs the trainer nothing.
    """

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        epoch: int,
        first_step: int = 0,
        bad: Collection[int] = (),
        check: Callable[[np.ndarray], None] = lambda ids: None,
        *,
        most: int | None = None,
    ) -> None:
        """`bad`: samples to leave out, see `step_ids`; `check` is called with each batch's ids and may raise.

        `most`: the number of steps, if not the whole rest.
        """
        self._plan, self._check, self.epoch, self._bad = plan, check, epoch, np.array(sorted(bad), np.int64)
        rest = range(first_step, plan.steps_per_epoch)
        self._steps = rest if most is None else rest[:most]

    def __iter__(self) -> Iterator[BatchPlan]:
        for step in self._steps:
            ids = self._plan.step_ids(self.epoch, step, self._bad)
            if len(ids):  # in evaluation all samples of a batch may be bad
                self._check(ids)
                yield self._plan.batch(self.epoch, step, ids)


class Backend(Protocol):
    """Decodes the batches of a schedule, in its order. One schedule at a time."""

    name: str
    decode_ms: deque[float]
    """Milliseconds that each of the last batches took to decode; see `new_meter`."""

    def decode(self, schedule: Schedule) -> Generator[Batch]:
        """Yield the schedule's batches; closing the generator early ends all threads of it.

        Device work goes to the CUDA stream that is current when a batch is asked for. Raises `DamagedSamples` in place
        of the first batch that holds damaged samples.
        """
        ...

    def ready(self) -> int:
        """How many decoded batches are ready."""
        ...

    def close(self) -> None:
        """Give back memory and threads."""
        ...


class DamagedSamples(Exception):
    """Samples of one batch that do not decode."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons
        """By sample id, in the decoder's words."""


def new_meter() -> deque[float]:
    """A list of a backend's decode times, newest last. Written by its thread, read by the trainer's."""
    return deque(maxlen=_KEPT_TIMES)


ORIGIN, SCALE, LOW, LENGTH = range(4)
"""Columns of a span, all in stored pixels along one axis.

Output pixel i covers `SCALE` pixels from `ORIGIN + i * SCALE`. Pixels outside `[LOW, LOW + LENGTH)` do not count, as if
the image had been cropped to that range first.
"""


def spans(plan: BatchPlan, heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """float64 (B, 2, 4): the span along rows (axis 1, index 0) and columns of each of the plan's samples.

    `heights`, `widths`: int (B,), of those samples as stored; `size`: side of the output, pixels.
    """
    if plan.center is not None:
        length = np.stack([heights, widths], axis=1).astype(np.float64)
        low, scale = np.zeros_like(length), length / plan.center.resized
        return np.stack([plan.center.corners * scale, scale, low, length], axis=2)
    low, length = plan.windows[:, :2].astype(np.float64), plan.windows[:, 2:].astype(np.float64)
    return np.stack([low, length / size, low, length], axis=2)


Spans = TypeVar("Spans", np.ndarray, Tensor)


def cropped(spans: Spans) -> Spans:
    """Spans, array or tensor, relative to images that have been cropped to them already."""
    moved = spans.clone() if isinstance(spans, Tensor) else spans.copy()
    moved[:, :, ORIGIN] -= spans[:, :, LOW]  # type: ignore[operator]
    moved[:, :, LOW] = 0
    return moved
