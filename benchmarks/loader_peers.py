"""The peers of the bench `loader`, each set up as in its own documentation."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lowrank_vit.common.packages import install_line, why_missing

LEAST_BATCHES_A_PROCESS = 4


def stock_ffcv(path: Path, *, batch_size: int, img_size: int, workers: int) -> Callable[[], None]:
    """An epoch of FFCV's own loader and operations."""
    from benchmarks.prep import import_ffcv

    import_ffcv()  # without its warnings
    import torch
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    torch_threads = torch.get_num_threads()
    loader: Any = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((img_size, img_size)), RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )

    def run() -> None:
        for _ in loader:
            pass
        torch.set_num_threads(torch_threads)

    return run


def fair_steps(batches: int, processes: int) -> int:
    """Batches per round for a loader whose processes make whole batches: `batches` or somewhat more.

    A multiple of the number of processes, so that none is idle at the end, and at least four for each, since all of
    them start without a batch.
    """
    return processes * max(LEAST_BATCHES_A_PROCESS, -(-batches // processes))


class _Repeated:
    """`length` samples of a dataset, which is repeated."""

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset, self._length = dataset, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % len(self._dataset)]

    @property
    def transform(self) -> Any:
        """The dataset's transform, which timm sets."""
        return self._dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._dataset.transform = transform


@contextmanager
def _epochs_of(loader: Any) -> Generator[Callable[[], None], None, None]:
    """A function that runs through a `DataLoader`, whose persistent processes end with the context."""

    def run() -> None:
        for _ in loader:
            pass

    try:
        yield run
    finally:
        loader._iterator = None


@contextmanager
def timm_loader(
    folder: Path, *, steps: int, batch_size: int, img_size: int, workers: int
) -> Generator[Callable[[], None], None, None]:
    """`steps` batches of timm's loader: uint8, as its processes collate them, before normalising."""
    import torch
    from timm.data import create_dataset, create_loader

    dataset: Any = create_dataset("", root=str(folder), split="train", search_split=False, is_training=True)
    repeated: Any = _Repeated(dataset, steps * batch_size)
    prefetching: Any = create_loader(
        repeated,
        input_size=(3, img_size, img_size),
        batch_size=batch_size,
        is_training=True,
        color_jitter=0.0,
        interpolation="random",
        num_workers=workers,
        device=torch.device("cpu"),
        pin_memory=False,
    )
    loader = prefetching.loader  # without the part that normalises

    with _epochs_of(loader) as run:
        yield run


@contextmanager
def torch_loader(
    folder: Path, *, steps: int, batch_size: int, img_size: int, workers: int
) -> Generator[Callable[[], None], None, None]:
    """`steps` batches of torch's DataLoader with torchvision's v2 transforms as recommended: uint8 tensors."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(img_size, antialias=True), v2.RandomHorizontalFlip()])
    dataset: Any = _Repeated(ImageFolder(str(folder), transform=transform, loader=_decode_rgb), steps * batch_size)
    loader: Any = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )

    with _epochs_of(loader) as run:
        yield run


def _decode_rgb(path: str) -> Any:
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():  # torchvision 0.29 announces that its decoder will move to another package
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_image(path, mode=ImageReadMode.RGB)


PREFETCH = 2
"""DALI's default number of batches in work."""
HW_DECODER_LOAD = 0.35
"""Share of a batch for the GPU's JPEG engine: our value, the fastest for both; DALI's default is 0.65."""
# From DALI's PyTorch example (ResNet50), which sizes the decoder's buffers for ImageNet's largest images, so that none
# is reallocated during a run.
_GPU_BUFFERS = {
    "device_memory_padding": 211_025_920,
    "host_memory_padding": 140_544_512,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
}

Device = Literal["cpu", "gpu"]


def in_whole_rounds(pipeline: Any, prefetch: int = PREFETCH) -> Callable[[int], Any]:
    """A function that makes a number of batches with a built `pipeline`, and returns the last when all are done.

    As many batches are in work at a time as with DALI's own `run`. But `run` returns with batches still in work, which
    would take time from the next measurement.
    """
    pipeline.schedule_run()  # the first call starts `prefetch` batches, each later call one batch
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
    """`steps` batches of a plain DALI pipeline: random crops, resized and flipped, uint8 on the device."""

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
    """`steps` batches of whole images from DALI's decoder, without any operation."""

    def images_of(fn: Any, types: Any, files: Any) -> Any:
        return fn.decoders.image(files, **_decoding(types, device))

    return _rounds(define(folder, images_of, batch_size, workers, device), steps)


def _decoding(types: Any, device: Device) -> dict[str, Any]:
    """Arguments of all decoders."""
    if device == "cpu":
        return {"device": "cpu", "output_type": types.RGB}
    return {"device": "mixed", "output_type": types.RGB, "hw_decoder_load": HW_DECODER_LOAD, **_GPU_BUFFERS}


def define(
    folder: Path, images_of: Callable[[Any, Any, Any], Any], batch_size: int, workers: int, device: Device
) -> Any:
    """A pipeline, not yet built, over the files below `folder`; `images_of(fn, types, files)` makes the images."""
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


SETTING = (
    "PipelineBuilder: aggregate, load_image_batch in a pool of {workers} threads; whole images resized by FFmpeg's "
    "bicubic scaler and padded to a square, since it has no random crop"
)


def why_no_spdl(photo: Path) -> str:
    """The reason why SPDL cannot be measured, or an empty string; tried by decoding `photo`."""
    if why := why_missing("spdl.io") or why_missing("spdl.pipeline"):
        return f"it {why}; {install_line('bench-peers')} brings it"
    try:
        importlib.import_module("spdl.io").load_image(str(photo))
    except Exception as error:  # it raises plain RuntimeErrors
        words = " ".join(str(error).split())
        return f"it does not decode ({words[:160]}); it needs FFmpeg's shared libraries, Debian: libavdevice59"
    return ""


def spdl_loader(
    files: Sequence[Path], *, steps: int, batch_size: int, img_size: int, workers: int
) -> Callable[[], Iterator[Any]]:
    """A function that yields `steps` batches in random order, each uint8 (batch_size, img_size, img_size, 3).

    Each round makes a new pipeline, as SPDL's documentation does for each epoch.
    """
    import spdl.io  # pyright: ignore[reportMissingImports]
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]

    paths, shuffled = [str(file) for file in files], random.Random(0)

    def order() -> Iterator[str]:
        """Endless epochs, each with every file once."""
        while True:
            yield from shuffled.sample(paths, len(paths))

    endless = order()

    def decode(batch: list[str]) -> Any:
        return spdl.io.to_torch(spdl.io.load_image_batch(batch, width=img_size, height=img_size, pix_fmt="rgb24"))

    def batches() -> Iterator[Any]:
        source = [next(endless) for _ in range(steps * batch_size)]
        builder: Any = PipelineBuilder().add_source(source).aggregate(batch_size, drop_last=True)
        pipeline: Any = builder.pipe(decode, concurrency=workers).add_sink().build(num_threads=workers)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    return batches
