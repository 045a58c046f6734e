"""What the bench `augment` measures beside timm's transforms: DALI's own RandAugment on the same decoded crops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.dali_peers import PREFETCH, in_whole_rounds

OPERATIONS, MAGNITUDE = 2, 9
SETTING = (
    f"nvidia.dali.auto_aug rand_augment(n={OPERATIONS}, m={MAGNITUDE}), crop_mirror_normalize to float32; every image "
    "gets both operations at one magnitude, and nothing is erased"
)


def dali_rand_augment(
    crops_BHWC: np.ndarray,
    batches: int,
    device: torch.device,
    workers: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[], Any]:
    """A function that puts the uint8 crops through DALI's pipeline `batches` times; returns the last float32 batch.

    The crops lie on the device, as ours do; `mean` and `std` are of RGB in 0-1.
    """
    from nvidia import dali
    from nvidia.dali.auto_aug import rand_augment

    fn, types, pipeline_def = (getattr(dali, name) for name in ("fn", "types", "pipeline_def"))  # not typed
    on_gpu = device.type == "cuda"
    crops: Any = torch.from_numpy(crops_BHWC).to(device) if on_gpu else crops_BHWC
    scale = {"mean": [255 * value for value in mean], "std": [255 * value for value in std]}

    @pipeline_def(
        batch_size=len(crops),
        num_threads=workers,
        device_id=(device.index or 0) if on_gpu else None,
        seed=0,
        enable_conditionals=True,
        prefetch_queue_depth=PREFETCH,
    )
    def graph() -> Any:
        images = fn.external_source(
            source=lambda: crops, batch=True, layout="HWC", device="gpu" if on_gpu else "cpu", no_copy=True
        )
        images = rand_augment.rand_augment(images, n=OPERATIONS, m=MAGNITUDE, fill_value=128)
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **scale)

    # DALI's RandAugment uses names that DALI calls old; it shows that whatever the filters, so it is recorded.
    with warnings.catch_warnings(record=True):
        pipeline: Any = graph()
        pipeline.build()
    make = in_whole_rounds(pipeline)

    def run() -> Any:
        (out,) = make(batches)
        return out.as_tensor()

    return run
