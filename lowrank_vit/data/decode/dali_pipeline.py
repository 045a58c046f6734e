"""DALI's graph, and the arrays that go into it: the only module that uses DALI's API."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from lowrank_vit.common.filters import BILINEAR, DALI_NAMES
from lowrank_vit.plan.mixing import NO_MIX
from lowrank_vit.plan.plans import BatchPlan
from lowrank_vit.plan.rectangles import CenterCrops

_SEED = 1  # unused: no operator here draws random numbers


@dataclass(frozen=True)
class PipelineShape:
    """Everything that decides the graph."""

    img_size: int
    batch_size: int
    """The largest batch; smaller ones may be fed."""
    has_jpeg: bool
    has_raw: bool
    is_evaluation: bool
    """Resize whole images and cut out the middle, instead of cutting out windows and resizing them."""
    device_id: int | None
    """CUDA device, or None: decode on CPU threads."""
    resize: bool
    """Whether DALI also resizes and mirrors. It does on a GPU; on the CPU `resize_cpu` takes a fifth of the time."""
    num_threads: int
    prefetch: int
    hw_decoder_load: float
    fancy_upsampling: bool = True
    """On a GPU: interpolate chroma as libjpeg does, on the CPU too, instead of repeating it."""
    large: tuple[int, int] = (0, 0)
    """Height and width, pixels, that hardly any JPEG of the set exceeds: memory for them is taken at the start."""


_DEVICE_PADDING, _HOST_PADDING = 1 << 24, 1 << 23
"""DALI's own defaults, in bytes per thread."""
_MOST_PADDING, _MOST_OF_ENGINE = 1 << 26, 1 << 31
"""The most memory that is taken ahead, in bytes per thread and per batch."""


def memory_hints(shape: PipelineShape) -> dict[str, int]:
    """DALI's arguments that make nvJPEG take its memory at the start, not when it meets a larger image.

    A thread's buffers hold an image's coefficients, 16 bits each, and its pixels; the engine's hold a batch of pixels.
    A larger image than expected costs a reallocation.
    """
    height, width = shape.large
    coefficients, pixels = 2 * 3 * height * width, 3 * height * width
    hints = {
        "device_memory_padding": min(max(_DEVICE_PADDING, coefficients + pixels), _MOST_PADDING),
        "host_memory_padding": min(max(_HOST_PADDING, coefficients), _MOST_PADDING),
    }
    if not shape.hw_decoder_load or not pixels:
        return hints
    of_engine = max(1, math.ceil(shape.batch_size * shape.hw_decoder_load)) * pixels
    scale = min(1.0, math.sqrt(_MOST_OF_ENGINE / of_engine))
    sides = {"preallocate_height_hint": int(height * scale), "preallocate_width_hint": int(width * scale)}
    return hints | sides


@dataclass(frozen=True)
class Sources:
    """The inputs of one batch. DALI copies nothing, so this must live until the batch has come out."""

    data: list[np.ndarray]
    """uint8 (bytes,) each: JPEG files or raw pixels."""
    plan: BatchPlan
    is_raw: np.ndarray
    """bool (B,)."""
    stored_shapes: np.ndarray
    """int32 (B, 3): height, width, channels."""
    shape: PipelineShape

    def feed(self, pipeline: Any) -> None:
        """Give the batch to the pipeline's external sources."""
        for name, values in self.arrays.items():
            pipeline.feed_input(name, values)

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The input of each external source; kept with the batch, since DALI reads it in place."""
        plan, shape = self.plan, self.shape
        arrays: dict[str, Any] = {"data": self.data}
        if not shape.is_evaluation:
            arrays["corner"] = np.ascontiguousarray(plan.windows[:, :2])
            arrays["window"] = np.ascontiguousarray(plan.windows[:, 2:])
        if shape.resize:
            arrays["filter"] = _filters()[plan.interpolations]
            arrays["flip"] = plan.flips.astype(np.int32)
            if shape.is_evaluation and plan.center is not None:
                arrays["resized"], arrays["middle"] = plan.center.resized.astype(np.float32), plan.center.corners
        if shape.has_raw:
            arrays["stored_shape"] = self.stored_shapes
        if shape.has_raw and shape.has_jpeg:
            arrays["is_raw"] = self.is_raw
        return arrays


def define(shape: PipelineShape) -> Any:
    """The built pipeline.

    With `shape.resize` it returns uint8 (B, img_size, img_size, 3), on the CUDA device or in host memory; without,
    decoded windows (in evaluation whole images), uint8 (height, width, 3) each.
    """
    fn, types, pipeline_def = _dali()

    on_gpu = shape.device_id is not None
    decoding: dict[str, Any] = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
    # Index and plan refer to stored pixels, so orientation tags must be ignored.
    decoding["adjust_orientation"] = False
    if on_gpu:
        decoding["hw_decoder_load"] = shape.hw_decoder_load
        decoding["jpeg_fancy_upsampling"] = shape.fancy_upsampling
        decoding |= memory_hints(shape)

    def source(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True)

    def pixels_of_jpeg(data: Any, window: dict[str, Any]) -> Any:
        if shape.is_evaluation:
            return fn.decoders.image(data, **decoding)
        return fn.decoders.image_slice(data, **window, **decoding)

    def pixels_of_raw(data: Any, stored_shape: Any, window: dict[str, Any]) -> Any:
        image = fn.reshape(data, shape=stored_shape, layout="HWC")
        image = image.gpu() if on_gpu else image
        return image if shape.is_evaluation else fn.slice(image, **window)

    @pipeline_def(
        enable_conditionals=True,
        device_id=shape.device_id,
        batch_size=shape.batch_size,
        num_threads=shape.num_threads,
        prefetch_queue_depth=shape.prefetch,
        seed=_SEED,
    )
    def graph() -> Any:
        data = source("data", types.UINT8, 1)
        window: dict[str, Any] = {}
        if not shape.is_evaluation:
            sides = {"start": source("corner", types.INT32, 1), "shape": source("window", types.INT32, 1)}
            window = {**sides, "axis_names": "HW"}
        stored_shape = source("stored_shape", types.INT32, 1) if shape.has_raw else None
        if not shape.has_raw:
            images = pixels_of_jpeg(data, window)
        elif not shape.has_jpeg or source("is_raw", types.BOOL, 0):
            images = pixels_of_raw(data, stored_shape, window)
        else:
            images = pixels_of_jpeg(data, window)
        return resized_and_flipped(images) if shape.resize else images

    def resized_and_flipped(images: Any) -> Any:
        size: Any = [shape.img_size] * 2
        whole = source("resized", types.FLOAT, 1) if shape.is_evaluation else size
        interpolation = fn.cast(source("filter", types.INT32, 0), dtype=types.INTERP_TYPE)
        images = fn.resize(images, size=whole, interp_type=interpolation)
        if shape.is_evaluation:
            images = fn.slice(images, start=source("middle", types.INT32, 1), shape=size, axis_names="HW")
        return fn.flip(images, horizontal=source("flip", types.INT32, 0))

    pipeline: Any = graph()
    pipeline.build()
    return pipeline


def start_pipeline(shape: PipelineShape) -> Any:
    """The built pipeline, run once: the first `schedule_run` starts `prefetch` runs, each later one."""
    pipeline, sources = define(shape), tiny_batch(shape)
    for _ in range(shape.prefetch):
        sources.feed(pipeline)
    pipeline.schedule_run()
    for _ in range(shape.prefetch):
        pipeline.outputs()
    return pipeline


def release_memory() -> None:
    """Release GPU memory and pinned memory that DALI's pools keep without need."""
    from nvidia.dali import backend  # heavy; and not typed

    pools: Any = backend
    pools.ReleaseUnusedMemory()


def _dali() -> tuple[Any, Any, Any]:
    from nvidia.dali import fn, pipeline_def, types  # heavy; and not typed

    return fn, types, pipeline_def


def _filters() -> np.ndarray:
    """int32: DALI's interpolation by ours; its linear and cubic filters are antialiased by default."""
    _, types, _ = _dali()
    return np.array([int(getattr(types, name)) for name in DALI_NAMES], np.int32)


def tiny_batch(shape: PipelineShape) -> Sources:
    """One black image of 8 x 8 pixels, to try a new pipeline with."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = np.zeros(8 * 8 * 3, np.uint8) if not shape.has_jpeg else np.frombuffer(file.getvalue(), np.uint8)
    side = shape.img_size
    plan = BatchPlan(
        epoch=0,
        step=0,
        ids=np.zeros(1, np.int64),
        windows=np.array([[0, 0, 8, 8]], np.int32),
        flips=np.zeros(1, bool),
        interpolations=np.full(1, BILINEAR, np.int8),
        mix=(NO_MIX,),
        center=CenterCrops(np.array([[side, side]], np.int32), np.zeros((1, 2), np.int32)),
    )
    return Sources([data], plan, np.array([not shape.has_jpeg]), np.array([[8, 8, 3]], np.int32), shape)
