"""The resident backend: the whole set in device memory as uint8, cropped and resized there batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import numpy as np
import torch

from lowrank_vit.common.devices import cuda_path, to_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.numba_code import use_threads
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import LENGTH, DamagedSamples, LoaderOptions, Schedule, new_meter, spans
from lowrank_vit.data.decode.resident_set import NoRoom, ResidentSet
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan


class ResidentBackend:
    """Batches of any `.beton` that fits into memory; the host sends only ids, windows, flips and filters.

    The set is loaded once, at the start. Two kernels resize a batch on CUDA, `workers` threads on a CPU.
    """

    name = "resident"

    def __init__(
        self,
        beton: Beton,
        plan: TrainPlan | EvalPlan,
        device: torch.device,
        workers: int,
        say: Callable[[str], object] | None = None,
    ) -> None:
        """Load the set with `workers` threads; `say` gets lines on the progress. Raises `NoRoom`, see `ResidentSet`."""
        self._img_size, self._device = plan.img_size, device
        self._workers = workers
        self._beton = beton
        self._set = ResidentSet(beton, device)
        self._set.load(workers, say)
        self.decode_ms = new_meter()

    def decode(self, schedule: Schedule) -> Generator[Batch]:
        """Yield the schedule's batches. Decode times are the host's: on CUDA, those of queueing the work."""
        for plan in schedule:
            begun = time.perf_counter()
            if damaged := {int(i): self._set.damaged[int(i)] for i in plan.ids if int(i) in self._set.damaged}:
                raise DamagedSamples(damaged)
            batch = self._cut(plan)
            self.decode_ms.append(1e3 * (time.perf_counter() - begun))
            yield batch

    def _cut(self, plan: BatchPlan) -> Batch:
        return self._cut_on_device(plan) if cuda_path(self._device) else self._cut_on_threads(plan)

    def _sides(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._beton.sides_of(ids)

    def _cut_on_threads(self, plan: BatchPlan) -> Batch:
        ids, size = plan.ids, self._img_size
        heights, widths = self._sides(ids)
        planned = spans(plan, heights, widths, size)
        images_NHWC = np.zeros((len(ids), size, size, 3), np.uint8)
        addresses = self._set.pixels.data_ptr() + self._set.starts[ids]
        use_threads(self._workers)
        rows = 3 * widths
        is_written = resize_batch(
            addresses, heights * rows, rows, planned, plan.interpolations, plan.flips, images_NHWC
        )
        assert is_written.all(), "a window leaves its image"
        return Batch(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), self._set.labels[torch.from_numpy(ids)], plan)

    def _cut_on_device(self, plan: BatchPlan) -> Batch:
        from lowrank_vit.data.decode.resize_triton import resize  # comes with torch's builds for GPUs

        ids = plan.ids
        heights, widths = self._sides(ids)
        planned = spans(plan, heights, widths, self._img_size)
        columns = [
            plan.flips,
            plan.interpolations,
            self._set.starts[ids],
            widths,
            planned.reshape(len(ids), 8),
            ids,
        ]
        table = to_device(np.column_stack(columns), self._device)  # float64; the step's only transfer
        images_NHWC = resize(self._set.pixels, table, int(planned[:, 1, LENGTH].max()), self._img_size)
        return Batch(images_NHWC.permute(0, 3, 1, 2), self._set.labels[table[:, -1].long()], plan)

    def ready(self) -> int:
        """0: a batch is made when it is asked for."""
        return 0

    def close(self) -> None:
        """Release the memory."""
        self._set.release()


def open_backend(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> ResidentBackend:
    """Decode a set into memory. Raises `UserError` if there is no room for it."""
    try:
        return ResidentBackend(beton, plan, device, options.workers, options.say)
    except NoRoom as error:
        raise UserError(f"--loader resident: {beton.path} takes {error}. Use --loader auto.") from error
