"""DALI as its documentation sets it up, on CPU threads and on the GPU, and its GPU decoder alone as a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

PREFETCH = 2
"""Batches that DALI works on at a time: its default."""
HW_DECODER_LOAD = 0.35
"""Share of a batch for the GPU's JPEG engine: ours, and the fastest for both; DALI's own default is 0.65."""
# Of DALI's PyTorch example (ResNet50), which sizes the decoder's buffers for the largest images of ImageNet, so that
# none is made again while it runs.
_GPU_BUFFERS = {
    "device_memory_padding": 211_025_920,
    "host_memory_padding": 140_544_512,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
}

Device = Literal["cpu", "gpu"]


def in_whole_rounds(pipeline: Any, prefetch: int = PREFETCH) -> Callable[[int], Any]:
    """A function that has a built `pipeline` make so many batches, and returns the last one when all are made.

    As many are under way at a time as with DALI's own `run`, which however leaves them so when it returns: they would
    be made in the time of whatever is measured next.
    """
    pipeline.schedule_run()  # the first call begins `prefetch` batches, each later one a single batch
    for _ in range(prefetch):
        pipeline.outputs()

    def run(batches: int) -> Any:
        out: Any = None
        for n in range(batches + prefetch - 1):
            if n < batches:
                pipeline.schedule_run()
            if n >= prefetch - 1:
                out = pipeline.outputs()  # waits for the batch, on a GPU too
        return out

    return run


def stock_dali(
    folder: Path, *, steps: int, batch_size: int, img_size: int, workers: int, device: Device = "cpu"
) -> Callable[[], None]:
    """`steps` batches of a plain DALI pipeline: random crops, resized and mirrored, uint8 on the device."""

    def images_of(fn: Any, types: Any, files: Any) -> Any:
        images = fn.decoders.image_random_crop(
            files,
            **_decoding(types, device),
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(images, device=device, size=[img_size, img_size])
        return fn.flip(images, device=device, horizontal=fn.random.coin_flip())

    return _rounds(define(folder, images_of, batch_size, workers, device), steps)


def decoder_alone(
    folder: Path, *, steps: int, batch_size: int, workers: int, device: Device = "gpu"
) -> Callable[[], None]:
    """`steps` batches of whole images from DALI's decoder, with nothing done to them."""

    def images_of(fn: Any, types: Any, files: Any) -> Any:
        return fn.decoders.image(files, **_decoding(types, device))

    return _rounds(define(folder, images_of, batch_size, workers, device), steps)


def _decoding(types: Any, device: Device) -> dict[str, Any]:
    """What all decoders are given."""
    if device == "cpu":
        return {"device": "cpu", "output_type": types.RGB}
    return {"device": "mixed", "output_type": types.RGB, "hw_decoder_load": HW_DECODER_LOAD, **_GPU_BUFFERS}


def define(
    folder: Path, images_of: Callable[[Any, Any, Any], Any], batch_size: int, workers: int, device: Device
) -> Any:
    """A pipeline, not yet built, of the files below `folder`; `images_of` makes images of `fn`, `types` and them."""
    from nvidia import dali

    fn, types, pipeline_def = (getattr(dali, name) for name in ("fn", "types", "pipeline_def"))  # not typed
    device_id = 0 if device == "gpu" else None

    @pipeline_def(
        batch_size=batch_size, num_threads=workers, device_id=device_id, seed=0, prefetch_queue_depth=PREFETCH
    )
    def graph() -> Any:
        files, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        return images_of(fn, types, files), labels.gpu() if device == "gpu" else labels

    return graph()


def _rounds(pipeline: Any, steps: int) -> Callable[[], None]:
    pipeline.build()
    make = in_whole_rounds(pipeline)

    def run() -> None:
        make(steps)

    return run
