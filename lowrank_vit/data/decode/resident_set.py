"""A whole set, decoded, in the memory of a device: whether there is room for it, and how it gets there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from rich.filesize import decimal as size_in_words
from torch import Tensor

from data_prep.formats.beton import MODE_RAW
from lowrank_vit.common import resources
from lowrank_vit.common.devices import Mark, cuda_path, current_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import bytes_shown
from lowrank_vit.common.threads import beat
from lowrank_vit.data.decode.jpeg import EXACT, decode_jpeg
from lowrank_vit.data.decode.pil import decode_sound
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.index import decoded_bytes

_PART_BYTES = 64 << 20
"""Bytes that are decoded, and copied to a GPU, at a time; the host has memory for two such pieces."""
_READ_BYTES = 8 << 20
"""Bytes that are read from the file at a time, a page as converters write it; a larger image is read whole."""
_SHOWN_BYTES = 1 << 30
"""No progress is shown for fewer bytes: they take seconds."""


class NoRoom(UserError):
    """A device has no memory for a set; the message tells the needed and the free memory, not the set's name."""


class ResidentSet:
    """Images as uint8 RGB one after the other in a device's memory, in the order of the file.

    CPU threads read raw samples from the file many at a time, and decode JPEGs to Pillow's pixels. To a GPU they go
    through two pinned pieces of the host's memory: one is filled while the other is copied.
    """

    def __init__(self, beton: Beton, device: torch.device) -> None:
        """Allocate all memory that `load` needs. Raises `NoRoom`, and then has allocated none."""
        self._beton, self._device = beton, device
        total = beton.decoded_bytes
        if crowded := place_without_room(total, device):
            raise NoRoom(f"{size_in_words(total)} decoded, but {crowded} free")
        self._bounds = _bounds(beton)
        """int64 (N + 1,): first byte of each image, in the order of the file, and the end of the last."""
        self.starts = self._bounds[:-1]
        """int64 (N,): first byte of each image."""
        self._order = None if beton.is_ascending else np.argsort(beton.pointers, kind="stable")
        if self._order is not None:
            sizes = np.diff(self._bounds)
            np.cumsum(sizes[self._order], out=self._bounds[1:])
            self.starts = np.empty_like(sizes)
            self.starts[self._order] = self._bounds[:-1]
        self.damaged: dict[int, str] = {}
        """The reason for each sample that does not decode, by id; complete when all is loaded."""
        try:
            self.pixels = _empty(total, device)
            """uint8 (bytes,)."""
            self.labels = _tensor(beton.labels).to(device)
            """int64 (N,)."""
            self._pieces = [_pinned(min(_PART_BYTES, total), device) for _ in range(2 if cuda_path(device) else 0)]
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError, or CUDA's error for pinned memory
            reason = _reason(error)
        else:
            return
        raise self._no_room(reason)  # not above, where the error keeps the memory alive

    def load(self, workers: int, say: Callable[[str], object] | None = None) -> None:
        """Fill the memory with `workers` threads; `say` gets lines on the progress if that takes long.

        Raises `NoRoom`, and `BetonError` for a file that changed or cannot be read; damaged samples are noted. After an
        error, or Ctrl-C, all memory is released and no thread is left.
        """
        total, begun = int(self._bounds[-1]), time.monotonic()
        say = say if total >= _SHOWN_BYTES else None
        name, told = self._beton.path.name, say or (lambda line: None)
        told(f"loading {name}, {size_in_words(total)} decoded, to {self._device} (once)")
        try:
            with (
                bytes_shown(total, f"loading {name}", say) as advance,
                ThreadPoolExecutor(max(1, workers)) as pool,
            ):
                self._fill(pool, advance)
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = _reason(error)
        except BaseException:
            self.release()
            raise
        else:
            reason, self._pieces = "", []
        if reason:
            raise self._no_room(reason)
        seconds = time.monotonic() - begun
        told(f"  loaded in {seconds:.1f} s ({size_in_words(int(total / max(seconds, 1e-3)))}/s)")

    def _fill(self, pool: ThreadPoolExecutor, advance: Callable[[int], object]) -> None:
        marks = [Mark(None), Mark(None)]
        """Reached when the copies of the two pieces are done."""
        for n, (first, last) in enumerate(_parts(self._bounds[1:], _PART_BYTES)):
            self._beton.check_unchanged(self._ids(first, last))
            begin, end = int(self._bounds[first]), int(self._bounds[last])
            on_device = host = self.pixels[begin:end]
            if self._pieces:
                marks[n % 2].wait_on_host()
                host = self._pieces[n % 2][: end - begin]
                if len(host) < end - begin:  # one large image; the copy from memory of its own waits
                    host = torch.empty(end - begin, dtype=torch.uint8)
            for _ in pool.map(lambda task: task(), self._tasks(first, last, host.numpy())):
                pass
            if self._pieces:
                on_device.copy_(host, non_blocking=True)
                marks[n % 2] = Mark.of(current_stream(self._device))
            advance(end - begin)
        for mark in marks:
            mark.wait_on_host()

    def _ids(self, first: int, last: int) -> np.ndarray:
        """Ids of the samples from one place in the file to another."""
        return np.arange(first, last) if self._order is None else self._order[first:last]

    def _tasks(self, first: int, last: int, host: np.ndarray) -> Iterator[Callable[[], None]]:
        """Functions that fill `host` with the images from one place in the file to another, by reading or decoding."""
        beton, ids, offset = self._beton, self._ids(first, last), int(self._bounds[first])
        is_raw, pointers, sizes = beton.modes[ids] == MODE_RAW, beton.pointers[ids], beton.sizes[ids]
        begins, ends = self.starts[ids] - offset, self._bounds[first + 1 : last + 1] - offset
        n = 0
        while n < len(ids):
            begin, id_ = int(begins[n]), int(ids[n])
            if not is_raw[n]:
                yield partial(self._decode, id_, host[begin : ends[n]])
                n += 1
                continue
            run = n + 1
            while (
                run < len(ids)
                and is_raw[run]
                and pointers[run] == pointers[run - 1] + sizes[run - 1]
                and ends[run] - begin <= _READ_BYTES
            ):
                run += 1
            yield partial(self._read, int(pointers[n]), host[begin : ends[run - 1]])
            n = run

    def _read(self, pointer: int, pixels: np.ndarray) -> None:
        beat()
        self._beton.read_into(pointer, pixels)

    def _decode(self, sample_id: int, pixels: np.ndarray) -> None:
        """Decode as ffcv does in evaluation: with Pillow if libjpeg-turbo has an error or a warning."""
        beat()
        beton, (height, width) = self._beton, map(int, self._beton.sides_of(sample_id))
        is_wrong = beton.contradicts(sample_id)
        try:
            if is_wrong or not decode_jpeg(beton.sample(sample_id), pixels, height, width, EXACT):
                decoded = decode_sound(beton, sample_id)
                if is_wrong:
                    raise ValueError("its JPEG is not of the size that the index says")
                pixels[:] = decoded.reshape(-1)
        except ValueError as error:
            self.damaged[sample_id] = str(error)

    def _no_room(self, reason: str) -> NoRoom:
        """Release all memory, and return the error."""
        self.release()
        taken, free = size_in_words(self._beton.decoded_bytes), size_in_words(free_bytes(self._device))
        return NoRoom(f"{taken} decoded, but {self._device}, where {free} are free, has no room ({reason})")

    def release(self) -> None:
        """Release the memory, also for other processes on the device."""
        self.pixels, self._pieces = torch.empty(0, dtype=torch.uint8), list[Tensor]()
        if cuda_path(self._device):
            torch.cuda.empty_cache()


def _bounds(beton: Beton) -> np.ndarray:
    """int64 (N + 1,): the first byte of each image if they were in the order of their ids, and the end."""
    bounds, at = np.zeros(beton.num_samples + 1, np.int64), 1
    for block in beton.blocks():
        sizes = decoded_bytes(block)
        bounds[at : at + len(sizes)] = sizes
        at += len(sizes)
    return np.cumsum(bounds, out=bounds)


def _tensor(read_only: np.ndarray) -> Tensor:
    """A tensor of a read-only array, without torch's warning; it must not be written to, either."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(read_only)


def place_without_room(size: int, device: torch.device) -> str:
    """Words such as "cpu has 1.5 GB" if `size` bytes do not fit; empty if they do."""
    free = free_bytes(device)
    return f"{device} has {size_in_words(free)}" if size > free else ""


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now: on a GPU the driver's free memory and torch's unused cache."""
    if cuda_path(device):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return resources.memory().free


def _reason(error: BaseException) -> str:
    """An error in one sentence: torch's texts go on for a page."""
    first = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _empty(size: int, device: torch.device) -> Tensor:
    """Memory for pixels; on a CPU pages are taken only when written, so that damaged samples cost nothing."""
    if cuda_path(device):
        return torch.empty(size, dtype=torch.uint8, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8))


def _pinned(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=cuda_path(device))


def _parts(ends: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of images of at most `limit` bytes together, or a single larger image; `ends`: the end of each image."""
    first = 0
    while first < len(ends):
        begin = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + limit, side="right")))
        yield first, last
        first = last
