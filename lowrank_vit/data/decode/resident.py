"""The resident backend: the whole set in device memory as uint8, cropped and resized there batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from rich.filesize import decimal as size_in_words

from lowrank_vit.common import resources
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.pulse import beat
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import LENGTH, DamagedSamples, LoaderOptions, Schedule, new_meter, spans, to_device
from lowrank_vit.data.decode.pil import decode_sound
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan


class ResidentBackend:
    """Batches of any `.beton` that fits; the host sends only ids, windows, flips and filters.

    JPEGs are decoded once, by Pillow, at the start, and lie one behind the other. They are resized by two kernels on
    CUDA, image by image on `workers` CPU threads.
    """

    name = "resident"

    def __init__(self, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, workers: int) -> None:
        """Decode with `workers` threads and copy the set to `device`: `resident_bytes` of it."""
        self._img_size, self._device = plan.img_size, device
        self._workers = min(workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._heights, self._widths = beton.heights.astype(np.int64), beton.widths.astype(np.int64)
        pixels = 3 * self._heights * self._widths
        wrong = beton.contradicting(np.arange(beton.num_samples))
        pixels[wrong] = 0  # no memory for sizes that no image has
        self._starts = np.cumsum(pixels) - pixels
        self._damaged = dict.fromkeys(wrong.tolist(), "its JPEG is not of the size that the index says")
        try:
            flat = np.zeros(int(pixels.sum()), np.uint8)
        except MemoryError as error:
            raise UserError(
                f"--loader resident: {beton.path} takes {size_in_words(int(pixels.sum()))} decoded, for which memory "
                "does not suffice. Use --loader auto."
            ) from error

        def fill(sample_id: int) -> None:
            beat()
            try:
                decoded, start = decode_sound(beton, sample_id).reshape(-1), self._starts[sample_id]
                if sample_id not in self._damaged:
                    flat[start : start + pixels[sample_id]] = decoded
            except ValueError as error:
                self._damaged[sample_id] = str(error)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(beton.num_samples)))
        self._flat = torch.from_numpy(flat).to(device)
        self._labels = torch.from_numpy(beton.labels).to(device)
        self.decode_ms = new_meter()

    def decode(self, schedule: Schedule) -> Iterator[Batch]:
        """Yield the schedule's batches. Times are the host's: on CUDA, of queueing the work."""
        for plan in schedule:
            begun = time.perf_counter()
            if damaged := {int(i): self._damaged[int(i)] for i in plan.ids if int(i) in self._damaged}:
                raise DamagedSamples(damaged)
            batch = self._cut(plan)
            self.decode_ms.append(1e3 * (time.perf_counter() - begun))
            yield batch

    def _cut(self, plan: BatchPlan) -> Batch:
        return self._cut_on_threads(plan) if self._device.type == "cpu" else self._cut_on_device(plan)

    def _cut_on_threads(self, plan: BatchPlan) -> Batch:
        ids, size = plan.ids, self._img_size
        heights, widths = self._heights[ids], self._widths[ids]
        planned = spans(plan, heights, widths, size)
        images_NHWC = np.zeros((len(ids), size, size, 3), np.uint8)
        addresses = self._flat.data_ptr() + self._starts[ids]
        numba.set_num_threads(self._workers)
        rows = 3 * widths
        is_written = resize_batch(
            addresses, heights * rows, rows, planned, plan.interpolations, plan.flips, images_NHWC
        )
        assert is_written.all(), "a window leaves its image"
        return Batch(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), self._labels[torch.from_numpy(ids)], plan)

    def _cut_on_device(self, plan: BatchPlan) -> Batch:
        from lowrank_vit.data.decode.resize_triton import resize  # comes with torch's builds for GPUs

        ids = plan.ids
        planned = spans(plan, self._heights[ids], self._widths[ids], self._img_size)
        columns = [
            plan.flips,
            plan.interpolations,
            self._starts[ids],
            self._widths[ids],
            planned.reshape(len(ids), 8),
            ids,
        ]
        table = to_device(np.column_stack(columns), self._device)  # float64; the step's only transfer
        images_NHWC = resize(self._flat, table, int(planned[:, 1, LENGTH].max()), self._img_size)
        return Batch(images_NHWC.permute(0, 3, 1, 2), self._labels[table[:, -1].long()], plan)

    def ready(self) -> int:
        """None: a batch is made when it is asked for."""
        return 0

    def close(self) -> None:
        """Give the memory back."""
        self._flat = torch.empty(0)


def resident_bytes(beton: Beton) -> int:
    """Memory that the decoded set takes, in bytes."""
    return int((3 * beton.heights.astype(np.int64) * beton.widths).sum())


def open_backend(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> ResidentBackend:
    """Decode a set into memory. Raises `UserError` where there is no room for it."""
    size = resident_bytes(beton)
    if crowded := place_without_room(size, device):
        taken = f"{beton.path} takes {size_in_words(size)} decoded"
        raise UserError(f"--loader resident: {taken}, but {crowded} free. Use --loader auto.")
    return ResidentBackend(beton, plan, device, options.workers)


def place_without_room(size: int, device: torch.device) -> str:
    """In words, "cpu has 1.5 GB", where `size` bytes do not fit; nothing if they fit everywhere.

    A set that is kept on a GPU is decoded into the host's memory first.
    """
    places = [(str(device), _free_bytes(device))]
    if device.type == "cuda":
        places.append(("the host", resources.memory().free))
    return next((f"{name} has {size_in_words(free)}" for name, free in places if size > free), "")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return resources.memory().free
