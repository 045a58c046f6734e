"""The peer of `prep`: FFCV's own `DatasetWriter`, as its documentation uses it."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from data_prep.formats.jpeg import FORMATS
from lowrank_vit.common.errors import UserError


class ImageFiles:
    """An indexed dataset of (PIL image, label), opened as torchvision's `ImageFolder` opens them."""

    def __init__(self, root: Path, samples: list[tuple[str, int]]) -> None:
        self._root, self._samples = root, samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def names(self) -> list[str]:
        """The files below the root, in order."""
        return [name for name, _ in self._samples]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, label = self._samples[index]
        with Image.open(self._root / name, formats=FORMATS) as image:
            return image.convert("RGB"), label


def import_ffcv() -> Any:
    """The module `ffcv.writer`, imported in silence and without its side effect on torch's threads."""
    import torch

    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv 1.0.2 imports distutils.log and numba's deprecated names
        import ffcv.writer
    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    return ffcv.writer


def write_with_ffcv(files: ImageFiles, out: Path, *, max_resolution: int, quality: int, workers: int) -> None:
    """Write `files` to `out` as JPEGs of at most `max_resolution` pixels a side with `workers` processes.

    FFCV's code is used unchanged but for two things outside its work: its progress bar is off, and a worker that died,
    for which FFCV would wait for ever, raises `UserError`.
    """
    writer = import_ffcv()
    from ffcv.fields import IntField, RGBImageField

    fields = {
        "image": RGBImageField(write_mode="jpg", max_resolution=max_resolution, jpeg_quality=quality),
        "label": IntField(),
    }
    processes: list[Any] = []

    def process(*args: Any, **kwargs: Any) -> Any:
        processes.append(multiprocessing.Process(*args, **kwargs))
        return processes[-1]

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if any(worker.exitcode for worker in processes):
            raise UserError("a worker of FFCV's DatasetWriter stopped; its own message stands above. Check the images.")

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; Python 3.12's on forking beside threads
        for name, replacement in (("tqdm", partial(writer.tqdm, disable=True)), ("Process", process), ("sleep", sleep)):
            stack.enter_context(patch.object(writer, name, replacement))
        try:
            writer.DatasetWriter(str(out), fields, num_workers=workers).from_indexed_dataset(files)
        except BaseException:
            for worker in processes:
                worker.terminate()
            raise
