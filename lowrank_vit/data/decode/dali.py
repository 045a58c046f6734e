"""The DALI backend: NVIDIA DALI decodes, cuts, resizes and mirrors, on the GPU or on CPU threads.

DALI only computes. The order of the samples, their windows and flips, the end of an epoch and short batches all come
from the plan, through external sources that one thread here fills with views of the mapped file. So there are no worker
processes, no copies of JPEG bytes, and none of DALI's random numbers or epochs.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.formats.beton import MODE_RAW
from lowrank_vit.common.devices import (
    FIRST,
    KeptAlive,
    Mark,
    cuda_path,
    current_stream,
    on_stream,
    side_stream,
    to_device,
)
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.numba_code import use_threads
from lowrank_vit.common.packages import NOT_INSTALLED, install_line, needs, why_missing
from lowrank_vit.common.threads import Ahead
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import (
    LENGTH,
    USUAL_SHARE,
    DamagedSamples,
    LoaderOptions,
    Schedule,
    cropped,
    new_meter,
    spans,
)
from lowrank_vit.data.decode.dali_pipeline import PipelineShape, Sources, release_memory, start_pipeline
from lowrank_vit.data.decode.pil import find_damage
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.mixing import NO_MIX
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan
from lowrank_vit.plan.rectangles import CenterCrops

HOST_PART_BYTES, DEVICE_PART_BYTES = 1 << 27, 1 << 31
"""Bytes of decoded pixels that DALI makes at a time: a batch of larger images is decoded in parts."""
BYTES_A_THREAD = 1 << 24
"""On the CPU at least so many bytes for each thread, so that none of many is idle."""


_NO_GPU = "Update the NVIDIA driver, install a DALI that is built for it, or decode on the CPU with --loader ffcv."


class _Part(NamedTuple):
    """Consecutive samples of a batch that DALI decodes in one run."""

    sources: Sources
    whole: BatchPlan | None
    """The whole batch's plan if this is its last part, else None."""
    labels: np.ndarray
    """int64 (B,), of the whole batch; read with the samples, while the file is known to be whole."""


class DaliBackend:
    """Batches of any `.beton`. Filters are PIL's; on a GPU DALI's antialiased ones, which are close to them."""

    name = "dali"

    def __init__(
        self,
        beton: Beton,
        plan: TrainPlan | EvalPlan,
        device: torch.device,
        workers: int,
        *,
        prefetch: int = 2,
        hw_decoder_load: float = USUAL_SHARE,
        fancy_upsampling: bool = True,
    ) -> None:
        """`workers`: DALI's CPU threads; `prefetch`: batches that DALI works on at a time; as many may be ready.

        `hw_decoder_load`: share of a batch for the GPU's JPEG engine, 0-1; `fancy_upsampling`: see `PipelineShape`.
        Raises `RuntimeError`, in DALI's words.
        """
        self._beton, self._device, self._prefetch = beton, device, prefetch
        self._shape = PipelineShape(
            img_size=plan.img_size,
            batch_size=plan.batch_size,
            has_jpeg=beton.num_jpeg > 0,
            has_raw=beton.num_jpeg < beton.num_samples,
            is_evaluation=isinstance(plan, EvalPlan),
            device_id=torch.empty(0, device=device).device.index,
            resize=cuda_path(device),
            num_threads=workers,
            prefetch=prefetch,
            hw_decoder_load=hw_decoder_load,
            fancy_upsampling=fancy_upsampling,
            large=beton.large_sides,
        )
        self._workers = workers
        # Of the feeding thread's own: on the consumer's, its work on one batch would wait for the decoding of the next.
        # It takes batches out by a small copy, which the step waits for.
        self._stream = side_stream(device, FIRST)
        self._part_bytes = DEVICE_PART_BYTES if self._shape.resize else max(HOST_PART_BYTES, workers * BYTES_A_THREAD)
        self._made: list[torch.Tensor] = []
        self._made_ms = 0.0
        """The finished parts of the next batch, and the time they took."""
        self.decode_ms = new_meter()
        self._decoding: Ahead[tuple[Batch, Mark]] | None = None
        self._being_read = KeptAlive()
        self._pipeline: Any = start_pipeline(self._shape)

    def decode(self, schedule: Schedule) -> Generator[Batch]:
        """Yield the schedule's batches; a thread keeps DALI busy meanwhile and ends with this generator."""
        if self._pipeline is None:
            self._pipeline = start_pipeline(self._shape)
        decoding = self._decoding = Ahead(self._pump(schedule), self._prefetch, self.name)
        try:
            for batch, made in decoding:
                made.hand_over(current_stream(self._device))
                yield batch
        finally:
            decoding.close()
            self._decoding = None

    def _pump(self, schedule: Schedule) -> Generator[tuple[Batch, Mark], None, None]:
        """Feed DALI and yield what it made, always `prefetch` batches ahead; runs in a thread of its own."""
        in_flight: deque[_Part] = deque()
        self._made, self._made_ms = [], 0.0
        with on_stream(self._stream):
            try:
                for plan in schedule:
                    # DALI trusts the sizes that it is fed: if they are wrong it reads beyond a smaller image.
                    if reasons := find_damage(self._beton, self._beton.contradicting(plan.ids)):
                        while in_flight:
                            yield from self._collect(in_flight, time.perf_counter())
                        raise DamagedSamples(reasons)
                    for part in self._parts(plan):
                        begun = time.perf_counter()
                        part.sources.feed(self._pipeline)
                        in_flight.append(part)
                        self._pipeline.schedule_run()
                        if len(in_flight) == self._prefetch:
                            yield from self._collect(in_flight, begun)
                while in_flight:
                    yield from self._collect(in_flight, time.perf_counter())
            except RuntimeError as error:  # all of DALI's errors; the pipeline is of no more use
                self._pipeline = None
                raise self._explain(error, [part.sources.plan for part in in_flight]) from error
            finally:  # also if the epoch is left, a sample is damaged, or the file has changed
                self._drain(in_flight)

    def _parts(self, plan: BatchPlan) -> Iterator[_Part]:
        """The batch in parts whose decoded pixels take at most `_part_bytes`, or single samples."""
        labels, in_eval = self._beton.labels_of(plan.ids), self._shape.is_evaluation
        sides = np.stack(self._beton.sides_of(plan.ids), axis=1) if in_eval else plan.windows[:, 2:]
        ends, used = [], 0
        for n, size in enumerate((3 * sides.astype(np.int64).prod(axis=1)).tolist()):
            if used and used + size > self._part_bytes:
                ends.append(n)
                used = 0
            used += size
        starts, ends = [0, *ends], [*ends, len(plan.ids)]
        for start, end in zip(starts, ends, strict=True):
            part = plan if len(ends) == 1 else rows_of(plan, slice(start, end))
            yield _Part(self._sources(part), plan if end == len(plan.ids) else None, labels)

    def _collect(self, in_flight: deque[_Part], begun: float) -> Iterator[tuple[Batch, Mark]]:
        """Take the next part out of DALI; if it is its batch's last, yield the batch and a mark of its end."""
        # With a stream, DALI makes the stream wait for the GPU, else the host.
        (made,) = self._pipeline.outputs(self._stream)
        sources, plan, labels = in_flight.popleft()
        part = torch.from_dlpack(made.as_tensor()) if self._shape.resize else self._resized(made, sources)
        self._made.append(part)
        self._made_ms += 1e3 * (time.perf_counter() - begun)
        batch = None
        if plan is not None:
            images_NHWC = torch.cat(self._made) if len(self._made) > 1 else part
            batch = Batch(images_NHWC.permute(0, 3, 1, 2), to_device(labels, self._device), plan)
            self.decode_ms.append(self._made_ms)
        done = Mark.of(self._stream)
        self._being_read.keep((sources, self._made), done)  # a GPU may still copy from there
        if batch is not None:
            self._made, self._made_ms = [], 0.0
            yield batch, done

    def _resized(self, decoded: Any, sources: Sources) -> torch.Tensor:
        """uint8 (B, S, S, 3) from the windows, or whole images, that DALI has decoded on the CPU."""
        plan, size, (heights, widths, _) = sources.plan, self._shape.img_size, sources.stored_shapes.T
        planned = cropped(spans(plan, heights, widths, size))
        sides = planned[:, :, LENGTH].astype(np.int64)
        made = [decoded[n] for n in range(len(plan.ids))]
        shapes = np.array([image.shape() for image in made], np.int64)
        addresses = np.array([image.data_ptr() for image in made])
        images_NHWC = np.zeros((len(plan.ids), size, size, 3), np.uint8)
        use_threads(self._workers)
        row_bytes = 3 * shapes[:, 1]
        is_written = resize_batch(
            addresses, shapes.prod(axis=1), row_bytes, planned, plan.interpolations, plan.flips, images_NHWC
        )
        if (wrong := ~is_written | (shapes != np.insert(sides, 2, 3, axis=1)).any(axis=1)).any():
            n = int(np.flatnonzero(wrong)[0])
            found, wanted = (" x ".join(map(str, sizes[:2])) for sizes in (shapes[n], sides[n]))
            raise DamagedSamples({int(plan.ids[n]): f"DALI decodes {found} pixels (height x width), not {wanted}"})
        return torch.from_numpy(images_NHWC)

    def _drain(self, in_flight: deque[_Part]) -> None:
        """Take all remaining outputs out of DALI, so that the next epoch begins with an empty pipeline."""
        try:
            while in_flight and self._pipeline is not None:
                self._pipeline.outputs()
                in_flight.popleft()
        except RuntimeError:
            self._pipeline = None

    def _explain(self, error: RuntimeError, plans: list[BatchPlan]) -> Exception:
        """DALI does not say which sample it could not decode; Pillow does."""
        for plan in plans:
            if reasons := find_damage(self._beton, plan.ids):
                return DamagedSamples(reasons)
        return BetonError(
            f"{self._beton.path}: DALI failed at step {plans[0].step if plans else '?'} though Pillow decodes all of "
            f"its samples: {_last_words(error)}. Use --loader ffcv."
        )

    def _sources(self, plan: BatchPlan) -> Sources:
        beton, ids = self._beton, plan.ids
        sizes = np.stack([*beton.sides_of(ids), np.full(len(ids), 3)], axis=1)
        return Sources(
            data=[beton.sample(sample_id) for sample_id in ids],
            plan=plan,
            is_raw=beton.modes[ids] == MODE_RAW,
            stored_shapes=sizes.astype(np.int32),
            shape=self._shape,
        )

    def ready(self) -> int:
        """How many decoded batches are ready."""
        return self._decoding.waiting if self._decoding else 0

    def close(self) -> None:
        """Release DALI's threads and memory, the memory also for other processes on the device."""
        self._pipeline = None
        if cuda_path(self._device):
            release_memory()


def rows_of(plan: BatchPlan, rows: slice) -> BatchPlan:
    """A plan for some samples of a batch: only what DALI needs, ids and crops."""
    center = plan.center and CenterCrops(plan.center.resized[rows], plan.center.corners[rows])
    arrays = (plan.ids[rows], plan.windows[rows], plan.flips[rows], plan.interpolations[rows])
    return BatchPlan(plan.epoch, plan.step, *arrays, mix=(NO_MIX,), center=center)


@cache
def why_no_dali(device: torch.device) -> str:
    """Why DALI cannot decode for a device, or an empty string. On a GPU this decodes an image to find out."""
    if why := why_missing("nvidia.dali"):
        which = f", which may decode faster ({install_line('dali')})" if why == NOT_INSTALLED else ""
        return f"NVIDIA DALI {why}{which}"
    if not cuda_path(device):
        return ""
    try:
        start_pipeline(
            PipelineShape(
                img_size=8,
                batch_size=1,
                has_jpeg=True,
                has_raw=False,
                is_evaluation=True,
                device_id=torch.empty(0, device=device).device.index,
                resize=True,
                num_threads=1,
                prefetch=1,
                hw_decoder_load=0.0,
            )
        )
    except RuntimeError as error:
        return f"NVIDIA DALI cannot use this GPU ({_last_words(error)})"
    return ""


def open_backend(beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions) -> DaliBackend:
    """Decode with DALI. Raises `UserError` if it cannot be used."""
    needs("nvidia.dali", extra="dali", to="--loader dali", instead="decode on the CPU with --loader ffcv")
    if reason := why_no_dali(device):
        raise UserError(f"--loader dali: {reason}. {_NO_GPU}")
    share = USUAL_SHARE if options.hw_decoder_load is None else options.hw_decoder_load
    try:
        return DaliBackend(
            beton,
            plan,
            device,
            options.workers,
            prefetch=options.prefetch,
            hw_decoder_load=share,
            fancy_upsampling=options.jpeg_fancy_upsampling,
        )
    except RuntimeError as error:  # all of DALI's errors
        raise UserError(f"--loader dali: NVIDIA DALI cannot start ({_last_words(error)}). {_NO_GPU}") from error


def _last_words(error: RuntimeError) -> str:
    """DALI's message without its traceback and the place in its source."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0].split("Stacktrace")[0]
    return " ".join(re.sub(r"^\s*\[[^]]*:\d+\] *", "", text).split())[:300].rstrip(".")
