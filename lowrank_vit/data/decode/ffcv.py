"""The FFCV backend: FFCV's own Loader decodes on CPU threads; order, crop windows and flips come from the plan.

FFCV's loader compiles a decoder that receives sample ids and its run-time metadata array. What the plan says of a
sample travels as extra columns of that array, filled in batch by batch in FFCV's own thread, so nothing is recompiled.
What FFCV leaves open is closed here: the JPEG decoder's return code is checked, its threads end with the epoch, and
batches are copied out of its re-used buffers. Evaluation decodes as Pillow does, so that scores do not depend on the
backend; training with FFCV's own function, which is faster and less exact.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from data_prep.formats.beton import IMAGE, METADATA_START, MODE_JPEG, field_names
from data_prep.formats.jpeg import MAX_PIXELS
from lowrank_vit.common.errors import BetonError
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import DamagedSamples, new_meter, to_device
from lowrank_vit.data.decode.exact_jpeg import decode_exactly, has_too_many_scans, is_of_size
from lowrank_vit.data.decode.pil import crop_and_resize, decode_sound
from lowrank_vit.data.decode.resize_cpu import resize_into
from lowrank_vit.data.decode.spans import spans
from lowrank_vit.data.schedule import Schedule
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan

_torch_threads = torch.get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ffcv 1.0.2 imports distutils.log and numba's deprecated names
    import numba
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader
    from ffcv.memory_managers import OSCacheManager
    from ffcv.memory_managers.base import MemoryContext
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.traversal_order.base import TraversalOrder

torch.set_num_threads(_torch_threads)  # importing ffcv sets it to 1

_PLANNED_IMAGE = np.dtype(
    [
        *((name, IMAGE[name]) for name in IMAGE.names or ()),
        *(("data_size", "<u8"), ("spans", "<f8", (2, 4)), ("kernel", "u1"), ("flip", "u1")),
    ]
)
_PLANNED_SAMPLE = np.dtype({"names": ["f0", "f1"], "formats": [_PLANNED_IMAGE, "<i8"]}, align=True)
_POLL_S = 1.0
_CONTRADICTS = -2
"""Code of a sample that is not what the index says; libjpeg's errors and warnings are -1."""


_decode_jpeg = numba.njit(imdecode)  # FFCV's C function


@numba.njit(parallel=True, nogil=True)
def _decode_batch(
    ids: np.ndarray, images: np.ndarray, codes: np.ndarray, samples: Any, file_bytes: np.ndarray, is_exact: bool
) -> None:
    """Decode, then cut, resize and mirror as planned; one image a thread at a time.

    Where `codes` is not 0 afterwards, `images` holds nothing.
    """
    # What a JPEG says of itself is compared with the index first: whatever does not fit is never decoded.
    for n in numba.prange(len(ids)):
        sample = samples[ids[n]]
        height, width = np.int64(sample.height), np.int64(sample.width)
        data = file_bytes[np.int64(sample.data_ptr) : np.int64(sample.data_ptr) + np.int64(sample.data_size)]
        if sample.mode == MODE_JPEG:
            is_sound = height * width <= MAX_PIXELS and is_of_size(data, height, width)
            codes[n, 0] = 0 if is_sound and not has_too_many_scans(data) else _CONTRADICTS
        else:
            codes[n, 0] = 0 if data.size == height * width * 3 else _CONTRADICTS
    largest = np.int64(0)
    for n in range(len(ids)):
        if codes[n, 0] == 0:
            largest = max(largest, np.int64(samples[ids[n]].height) * np.int64(samples[ids[n]].width) * 3)
    scratch = np.empty((numba.get_num_threads(), largest), np.uint8)  # one whole image a thread, not one a sample
    for n in numba.prange(len(ids)):
        if codes[n, 0] != 0:
            continue
        sample = samples[ids[n]]
        height, width = np.int64(sample.height), np.int64(sample.width)
        data = file_bytes[np.int64(sample.data_ptr) : np.int64(sample.data_ptr) + np.int64(sample.data_size)]
        pixels = scratch[numba.get_thread_id()][: height * width * 3]
        if sample.mode == MODE_JPEG and is_exact:
            codes[n, 0] = decode_exactly(data, pixels, height, width)
        elif sample.mode == MODE_JPEG:
            codes[n, 0] = _decode_jpeg(
                data,
                pixels,
                height,  # type: ignore[arg-type]
                width,  # type: ignore[arg-type]
                height,
                width,
            )
        else:
            pixels = data
        # After an error the scratch memory holds what was there before.
        if codes[n, 0] == 0 and not resize_into(pixels, 3 * width, sample.spans, sample.kernel, sample.flip, images[n]):
            codes[n, 0] = _CONTRADICTS


class _PlannedDecoder(SimpleRGBImageDecoder):
    """The operation that FFCV calls for each batch: the decoded images, and each JPEG decode's return code."""

    def __init__(self, size: int, *, is_exact: bool) -> None:
        super().__init__()
        self._size, self._is_exact = size, is_exact

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape, dtype = (self._size, self._size, 3), np.dtype("u1")
        memory = (AllocationQuery(shape, dtype), AllocationQuery((1,), np.dtype("<i4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), memory

    def generate_code(self) -> Callable[..., Any]:
        is_exact = self._is_exact

        def decode(batch_indices: np.ndarray, memory: Any, metadata: Any, storage_state: Any) -> Any:
            images, codes = memory
            _decode_batch(batch_indices, images, codes, metadata, storage_state[0], is_exact)
            return images, codes

        return decode


class _PlannedOrder(TraversalOrder):
    """The schedule's rows of ids, in the guise of the flat order that FFCV cuts into batches.

    FFCV asks for the order once an epoch, takes `order[:n]` of it and then slices of `batch_size`; each of those is one
    row here, whatever its length. (FFCV calls the object where it expects a class.)
    """

    def __init__(self, rows: list[np.ndarray], batch_size: int) -> None:
        self.rows, self._batch_size = rows, batch_size

    def __call__(self, loader: Loader) -> _PlannedOrder:
        return self

    def sample_order(self, epoch: int) -> Any:
        return self

    def __len__(self) -> int:
        return len(self.rows) * self._batch_size

    def __getitem__(self, part: slice) -> Any:
        return self if part.start is None else self.rows[part.start // self._batch_size]


class _PlannedMemory(MemoryContext):
    """FFCV's source of sample bytes. FFCV tells it of each batch before decoding, which is where the plan comes in.

    Called in FFCV's thread. An error there would end that thread with no word to the consumer, so it is kept.
    """

    def __init__(self, beton: Beton, img_size: int) -> None:
        self._beton, self._img_size = beton, img_size
        self.metadata = np.zeros(beton.num_samples, _PLANNED_SAMPLE)
        stored = {"mode": beton.modes, "width": beton.widths, "height": beton.heights}
        for name, values in {**stored, "data_ptr": beton.pointers, "data_size": beton.sizes}.items():
            self.metadata["f0"][name] = values
        self.schedule: Schedule | None = None
        self.plans: list[BatchPlan] = []
        self.error: Exception | None = None

    def schedule_epoch(self, schedule: Any) -> _PlannedMemory:
        self.plans, self.error = [], None
        return self

    @property
    def state(self) -> tuple[np.ndarray]:
        return (self._beton.bytes,)  # all parts of the set, where FFCV would map one file

    def start_batch(self, batch: int) -> None:
        assert self.schedule is not None
        try:
            plan = self.schedule.plan(batch)
        except Exception as error:
            self.error = error
            raise StopIteration from error  # FFCV's thread takes it for the epoch's end
        # An id stands in one batch of an epoch only (or with the same window), so nothing here is still being read.
        ids, beton = plan.ids, self._beton
        columns = self.metadata["f0"]
        columns["spans"][ids] = spans(plan, beton.heights[ids], beton.widths[ids], self._img_size)
        columns["kernel"][ids] = plan.kernels
        columns["flip"][ids] = plan.flips
        self.plans.append(plan)

    def __enter__(self) -> _PlannedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FfcvBackend:
    """Batches of any `.beton`, decoded on `workers` CPU threads beside the training step; filters as PIL's.

    With an `EvalPlan` JPEGs are decoded to Pillow's pixels, too.
    """

    name = "ffcv"

    def __init__(
        self, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, workers: int, *, prefetch: int = 3
    ) -> None:
        """`prefetch`: decoded batches that may wait."""
        self._beton, self._device = beton, device
        self._order = _PlannedOrder([np.arange(1)], plan.batch_size)
        with beton.parts[0].open("rb") as file:
            image_name, label_name = field_names(file.read(METADATA_START))
        decoder = _PlannedDecoder(plan.img_size, is_exact=isinstance(plan, EvalPlan))
        torch_threads = torch.get_num_threads()
        loader_class: Any = Loader  # FFCV's annotations ask for a class where its code calls an object
        # FFCV's own reader of sample bytes is not needed, and compiling it would change numba's uint8 array type for
        # the whole process (`state_type` sets its `mutable`).
        # Nor need it compile the operation: its work is in `_decode_batch`, which is compiled once a process.
        unused = patch.object(OSCacheManager, "compile_reader", lambda manager: None)
        with unused, patch.object(Compiler, "is_enabled", False):
            self._loader: Any = loader_class(
                str(beton.parts[0]),
                batch_size=plan.batch_size,
                num_workers=min(workers, numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
                os_cache=True,
                order=self._order,
                drop_last=False,
                seed=0,
                pipelines={
                    image_name: [decoder],
                    label_name: None,
                },
                batches_ahead=prefetch,
            )
        torch.set_num_threads(torch_threads)  # FFCV sets it to its own number of workers
        self._memory = self._loader.memory_manager = _PlannedMemory(beton, plan.img_size)
        self._loader.reader.metadata = self._memory.metadata
        self.decode_ms = new_meter()
        ((decode, outputs),), results = self._loader.code
        self._loader.code = [(self._timed(decode), outputs)], results
        self._iterator: Any = None
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def _timed(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def timed(**arguments: Any) -> Any:
            begun = time.perf_counter()
            result = decode(**arguments)
            self.decode_ms.append(1e3 * (time.perf_counter() - begun))
            return result

        return timed

    def decode(self, schedule: Schedule) -> Iterator[Batch]:
        """Yield the schedule's batches; FFCV's thread ends with this generator."""
        if len(schedule) == 0:
            return
        self._order.rows, self._memory.schedule = schedule.ids, schedule
        torch_threads = torch.get_num_threads()
        iterator = self._iterator = iter(self._loader)
        torch.set_num_threads(torch_threads)
        try:
            for n in range(len(schedule)):
                images, codes = self._next(iterator)
                plan = self._memory.plans[n]
                self._judge(plan, images, np.flatnonzero(codes[:, 0]))
                yield self._to_batch(images, plan)
        finally:
            self._wait_for_copy()
            _stop(iterator)
            self._iterator = None

    def _judge(self, plan: BatchPlan, images: np.ndarray, failed: np.ndarray) -> None:
        """Have Pillow decode the samples at the positions `failed` of the batch. Raises `DamagedSamples`.

        libjpeg-turbo returns one code for errors and for warnings, some of which leave the picture whole (a byte or two
        too many before a marker, as in some images of ImageNet); which of them do is decided as when converting.
        """
        reasons = {}
        for n in failed.tolist():
            sample_id = int(plan.ids[n])
            try:
                pixels = decode_sound(self._beton, sample_id)
            except ValueError as error:
                reasons[sample_id] = str(error)
            else:
                images[n] = crop_and_resize(pixels, plan, n, len(images[n]))
        if reasons:
            raise DamagedSamples(reasons)

    def _next(self, iterator: Any) -> tuple[np.ndarray, np.ndarray]:
        """FFCV's `next`, but a dead decoding thread is an error instead of an endless wait."""
        self._wait_for_copy()
        while True:
            try:
                item = iterator.output_queue.get(timeout=_POLL_S)
            except Empty:
                if not iterator.is_alive():
                    raise BetonError(
                        f"{self._beton.path}: FFCV's decoding thread stopped; its own message stands above."
                    ) from None
                continue
            if item is None:
                raise self._memory.error or BetonError(f"{self._beton.path}: FFCV ended the epoch early.")
            _, (result,) = item  # decoded on the host: FFCV's own CUDA streams have nothing to do
            return result

    def _wait_for_copy(self) -> None:
        """Wait until the last batch has left its host buffer, before FFCV is asked for another.

        The host writes into these buffers, so no stream order protects them. The copy's stream holds nothing else,
        hence this does not wait for training steps.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _to_batch(self, images: np.ndarray, plan: BatchPlan) -> Batch:
        on_host = torch.from_numpy(images)  # pinned by FFCV where there is a CUDA device
        if self._copy_stream is not None:
            current = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._copy_stream):
                images_NHWC = on_host.to(self._device, non_blocking=True)
                targets = to_device(self._beton.labels[plan.ids], self._device)
            self._copied = torch.cuda.Event()
            self._copied.record(self._copy_stream)
            current.wait_event(self._copied)
            for tensor in (images_NHWC, targets):
                tensor.record_stream(current)  # its memory is not given to another copy before it was read
        else:
            images_NHWC = on_host.clone()  # FFCV writes the next batches into the same buffers
            targets = torch.from_numpy(self._beton.labels[plan.ids])
        return Batch(images_NHWC.permute(0, 3, 1, 2), targets, plan)

    def ready(self) -> int:
        """How many decoded batches wait."""
        return self._iterator.output_queue.qsize() if self._iterator else 0

    def close(self) -> None:
        """Nothing to give back: every epoch ends its own thread."""


def _stop(iterator: Any) -> None:
    """End an FFCV epoch at any point: no further batch, room in the queue for its last word, then join."""
    iterator.iter_ixes = iter(())
    iterator.terminate_event.set()
    while iterator.is_alive():
        with contextlib.suppress(Empty):
            iterator.output_queue.get(timeout=0.02)
    iterator.join()
    iterator.close()
