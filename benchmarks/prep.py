"""The bench `prep`: converting a folder of JPEGs, beside FFCV's own writer and beside copying the files."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import tyro
from PIL import Image

from benchmarks.harness.limits import decodable, decode_case, store_case
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, environment, measure, nothing
from benchmarks.harness.peak_memory import measure_memory
from benchmarks.harness.sets import ensure_photos
from data_prep.convert import convert_image_folder
from data_prep.formats.jpeg import FORMATS, ImageOptions
from data_prep.formats.tables import read_tables
from data_prep.sources.image_folder import image_folder
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores


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
    """The module `ffcv.writer`, imported without warnings and without its side effect on torch's threads."""
    import torch

    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv 1.0.2 imports distutils.log and numba's deprecated names
        import ffcv.writer
    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    return ffcv.writer


def write_with_ffcv(files: ImageFiles, out: Path, *, max_resolution: int, quality: int, workers: int) -> None:
    """Write `files` to `out` as JPEGs of at most `max_resolution` pixels a side with `workers` processes.

    FFCV's code is unchanged except for two things: its progress bar is off, and a worker that died raises `UserError`,
    while FFCV would wait for ever.
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
            raise UserError("a worker of FFCV's DatasetWriter stopped; its own message is above. Check the images.")

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


CACHE = Path("data/bench")
"""Where the photographs are kept, below the current directory."""
MAX_SIDE, SMALL_SIDE, QUALITY = 500, 400, 90
RATIOS = {
    "passthrough_decode_vs_ffcv": ("passthrough_decode", "ffcv_500"),
    "passthrough_header_vs_ffcv": ("passthrough_header", "ffcv_500"),
    "reencode_vs_ffcv": ("reencode", "ffcv_400"),
    "passthrough_header_vs_cp": ("passthrough_header", "cp"),
    "passthrough_header_vs_cp_one_file": ("passthrough_header", "cp_one_file"),
    "passthrough_decode_share_of_decode_limit": ("passthrough_decode", "decode_limit"),
    "passthrough_header_share_of_disk_limit": ("passthrough_header", "disk_limit"),
    "reencode_share_of_decode_limit": ("reencode", "decode_limit"),
    "ffcv_500_share_of_decode_limit": ("ffcv_500", "decode_limit"),
}
LIMITS = (
    "The source files are in memory after the warm-up, so a slow disk or network in front of them does not show.",
    "decode_limit stores nothing and disk_limit reads nothing; a conversion does both, and reads back what it has "
    "written for its checksum.",
    "Our conversions and cp end with their data on the disk (fsync, sync); FFCV's writer leaves them to the system.",
)


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 4000
    """Photographs of 500 x 375 pixels to convert, made once and kept in data/bench."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: photographs)")] = None
    """Convert this directory of class folders (JPEGs below DIR/CLASS/) instead. It cannot be a .beton, which is the
    output."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Threads of our converter, and processes of FFCV's."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: data/bench)")] = None
    """Where the outputs are written, and removed again: the disk under test."""
    memory: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also measure how much memory a conversion takes per image. It writes 115,000 tiny files."""


@dataclass
class _Bench:
    """The data that all cases share."""

    src: Path
    scratch: Path
    files: ImageFiles
    workers: int
    stored: dict[str, dict[str, int]] = field(default_factory=dict)
    """By case, how many images were stored in which way."""

    def cases(self) -> dict[str, Case]:
        """All cases; ours come first, because they name a bad image."""
        return {
            "passthrough_decode": self._convert("passthrough_decode", ImageOptions(MAX_SIDE, QUALITY, "decode")),
            "passthrough_header": self._convert("passthrough_header", ImageOptions(MAX_SIDE, QUALITY, "header")),
            "reencode": self._convert("reencode", ImageOptions(SMALL_SIDE, QUALITY)),
            "ffcv_500": self._ffcv("ffcv_500", MAX_SIDE),
            "ffcv_400": self._ffcv("ffcv_400", SMALL_SIDE),
            "cp": self._copy("cp", self.src, f"the same {len(self.files):,} files"),
            "cp_one_file": self._copy("cp_one_file", self._kept, "one .beton with the same images"),
            **self._limits(),
        }

    def _limits(self) -> dict[str, Case]:
        """The limits of decoding, if there are JPEGs, and of the disk."""
        paths = [self.src / name for name in self.files.names]
        jpegs = decodable(paths)
        decoding = {"decode_limit": decode_case(jpegs, self.workers)} if jpegs else {}
        return {**decoding, "disk_limit": store_case(paths, self.scratch / "disk_limit.bin")}

    @property
    def _kept(self) -> Path:
        """A file with as many bytes as the conversions write."""
        return self.scratch / "kept.beton"

    def prepare(self) -> None:
        """Write the file that `cp_one_file` copies."""
        convert_image_folder(self.src, self._kept, image=ImageOptions(MAX_SIDE, QUALITY, "header"))

    def _convert(self, name: str, image: ImageOptions) -> Case:
        out = self.scratch / f"{name}.beton"

        def run() -> None:
            self.stored[name] = convert_image_folder(self.src, out, image=image, workers=self.workers).manifest.reasons

        setting = (
            f"data_prep imagefolder --max-side {image.max_side} --quality {image.quality} --verify {image.verify}, "
            f"{self.workers} threads; files, checksums and manifest on the disk"
        )
        return self._case(run, setting, lambda: self._check(out))

    def _ffcv(self, name: str, max_resolution: int) -> Case:
        out = self.scratch / f"{name}.beton"

        def run() -> None:
            write_with_ffcv(self.files, out, max_resolution=max_resolution, quality=QUALITY, workers=self.workers)

        setting = (
            f'DatasetWriter, RGBImageField(write_mode="jpg", max_resolution={max_resolution}, '
            f"jpeg_quality={QUALITY}), {self.workers} processes; PIL opens the files"
        )
        return self._case(run, setting, lambda: self._check(out))

    def _copy(self, name: str, src: Path, what: str) -> Case:
        target = self.scratch / name
        copy = ["cp", "-rL", *(["--reflink=never"] if sys.platform == "linux" else [])]

        def run() -> None:
            _command(*copy, str(src), str(target))
            sync(target)

        def check() -> None:
            missing = _total_bytes(src) - _total_bytes(target)
            if missing:
                raise UserError(f"cp left out {missing:,} bytes of {src}.")

        setting = f"{' '.join(copy)} of {what} to where the others write, then sync of that file system"
        return self._case(run, setting, check)

    def _case(self, run: Callable[[], object], setting: str, check: Callable[[], None]) -> Case:
        def after() -> None:
            check()
            self._clear()

        return Case(run, len(self.files), "img/s", setting, after=after)

    def _check(self, out: Path) -> None:
        num_samples = len(read_tables(out).labels)
        if num_samples != len(self.files):
            raise UserError(f"{out} holds {num_samples:,} samples, expected {len(self.files):,}.")

    def _clear(self) -> None:
        """Remove all outputs and sync, so that the disk writes nothing during the next case."""
        for path in self.scratch.iterdir():
            if path.name.startswith(self._kept.name):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        sync(self.scratch)


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all cases.

    The result also has the sections source, workers, stored (how the images were stored) and, if requested, memory.
    Raises `UserError`: a wrong option, an unreadable or bad image, a full disk.
    """
    workers = available_cores() if options.workers is None else options.workers
    if workers < 1:
        raise UserError(f"--workers is {workers}, expected 1 or more. Leave it out for one per core.")
    src = options.data or ensure_photos(CACHE / f"photos_{options.count}", options.count, note=note)
    samples, mean_bytes = _list(src)
    what = "the bench's photographs" if options.data is None else "--data"
    extra: dict[str, Any] = {
        "source": {"what": what, "images": len(samples), "mean_bytes": mean_bytes},
        "workers": workers,
    }
    import_ffcv()
    surroundings = environment()
    with _temporary_directory(options.scratch or CACHE) as scratch:
        bench = _Bench(src, scratch, ImageFiles(src, samples), workers)
        bench.prepare()
        cases, repeats = bench.cases(), options.repeats
        ratios = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(cases)}
        result = measure("prep", cases, ratios, environment=surroundings, repeats=repeats, limits=LIMITS, note=note)
        extra["stored"] = bench.stored
        if options.memory:
            extra["memory"] = memory = measure_memory(scratch, workers, note=note)
            per_image = (f"{case['bytes_per_image']:,.0f} at {int(n):,} images" for n, case in memory["cases"].items())
            found = f"Peak memory of a conversion grows by this many bytes an image: {', '.join(per_image)}."
            result = replace(result, limits=(*result.limits, found))
    return replace(result, extra=extra)


def _total_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are followed."""
    if path.is_file():
        return path.stat().st_size
    return sum((Path(parent) / name).stat().st_size for parent, _, names in os.walk(path) for name in names)


def sync(path: Path) -> None:
    """Write all pending data of the file system of `path` to its disk. Raises `UserError`."""
    if sys.platform == "linux":
        _command("sync", "--file-system", str(path))
    else:
        os.sync()


def _command(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    except OSError as error:
        raise UserError(f"`{command[0]}` cannot be run: {error.strerror}.") from error


def _list(src: Path) -> tuple[list[tuple[str, int]], int]:
    """(file below `src`, label) of each image, and their mean size in bytes."""
    try:
        samples = [(sample.name, sample.label) for sample in image_folder(src).samples]
    except UserError as error:
        raise UserError(str(error).replace("--src", "--data")) from error
    return samples, round(sum((src / name).stat().st_size for name, _ in samples) / len(samples))


@contextmanager
def _temporary_directory(parent: Path) -> Generator[Path]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=parent, prefix=".bench-")
    except OSError as error:
        raise UserError(f"--scratch {parent} cannot be written: {error.strerror}. Choose another.") from error
    with made as folder:
        yield Path(folder)
