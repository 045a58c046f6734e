"""SPDL as a peer of the loader, where it is installed and FFmpeg's shared libraries are found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SETTING = (
    "PipelineBuilder: aggregate, load_image_batch in a pool of {workers} threads; whole images resized by FFmpeg's "
    "bicubic scaler and padded to a square, since it has no random crop"
)


def why_no_spdl(photo: Path) -> str:
    """The reason why SPDL cannot be measured, or an empty string; tried by decoding `photo`."""
    try:
        import spdl.io  # pyright: ignore[reportMissingImports]
        import spdl.pipeline  # pyright: ignore[reportMissingImports, reportUnusedImport]  only tried
    except ImportError as error:
        return f"it cannot be imported ({error}); pip install 'lowrank-vit[bench-peers]' brings it"
    try:
        spdl.io.load_image(str(photo))
    except Exception as error:  # it raises plain RuntimeErrors
        words = " ".join(str(error).split())
        return f"it does not decode ({words[:160]}); it needs FFmpeg's shared libraries, Debian: libavdevice59"
    return ""


def spdl_loader(
    files: Sequence[Path], *, steps: int, batch_size: int, img_size: int, workers: int
) -> Callable[[], Iterator[Any]]:
    """A function that yields `steps` batches in random order, uint8 (batch_size, img_size, img_size, 3) each.

    Its pipeline is made anew for each round, as its documentation does for an epoch, and ends with it.
    """
    import spdl.io  # pyright: ignore[reportMissingImports]
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]

    paths, shuffled = [str(file) for file in files], random.Random(0)

    def order() -> Iterator[str]:
        """Epoch after epoch: each file once before any comes again."""
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
