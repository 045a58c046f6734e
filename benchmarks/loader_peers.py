"""What the bench `loader` measures beside: each peer as its own documentation sets it up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEAST_BATCHES_A_PROCESS = 4


def stock_ffcv(path: Path, *, batch_size: int, img_size: int, workers: int) -> Callable[[], None]:
    """An epoch of FFCV's own loader and operations."""
    from benchmarks.ffcv_writer import import_ffcv

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
    """Batches a round for a loader whose processes make whole batches: about `batches`, or more.

    A multiple of the processes, since else some of them have nothing to do at the end, and at least four for each,
    since at the beginning all of them start with nothing.
    """
    return processes * max(LEAST_BATCHES_A_PROCESS, -(-batches // processes))


class _Repeated:
    """`length` samples of a dataset, which begins again where it ends."""

    def __init__(self, dataset: Any, length: int) -> None:
        self._dataset, self._length = dataset, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % len(self._dataset)]

    @property
    def transform(self) -> Any:
        """The dataset's own, which timm sets."""
        return self._dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._dataset.transform = transform


@contextmanager
def timm_loader(
    folder: Path, *, steps: int, batch_size: int, img_size: int, workers: int
) -> Generator[Callable[[], None], None, None]:
    """`steps` batches of timm's loader: uint8 batches as its processes collate them, before normalising."""
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

    def run() -> None:
        for _ in loader:
            pass

    try:
        yield run
    finally:
        loader._iterator = None  # ends its persistent processes


@contextmanager
def torch_loader(
    folder: Path, *, steps: int, batch_size: int, img_size: int, workers: int
) -> Generator[Callable[[], None], None, None]:
    """`steps` batches of torch's DataLoader with torchvision's v2 transforms as it advises: uint8 tensors."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(img_size, antialias=True), v2.RandomHorizontalFlip()])
    dataset: Any = _Repeated(ImageFolder(str(folder), transform=transform, loader=_decode_rgb), steps * batch_size)
    loader: Any = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )

    def run() -> None:
        for _ in loader:
            pass

    try:
        yield run
    finally:
        loader._iterator = None  # ends its persistent processes


def _decode_rgb(path: str) -> Any:
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():  # torchvision 0.29 announces that its decoder will move to a package of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_image(path, mode=ImageReadMode.RGB)
