"""The FFCV backend: FFCV's own Loader decodes on CPU threads; order, crop windows and flips come from the plan.

FFCV's loader compiles a decoder that receives sample ids and its run-time metadata array. The plan's windows and flips
travel as extra columns of that array, one fresh copy an epoch, so nothing is recompiled and an epoch that was left
early cannot see the next one's values. What FFCV leaves open is closed here: the JPEG decoder's return code is checked,
its threads end with the epoch, and batches are copied out of its re-used buffers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Empty
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from data_prep.beton_format import IMAGE, MODE_JPEG
from data_prep.errors import BetonError
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.plan import EvalPlan, TrainPlan

_torch_threads = torch.get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ffcv 1.0.2 imports distutils.log and numba's deprecated names
    import numba
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.traversal_order.base import TraversalOrder

torch.set_num_threads(_torch_threads)  # importing ffcv sets it to 1

_PLANNED_IMAGE = np.dtype(
    [*((name, IMAGE[name]) for name in IMAGE.names or ())]
    + [("data_size", "<u8")]
    + [(name, "<u2") for name in ("top", "left", "crop_height", "crop_width")]
    + [("flip", "u1")]
)
_PLANNED_SAMPLE = np.dtype({"names": ["f0", "f1"], "formats": [_PLANNED_IMAGE, "<i8"]}, align=True)
_POLL_S = 1.0


_decode_jpeg, _cut_and_resize = numba.njit(imdecode), numba.njit(resize_crop)  # FFCV's C functions


@numba.njit(parallel=True, nogil=True)
def _decode_batch(ids, images, codes, samples, file_bytes):
    """Decode, cut the planned window, resize with OpenCV's INTER_AREA, mirror; one image a thread at a time."""
    largest = np.int64(0)
    for n in range(len(ids)):
        largest = max(largest, np.int64(samples[ids[n]].height) * np.int64(samples[ids[n]].width) * 3)
    scratch = np.empty((numba.get_num_threads(), largest), np.uint8)  # one whole image a thread, not one a sample
    size = images.shape[1]
    for n in numba.prange(len(ids)):
        sample = samples[ids[n]]
        height, width = np.int64(sample.height), np.int64(sample.width)
        data = file_bytes[np.int64(sample.data_ptr) : np.int64(sample.data_ptr) + np.int64(sample.data_size)]
        codes[n, 0] = 0
        if sample.mode == MODE_JPEG:
            pixels = scratch[numba.get_thread_id()][: height * width * 3]
            codes[n, 0] = _decode_jpeg(
                data,
                pixels,
                height,  # type: ignore[arg-type]
                width,  # type: ignore[arg-type]
                height,
                width,
            )
            image = pixels.reshape(height, width, 3)
        else:
            image = data.reshape(height, width, 3)
        top, left = np.int64(sample.top), np.int64(sample.left)
        bottom, right = top + np.int64(sample.crop_height), left + np.int64(sample.crop_width)
        _cut_and_resize(image, top, bottom, left, right, images[n])
        if sample.flip:
            for row in range(size):
                for column in range(size // 2):
                    for channel in range(3):
                        kept = images[n, row, column, channel]
                        images[n, row, column, channel] = images[n, row, size - 1 - column, channel]
                        images[n, row, size - 1 - column, channel] = kept


class _PlannedDecoder(SimpleRGBImageDecoder):
    """The operation that FFCV calls for each batch: the decoded images, and each JPEG decode's return code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape, dtype = (self._size, self._size, 3), np.dtype("u1")
        memory = (AllocationQuery(shape, dtype), AllocationQuery((1,), np.dtype("<i4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), memory

    def generate_code(self) -> Callable[..., Any]:
        # Compiled by FFCV for every loader; the work is in `_decode_batch`, which is compiled once a process.
        def decode(batch_indices, memory, metadata, storage_state):
            images, codes = memory
            _decode_batch(batch_indices, images, codes, metadata, storage_state[0])
            return images, codes

        return decode


class _PlannedOrder(TraversalOrder):
    """A traversal order that FFCV asks for once an epoch (FFCV calls the object where it expects a class)."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __call__(self, loader: Loader) -> _PlannedOrder:
        return self

    def sample_order(self, epoch: int) -> Sequence[int]:
        return self.ids  # type: ignore[return-value]  # FFCV takes slices of an array


class FfcvBackend:
    """Batches of any `.beton`, decoded on `workers` CPU threads beside the training step."""

    name = "ffcv"

    def __init__(self, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, workers: int) -> None:
        self._beton, self._plan, self._device = beton, plan, device
        self._order = _PlannedOrder(np.arange(beton.num_samples))
        torch_threads = torch.get_num_threads()
        loader_class: Any = Loader  # FFCV's annotations ask for a class where its code calls an object
        # FFCV's own reader of sample bytes is not needed, since the index knows their place and size; compiling it
        # would also change numba's uint8 array type for the whole process (`state_type` sets its `mutable`).
        with patch.object(OSCacheManager, "compile_reader", lambda manager: None):
            self._loader: Any = loader_class(
                str(beton.parts[0]),
                batch_size=plan.batch_size,
                num_workers=min(workers, numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
                os_cache=True,
                order=self._order,
                drop_last=False,
                seed=0,
                pipelines={"image": [_PlannedDecoder(plan.img_size)], "label": None},
            )
        torch.set_num_threads(torch_threads)  # FFCV sets it to its own number of workers
        self._loader.memory_manager.context.mmap = beton.bytes  # all parts of the set, where FFCV would map one file
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's batches from `first_step` on; leaving early stops FFCV's thread.

        Raises `BetonError` naming file and sample where a JPEG does not decode.
        """
        rows = self._plan.ids(epoch)[first_step:]
        if len(rows) == 0:
            return
        plans = [self._plan.batch(epoch, first_step + n, ids) for n, ids in enumerate(rows)]
        self._order.ids = np.concatenate([plan.ids for plan in plans])
        self._loader.reader.metadata = self._planned_metadata(plans)
        self._loader.first_traversal_order = self._order.ids  # FFCV takes the epoch's length from it
        torch_threads = torch.get_num_threads()
        iterator = iter(self._loader)
        torch.set_num_threads(torch_threads)
        try:
            for plan in plans:
                images, codes = self._next(iterator)
                for sample_id in plan.ids[codes[:, 0] != 0]:
                    self._raise_if_damaged(int(sample_id))
                yield self._to_batch(images, plan)
        finally:
            self._wait_for_copy()
            _stop(iterator)

    def _raise_if_damaged(self, sample_id: int) -> None:
        """Judge a sample whose decoding returned an error code.

        libjpeg-turbo returns one code for errors and for mere warnings (bytes too many before a marker, as in some
        images of ImageNet, which decode whole); PIL raises for the first only, so it decides. This is rare.
        """
        try:
            Image.open(io.BytesIO(self._beton.sample(sample_id).tobytes())).load()
        except (OSError, ValueError, SyntaxError) as error:
            raise BetonError(
                f"{self._beton.describe(sample_id)} does not decode as a JPEG ({error}); the file is damaged. "
                "Convert it again with `python -m data_prep`."
            ) from error

    def _planned_metadata(self, plans: list[Any]) -> np.ndarray:
        wide, beton = np.zeros(self._beton.num_samples, _PLANNED_SAMPLE), self._beton
        columns = {"mode": beton.modes, "width": beton.widths, "height": beton.heights}
        for name, values in {**columns, "data_ptr": beton.pointers, "data_size": beton.sizes}.items():
            wide["f0"][name] = values
        windows = np.concatenate([plan.windows for plan in plans])
        for column, name in enumerate(("top", "left", "crop_height", "crop_width")):
            wide["f0"][name][self._order.ids] = windows[:, column]
        wide["f0"]["flip"][self._order.ids] = np.concatenate([plan.flips for plan in plans])
        return wide

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

    def _to_batch(self, images: np.ndarray, plan: Any) -> Batch:
        targets = torch.from_numpy(self._beton.labels[plan.ids])
        on_host = torch.from_numpy(images)  # pinned by FFCV where there is a CUDA device
        if self._copy_stream is not None:
            training = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._copy_stream):
                images_NHWC = on_host.to(self._device, non_blocking=True)
                targets = targets.pin_memory().to(self._device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._copy_stream)
            training.wait_event(self._copied)
            for tensor in (images_NHWC, targets):
                tensor.record_stream(training)  # its memory is not given to another copy before the step is done
        else:
            images_NHWC = on_host.clone()  # FFCV writes the next batches into the same buffers
        return Batch(images_NHWC.permute(0, 3, 1, 2), targets, plan)

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
