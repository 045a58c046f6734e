"""Limits of the machine, measured in the same rounds as the cases that are compared with them.

Each limit is a case that does only the least work of the measured cases: a model's products as one large matrix
product, the copy of a batch, the decoding of the files. A case's ratio to it is its share of the limit.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness.measure import Case
from data_prep.formats import turbojpeg
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import open_past_cache, sync

_PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}
_BLOCK, _READS_AHEAD = 1 << 20, 4
_JPEG_START = b"\xff\xd8"
_HELD_BATCHES = 4
"""Different batches to copy from, so that the source is not in a cache."""


@dataclass(frozen=True)
class Products:
    """Square matrix products of at least a given number of FLOPs."""

    a: Tensor
    b: Tensor
    out: Tensor
    count: int

    @classmethod
    def of(cls, flops: float, device: torch.device, dtype: torch.dtype) -> Products:
        """The smallest number of products with at least `flops` FLOPs (a multiply-add counts as two)."""
        side = _PRODUCT_SIDE[device.type]
        # Random, since a GPU at its power limit is faster on zeros.
        generator = torch.Generator(device).manual_seed(0)
        a, b, out = (torch.rand(side, side, device=device, generator=generator).to(dtype) for _ in range(3))
        return cls(a, b, out, math.ceil(flops / (2 * side**3)))

    @property
    def flops(self) -> int:
        """FLOPs of all products together."""
        return self.count * 2 * len(self.a) ** 3

    def run(self) -> None:
        """Compute the products, and wait for the device."""
        for _ in range(self.count):
            torch.matmul(self.a, self.b, out=self.out)
        wait(self.a.device)


def products_case(
    flops_per_item: float,
    items: int,
    unit: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    unit_flops: float | None = None,
) -> Case:
    """Items per second if all the arithmetic of an item ran at the speed of one large matrix product.

    `unit_flops`: count units of so many FLOPs instead of items.
    """
    products = Products.of(flops_per_item * items, device, dtype)
    side = len(products.a)
    what = "" if unit_flops else f", the FLOPs of {items:,} items"
    matrices = f"{side} x {side} {str(dtype).removeprefix('torch.')} matrices"
    setting = f"limit: {products.count} product{'s' * (products.count > 1)} of {matrices}{what}"
    # A rounded-up number of products counts as more items, so rounding has no effect.
    return Case(products.run, products.flops / (unit_flops or flops_per_item), unit, setting)


def decode_case(files: Sequence[Path], workers: int) -> Case:
    """Images per second if whole JPEGs are only read from the page cache and decoded by libjpeg-turbo."""

    def size_of(file: Path) -> tuple[int, int]:
        with Image.open(file, formats=("JPEG",)) as image:
            return image.size

    sizes = [size_of(file) for file in files]

    def decode(n: int) -> None:
        turbojpeg.decode(files[n].read_bytes(), *sizes[n])

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(_decode_share, decode, share) for share in shares]:
                done.result()

    shares = [range(worker, len(files), workers) for worker in range(workers)]
    return Case(run, len(files), setting=f"limit: libjpeg-turbo alone, whole images, {workers} threads")


def decodable(files: Sequence[Path], at_most: int = 2000) -> list[Path]:
    """Of `at_most` files from all over the list, those that libjpeg-turbo decodes to RGB."""
    found = []
    for file in files[:: max(1, len(files) // at_most)][:at_most]:
        data = file.read_bytes()
        if not data.startswith(_JPEG_START):
            continue
        try:
            with Image.open(file, formats=("JPEG",)) as image:
                turbojpeg.decode(data, *image.size)
        except Exception:  # Pillow raises nearly every built-in exception on damaged files
            continue
        found.append(file)
    return found


def _decode_share(decode: Callable[[int], None], share: range) -> None:
    for n in share:
        decode(n)


def normalizing_case(images: Tensor, repeats: int) -> Case:
    """Images per second if uint8 images are only converted to float32: reading and writing a batch, no arithmetic."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)

    def run() -> None:
        for _ in range(repeats):
            out.copy_(images)
        wait(images.device)

    return Case(run, len(images) * repeats, setting="limit: the images are read and written as float32, nothing else")


def batch_copy_case(count: int, batch_size: int, side: int, device: torch.device) -> Case:
    """Images per second if decoded images of `side` pixels are only copied, each batch into its own memory."""
    images = torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, device=device)
    held = [images, *(torch.empty_like(images).copy_(images) for _ in range(_HELD_BATCHES - 1))]
    batches = max(1, count // batch_size)

    def run() -> None:
        for n in range(batches):
            torch.empty_like(images).copy_(held[n % len(held)])
        wait(device)

    setting = f"limit: {side}-pixel images copied once, batch by batch into new memory on {device}"
    return Case(run, batches * batch_size, setting=setting)


def copy_case(source: Tensor, target: Tensor, repeats: int) -> Case:
    """GB/s (10^9 bytes) of copying memory; within one device each byte counts twice, as read and as written."""
    assert source.nbytes == target.nbytes

    def run() -> None:
        for _ in range(repeats):
            target.copy_(source, non_blocking=True)
        wait(source.device)
        wait(target.device)

    is_inside = source.device == target.device
    counted = "read and write counted" if is_inside else f"from {source.device.type} to {target.device.type}"
    gb = (2 if is_inside else 1) * source.nbytes * repeats / 1e9
    return Case(run, gb, "GB/s", f"{source.nbytes / 1e6:,.0f} MB copied {repeats} times, {counted}")


def page_cache_case(file: Path) -> Case:
    """GB/s of reading a file from the page cache into the same buffer repeatedly."""
    buffer = memoryview(mmap.mmap(-1, _BLOCK))

    def run() -> None:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    return Case(run, file.stat().st_size / 1e9, "GB/s", f"{file.name} read in blocks of 1 MiB from the page cache")


def disk_write_case(file: Path, num_bytes: int) -> Case:
    """GB/s of writing `num_bytes` to `file`, bypassing the page cache if possible, until they are on the disk."""
    block = _random_block()
    blocks = max(1, num_bytes // _BLOCK)

    def run() -> None:
        try:
            descriptor, _ = _open_past_cache(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(descriptor, "wb", buffering=0) as opened:
                for _ in range(blocks):
                    if opened.write(block) != _BLOCK:
                        raise OSError(errno.ENOSPC, "No space left on device")
                sync(descriptor)
        except OSError as error:
            raise UserError(
                f"{file} cannot be written: {error.strerror}. Choose --scratch on a larger disk."
            ) from error

    way = _way_of(file, os.O_WRONLY | os.O_CREAT)
    return Case(run, blocks * _BLOCK / 1e9, "GB/s", f"{blocks:,} MiB written in blocks of 1 MiB {way}, then fsync")


def disk_read_case(file: Path) -> Case:
    """GB/s of reading `file` from the disk, bypassing the page cache if possible; its size is a multiple of 1 MiB."""
    buffers = [mmap.mmap(-1, _BLOCK) for _ in range(_READS_AHEAD)]  # several at a time keep a fast disk busy
    blocks = file.stat().st_size // _BLOCK

    def read(descriptor: int, share: range, buffer: mmap.mmap) -> None:
        for block in share:
            os.preadv(descriptor, [buffer], block * _BLOCK)

    def run() -> None:
        descriptor, _ = _open_past_cache(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(_READS_AHEAD) as pool:
                shares = [range(n, blocks, _READS_AHEAD) for n in range(_READS_AHEAD)]
                for done in [pool.submit(read, descriptor, *of) for of in zip(shares, buffers, strict=True)]:
                    done.result()
        finally:
            os.close(descriptor)

    way = _way_of(file, os.O_RDONLY)
    return Case(
        run, blocks * _BLOCK / 1e9, "GB/s", f"{file.name} read in blocks of 1 MiB, {_READS_AHEAD} at a time, {way}"
    )


def store_case(files: Sequence[Path], out: Path) -> Case:
    """Images per second if the bytes of the files, from memory, are only written to one file on the disk."""
    num_bytes = sum(file.stat().st_size for file in files)
    case = disk_write_case(out, num_bytes)
    setting = f"limit: as many bytes as the images have, {case.setting}"
    return Case(case.run, len(files) * case.items * 1e9 / num_bytes, setting=setting, after=lambda: out.unlink())


def _random_block() -> mmap.mmap:
    block = mmap.mmap(-1, _BLOCK)  # page-aligned, as O_DIRECT needs it
    block.write(os.urandom(_BLOCK))
    return block


def _open_past_cache(file: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it bypasses the page cache, which some file systems refuse."""
    direct = open_past_cache(file, flags)
    return (os.open(file, flags), False) if direct is None else (direct, True)


def _way_of(file: Path, flags: int) -> str:
    descriptor, is_direct = _open_past_cache(file, flags)
    os.close(descriptor)
    return "past the page cache (O_DIRECT)" if is_direct else "through the page cache, which this disk insists on"


def wait(device: torch.device) -> None:
    """Wait for work queued on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
