"""The FFCV backend: a thread that decodes batches on CPU threads by one compiled function, as FFCV's `Loader` does.

JPEGs get the pixels of FFCV's own decoder in training, and Pillow's, which take longer, in evaluation, so that scores
do not depend on the backend. Unlike FFCV, this backend checks sizes and return codes, names damaged samples, decodes no
JPEG with the tables of the one before, and gives each batch memory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import numba
import numpy as np
import torch
from torch import Tensor

from data_prep.formats.beton import MODE_JPEG
from data_prep.formats.jpeg import MAX_PIXELS
from lowrank_vit.common.devices import cuda_path, to_device
from lowrank_vit.common.numba_code import use_threads
from lowrank_vit.common.threads import Ahead
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import DamagedSamples, LoaderOptions, Schedule, new_meter, spans
from lowrank_vit.data.decode.jpeg import EXACT, FAST, decode_jpeg, has_too_many_scans, is_of_size
from lowrank_vit.data.decode.pil import crop_and_resize, decode_sound
from lowrank_vit.data.decode.resize_cpu import resize_into
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan


@numba.njit(parallel=True, nogil=True, cache=True)
def decode_batch(
    file_bytes: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    spans: np.ndarray,
    interpolations: np.ndarray,
    flips: np.ndarray,
    flags: int,
    num_threads: int,
    images: np.ndarray,
) -> np.ndarray:
    """Decode B samples, then crop, resize and mirror each as planned: bool (B,), whether `images` has it.

    `starts`, `sizes`, `heights`, `widths`: int64 (B,), of the samples in `file_bytes`; `spans`: float64 (B, 2, 4), see
    `spans`; `flags`: see `decode_jpeg`; `images`: uint8 (B, S, S, 3). Numba's `num_threads` threads hold one decoded
    image each.
    """
    num_pixel_bytes = 3 * heights * widths
    is_good = np.zeros(len(images), np.bool_)
    # The header of a JPEG is compared with the index first: a JPEG that does not fit is never decoded.
    for n in numba.prange(len(images)):
        data = file_bytes[starts[n] : starts[n] + sizes[n]]
        if modes[n] != MODE_JPEG:
            is_good[n] = data.size == num_pixel_bytes[n]
        elif num_pixel_bytes[n] <= 3 * MAX_PIXELS:
            is_good[n] = is_of_size(data, heights[n], widths[n]) and not has_too_many_scans(data)
    scratch = np.empty((num_threads, (is_good * num_pixel_bytes).max()), np.uint8)
    for n in numba.prange(len(images)):
        if not is_good[n]:
            continue
        pixels = file_bytes[starts[n] : starts[n] + sizes[n]]
        if modes[n] == MODE_JPEG:
            data, pixels = pixels, scratch[numba.get_thread_id()][: num_pixel_bytes[n]]
            is_good[n] = decode_jpeg(data, pixels, heights[n], widths[n], flags)
        # After an error the scratch memory holds old content.
        if is_good[n]:
            is_good[n] = resize_into(pixels, 3 * widths[n], spans[n], interpolations[n], flips[n], images[n])
    return is_good


class FfcvBackend:
    """Batches of any `.beton`, decoded on `workers` CPU threads beside the training step; filters as PIL's.

    With an `EvalPlan` JPEGs are decoded to Pillow's pixels, too.
    """

    name = "ffcv"

    def __init__(
        self, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, workers: int, *, prefetch: int = 3
    ) -> None:
        """`prefetch`: decoded batches to keep ready."""
        self._beton, self._device, self._img_size, self._prefetch = beton, device, plan.img_size, prefetch
        self._flags = EXACT if isinstance(plan, EvalPlan) else FAST
        self._workers = workers
        self._decoding: Ahead[tuple[Tensor, np.ndarray, BatchPlan]] | None = None
        self.decode_ms = new_meter()

    def decode(self, schedule: Schedule) -> Generator[Batch]:
        """Yield the schedule's batches; the thread that decodes them ends with this generator."""
        decoding = self._decoding = Ahead(self._decoded(schedule), self._prefetch, self.name)
        try:
            for images_NHWC, labels, plan in decoding:
                on_device = images_NHWC.to(self._device, non_blocking=True)
                yield Batch(on_device.permute(0, 3, 1, 2), to_device(labels, self._device), plan)
        finally:
            decoding.close()
            self._decoding = None

    def _decoded(self, schedule: Schedule) -> Generator[tuple[Tensor, np.ndarray, BatchPlan], None, None]:
        """Yield the batches on the host; runs in a thread of its own."""
        num_threads = use_threads(self._workers)  # a thread's own setting
        for plan in schedule:
            begun = time.perf_counter()
            # torch re-uses pinned memory, but not before the copy from it is done.
            shape = len(plan.ids), self._img_size, self._img_size, 3
            images_NHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=cuda_path(self._device))
            labels = self._beton.labels_of(plan.ids)  # now, while the file is known to be whole
            self._fill(images_NHWC.numpy(), plan, num_threads)
            self.decode_ms.append(1e3 * (time.perf_counter() - begun))
            made = images_NHWC, labels, plan
            del images_NHWC  # else its memory is held here until the next batch is made
            yield made
            del made

    def _fill(self, images: np.ndarray, plan: BatchPlan, num_threads: int) -> None:
        """Decode a batch into `images`, uint8 (B, S, S, 3). Raises `DamagedSamples`.

        libjpeg-turbo returns the same code for errors and for warnings, some of which leave the picture whole (one or
        two surplus bytes before a marker, as in some images of ImageNet). So Pillow decodes samples that failed, and
        warnings are judged as when converting.
        """
        beton, ids, size = self._beton, plan.ids, self._img_size
        heights, widths = beton.sides_of(ids)
        is_good = decode_batch(
            *(beton.bytes, beton.pointers[ids], beton.sizes[ids], beton.modes[ids], heights, widths),
            *(spans(plan, heights, widths, size), plan.interpolations, plan.flips, self._flags, num_threads, images),
        )
        reasons = {}
        for n in np.flatnonzero(~is_good).tolist():
            try:
                images[n] = crop_and_resize(decode_sound(beton, int(ids[n])), plan, n, size)
            except ValueError as error:
                reasons[int(ids[n])] = str(error)
        if reasons:
            raise DamagedSamples(reasons)

    def ready(self) -> int:
        """How many decoded batches are ready."""
        return self._decoding.waiting if self._decoding else 0

    def close(self) -> None:
        """Nothing to release: every epoch ends its own thread."""


def open_backend(beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions) -> FfcvBackend:
    """Decode on CPU threads of this process."""
    return FfcvBackend(beton, plan, device, options.workers, prefetch=options.prefetch)
