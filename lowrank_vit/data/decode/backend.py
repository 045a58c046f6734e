"""What the decode backends have in common: what they are to decode, from where its pixels come, what they report."""

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
"""`--hw-decoder-load` where nothing is measured: the fastest on an H100 with 14 to 16 threads."""


def _alone(said: Any) -> list[Any]:
    return [said]


@dataclass(frozen=True)
class FedStep:
    """The training step that a loader feeds, on one GPU."""

    key: Mapping[str, Any]
    """All that its speed depends on; plain values."""
    estimate: float | None
    """Images a second that it makes at most, where that was not measured yet; None: not known."""


@dataclass(frozen=True)
class LoaderOptions:
    """How to decode; see the flags of the same names."""

    loader: str = "auto"
    """auto, or the name of a module beside this one: resident, dali or ffcv."""
    workers: int = 4
    prefetch: int = 2
    hw_decoder_load: float | None = USUAL_SHARE
    """None: the one that was measured to suit, see `jpeg_engine.py`."""
    on_bad_sample: Literal["error", "skip"] = "error"
    of_all_ranks: Callable[[Any], list[Any]] = _alone
    """Makes of what one rank says a list of what all say, by rank, so that `auto` is the same choice on all of them."""
    say: Callable[[str], object] | None = None
    """Told of the progress of what takes long; None: nothing is shown, as of ranks that do not speak."""
    jpeg_fancy_upsampling: bool = True
    step: FedStep | None = None
    """By which a share is chosen."""
    before: str = ""
    """The loader that a run has decoded with so far, which `auto` takes again where it can; empty: a new run."""

    def __post_init__(self) -> None:
        """Raise `UserError` for what is outside its range."""
        check_whole(workers=self.workers, prefetch=self.prefetch)
        check_choice(("error", "skip"), on_bad_sample=self.on_bad_sample)
        if self.hw_decoder_load is not None:
            check_number(SHARE, hw_decoder_load=self.hw_decoder_load)


def usual_workers(device: torch.device, sharing: int = 1) -> int:
    """Threads that decode, where none are asked for: 4, or with a GPU, which decodes too, all cores but 2.

    Those 2 launch the step's work and feed the decoder. `sharing`: processes that share this machine's cores.
    """
    return max(1, (available_cores() - 2) // sharing) if cuda_path(device) else 4


class Schedule:
    """The rest of an epoch: each batch is planned, its ids too, when it is asked for, so none waits for the others.

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
        """`bad`: samples to do without, see `step_ids`; `check` is given each batch's ids and may raise.

        `most`: steps, where not the whole rest is wanted.
        """
        self._plan, self._check, self.epoch, self._bad = plan, check, epoch, np.array(sorted(bad), np.int64)
        rest = range(first_step, plan.steps_per_epoch)
        self._steps = rest if most is None else rest[:most]

    def __iter__(self) -> Iterator[BatchPlan]:
        for step in self._steps:
            ids = self._plan.step_ids(self.epoch, step, self._bad)
            if len(ids):  # in evaluation bad samples may be all that there were
                self._check(ids)
                yield self._plan.batch(self.epoch, step, ids)


class Backend(Protocol):
    """Decodes the batches of a schedule, in its order. One schedule at a time."""

    name: str
    decode_ms: deque[float]
    """Milliseconds that each of the last batches took to decode; see `new_meter`."""

    def decode(self, schedule: Schedule) -> Generator[Batch]:
        """Yield the schedule's batches; closing the generator early ends all threads of it.

        Device work goes to the CUDA stream that is current when a batch is asked for. Raises `DamagedSamples` in the
        place of the first batch that holds one.
        """
        ...

    def ready(self) -> int:
        """How many decoded batches wait to be asked for."""
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
    """Where a backend notes its decode times, newest last. Written by its thread, read by the trainer's."""
    return deque(maxlen=_KEPT_TIMES)


ORIGIN, SCALE, LOW, LENGTH = range(4)
"""Columns of a span, all in stored pixels along one axis.

Output pixel i covers `SCALE` pixels from `ORIGIN + i * SCALE`. Pixels outside `[LOW, LOW + LENGTH)` count for nothing,
as if the image had been cropped to them first.
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
    """Spans, array or tensor, as they lie in an image that has been cropped to them already."""
    moved = spans.clone() if isinstance(spans, Tensor) else spans.copy()
    moved[:, :, ORIGIN] -= spans[:, :, LOW]  # type: ignore[operator]
    moved[:, :, LOW] = 0
    return moved
