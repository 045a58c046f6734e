"""The loader: it drives a backend through the plan, and keeps its position, damaged samples and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common import terminal
from lowrank_vit.common.arguments import Range, check_whole
from lowrank_vit.common.devices import FIRST, KeptAlive, Mark, Spans, TimedMark, cuda_path, on_stream
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.threads import beat
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import Backend, DamagedSamples, Schedule
from lowrank_vit.data.jpeg_engine import EngineShare
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.arguments import EPOCHS
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan

Prepare = Callable[[Tensor, BatchPlan], Tensor]
OnBadSample = Literal["error", "skip"]


@dataclass(frozen=True)
class LoaderStats:
    """Figures of a loader since the last call of `stats`."""

    queue_depth: float
    """Mean number of decoded batches that were ready when one was asked for; 0: the trainer waits for the decoder."""
    decode_ms_p50: float
    """Milliseconds to decode a batch, median of the last ones; see the backend for what is counted."""
    decode_ms_p90: float
    bad_samples: int
    """Different samples found damaged and left out so far."""
    device_wait_s: float = 0.0
    """Seconds for which a GPU only waited for its next batch; the host's own waiting is separate."""


class Loader:
    """Batches of a plan on the trainer's device, decoded, prepared, in the plan's order.

    On CUDA a batch is decoded and prepared on a stream of the loader's own, one batch ahead, so that this runs beside
    the step on the batch before; the trainer's stream is made to wait by an event, the host never waits.
    """

    def __init__(
        self,
        backend: Backend,
        beton: Beton,
        plan: TrainPlan | EvalPlan,
        device: torch.device,
        *,
        on_bad_sample: OnBadSample = "error",
        prepare: Prepare | None = None,
        say: Callable[[str], object] = terminal.say,
    ) -> None:
        """`prepare` applies the plan's operations to uint8 images; `say` is called with lines on samples left out."""
        self.name, self._backend, self._beton, self.plan = backend.name, backend, beton, plan
        self._on_bad_sample, self._prepare, self._say = on_bad_sample, prepare, say
        self.engine_share: EngineShare | None = None
        """The JPEG engine's share, if it was chosen for this loader."""
        self._hand_over = _OwnStream(device) if cuda_path(device) else _SameThread()
        self._bad: set[int] = set()
        self._depths: list[int] = []
        self._running: Iterator[Batch] | None = None
        self._accum_steps = plan.accum_steps if isinstance(plan, TrainPlan) else 1
        self._epoch, self._step, self._is_loaded, self._is_closed = 0, 0, False, False

    @property
    def resident_bytes(self) -> int:
        """Bytes of the device's memory that decoded images take while the loader is open."""
        return self._beton.decoded_bytes if self.name == "resident" else 0

    @property
    def bad(self) -> frozenset[int]:
        """Samples that were found damaged and left out."""
        return frozenset(self._bad)

    def batches(self, epoch: int, first_step: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch (0-based) from `first_step` on.

        Without it from the beginning, or, in the first call after `load_state_dict`, from the loaded position.

        Only one epoch runs at a time: a second call, like `close` and `load_state_dict`, ends the first, which raises
        `UserError` if it is asked for another batch. Raises `UserError` also if the loader is closed, and for a step
        that the epoch does not have. Raises `BetonError` naming file, sample and source for a damaged sample (unless
        those are skipped) and for a file that changed meanwhile.
        """
        if self._is_closed:
            raise UserError(self._why_ended())
        check_whole(EPOCHS, epoch=epoch)
        if first_step is not None:
            check_whole(Range(0, self.plan.steps_per_epoch), first_step=first_step)
        self._end()
        if first_step is None:
            first_step = self._step if self._is_loaded and epoch == self._epoch else 0
        self._is_loaded = False
        self._epoch, self._step = epoch, first_step
        self._running = self._hand_over.run(self._decoded(epoch, first_step), self._prepare)
        return self._counted(self._running)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            while True:
                if self._running is not batches:
                    raise UserError(self._why_ended())
                self._depths.append(self.waiting)
                batch = next(batches, None)
                if batch is None:
                    break
                # A batch that was handed out counts as done: the trainer asks for the next when it has finished it.
                self._step = batch.plan.step + 1
                beat()
                yield batch
            self._epoch, self._step = self._epoch + 1, 0
        finally:
            _close(batches)

    def _why_ended(self) -> str:
        """Why there is no further batch, in words."""
        if self._is_closed:
            return f"the loader of {self._beton.path} is closed. Open another one with open_loader."
        return (
            f"this epoch of {self._beton.path} was ended: a loader runs one at a time, and batches() or "
            "load_state_dict() was called since it began. Open a second loader to have two epochs side by side."
        )

    def _decoded(self, epoch: int, step: int) -> Iterator[Batch]:
        while True:
            schedule = Schedule(self.plan, epoch, step, self._bad, self._beton.check_unchanged)
            batches = self._backend.decode(schedule)
            try:
                for batch in batches:
                    step = batch.plan.step + 1
                    yield batch
                return
            except DamagedSamples as damaged:
                self._report(damaged)
            finally:
                _close(batches)

    def _report(self, damaged: DamagedSamples) -> None:
        """Raise, or remember the samples as bad and say so; the epoch then goes on without them."""
        for sample_id, reason in damaged.reasons.items():
            where = self._beton.describe(sample_id)
            if self._on_bad_sample == "error":
                raise BetonError(
                    f"{where} does not decode ({reason}); the file is damaged. Convert it again with "
                    "`python -m data_prep`, or leave such samples out with --on-bad-sample skip."
                )
            self._bad.add(sample_id)
            self._say(f"left out as damaged ({len(self._bad)} so far): {where} ({reason})")
        if len(self._bad) == self._beton.num_samples:
            raise BetonError(f"{self._beton.path}: none of its samples decodes. Convert it again.")

    @property
    def waiting(self) -> int:
        """How many decoded batches are ready; on CUDA one more may be prepared already."""
        return self._backend.ready()

    def stats(self) -> LoaderStats:
        """Figures since the last call; decode times reach further back if there are few."""
        depths, self._depths = self._depths, []
        times = list(self._backend.decode_ms)
        p50, p90 = np.percentile(times, [50, 90]).tolist() if times else (0.0, 0.0)
        depth = float(np.mean(depths)) if depths else 0.0
        return LoaderStats(depth, p50, p90, len(self.bad), self._hand_over.device_wait_s())

    def state_dict(self) -> dict[str, int]:
        """The position after the last update whose batches were handed out; batches decoded ahead do not count."""
        return {**self._stream_id(), "epoch": self._epoch, "update": self._step // self._accum_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: `batches(state["epoch"])` then begins there. Any number of ranks may continue from it.

        Raises `UserError` if the position belongs to another seed, data set or global batch.
        """
        for name, value in self._stream_id().items():
            if state.get(name) != value:
                raise UserError(
                    f"the position in the data belongs to another stream: its {name.replace('_', ' ')} was "
                    f"{state.get(name)}, now it is {value}. Resume with the same data, seed and global batch; "
                    "--global-batch-size keeps that with any number of ranks."
                )
        self._end()
        self._epoch, self._step, self._is_loaded = state["epoch"], state["update"] * self._accum_steps, True

    def _stream_id(self) -> dict[str, int]:
        plan = self.plan
        if isinstance(plan, EvalPlan):
            return {"num_samples": plan.num_samples}
        return {
            "num_samples": plan.num_samples,
            "seed": plan.seed,
            "global_batch": plan.global_batch,
        }

    def _end(self) -> None:
        if self._running is not None:
            _close(self._running)
            self._running = None

    def close(self) -> None:
        """End a running epoch, with its threads, and give back memory. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end()
        self._hand_over.close()
        self._backend.close()


class _SameThread:
    """Prepares a batch when it is asked for: on a CPU nothing can run beside the step."""

    def run(self, batches: Iterator[Batch], prepare: Prepare | None) -> Iterator[Batch]:
        try:
            for batch in batches:
                yield _prepared(batch, prepare)
        finally:
            _close(batches)

    def device_wait_s(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


class _OwnStream:
    """Makes batches on a stream of their own, one ahead, and hands them over to the trainer's stream by an event."""

    def __init__(self, device: torch.device) -> None:
        # The step waits for its batches, so they go before work that has time, such as spectra.
        self._device, self._stream = device, torch.cuda.Stream(device, priority=FIRST)
        # Torch does not manage DALI's memory: a batch is kept until the step that reads it is done.
        self._in_use = KeptAlive()
        self._waits = Spans()
        """Times at which the trainer's stream waits for a batch."""

    def run(self, batches: Iterator[Batch], prepare: Prepare | None) -> Iterator[Batch]:
        ahead = None
        try:
            ahead = self._make(batches, prepare)
            while ahead is not None:
                decoded, batch, made = ahead
                ahead = self._make(batches, prepare)
                training = torch.cuda.current_stream(self._device)
                self._hand_over_timed(batch, made, training)
                try:
                    yield batch
                finally:  # also where the epoch is left here
                    self._in_use.keep((decoded, batch), Mark.of(training))
        finally:
            if ahead is not None:  # where the epoch is left, the stream may still be at work on it
                self._in_use.keep(ahead[:2], ahead[2])
            _close(batches)

    def _make(self, batches: Iterator[Batch], prepare: Prepare | None) -> tuple[Batch, Batch, Mark] | None:
        with on_stream(self._stream):
            decoded = next(batches, None)
            if decoded is None:
                return None
            batch = _prepared(decoded, prepare)
            return decoded, batch, Mark.of(self._stream)

    def _hand_over_timed(self, batch: Batch, made: Mark, training: torch.cuda.Stream) -> None:
        before = TimedMark.of(training)
        made.hand_over(training, batch.images, batch.targets)
        self._waits.add(before, TimedMark.of(training))

    def device_wait_s(self) -> float:
        """Seconds that the device waited for batches since the last call; the host does not wait for them."""
        return self._waits.taken()

    def close(self) -> None:
        self._stream.synchronize()
        self._in_use.close()


def _prepared(batch: Batch, prepare: Prepare | None) -> Batch:
    return replace(batch, images=prepare(batch.images, batch.plan)) if prepare else batch


def _close(batches: Iterator[Batch]) -> None:
    """End a generator now rather than when the garbage collector finds it."""
    if close := getattr(batches, "close", None):
        close()
