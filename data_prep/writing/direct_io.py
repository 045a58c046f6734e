"""Write and read large files past the page cache, where the system allows it.

The cache would copy every byte once more, into memory that something else needs, and a file of many gigabytes has left
it anyway before it is read again. Where O_DIRECT is refused, the cache is used.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowrank_vit.common.filesystem import LACKING, open_past_cache
from lowrank_vit.common.threads import beat

READ_BYTES, READS_AHEAD = 1 << 22, 4
PAGES_KEPT = 3
"""Pages in memory, being written or kept: 24 MiB of default pages."""


class PageWriter:
    """Writes whole pages to an open file, in a thread of its own, and keeps the last ones for `sha256_of`."""

    def __init__(self, path: Path, file: io.BufferedRandom) -> None:
        """`file` is `path`, open for writing."""
        self._file, self._direct = file, open_past_cache(path, os.O_WRONLY)
        self._pool = ThreadPoolExecutor(1)
        self._pages: deque[tuple[int, mmap.mmap, Future[None]]] = deque()

    def empty_page(self, size: int) -> mmap.mmap:
        """Memory of `size` bytes to fill, with any content. Raises the `OSError` of the page that was in it before."""
        if len(self._pages) < PAGES_KEPT:
            return mmap.mmap(-1, size)
        _, page, written = self._pages.popleft()
        written.result()
        return page

    def write(self, page: mmap.mmap, offset: int) -> Future[None]:
        """Begin to put `page` at `offset`, a multiple of its size. The result raises `OSError`."""
        written = self._pool.submit(self._write_all, page, offset)
        self._pages.append((offset, page, written))
        return written

    @property
    def kept(self) -> dict[int, mmap.mmap]:
        """The last pages that were written, by their offset."""
        return {offset: page for offset, page, _ in self._pages}

    def _write_all(self, page: mmap.mmap, offset: int) -> None:
        with memoryview(page) as whole:
            done = 0
            while done < len(whole):
                with whole[done:] as rest:
                    done += self._write(rest, offset + done)

    def _write(self, data: memoryview, offset: int) -> int:
        if self._direct is not None:
            try:
                return os.pwrite(self._direct, data, offset)
            except OSError as error:
                # The file system wants another alignment, or a short write has left one.
                if error.errno not in LACKING:
                    raise
                self._close_direct()
        return os.pwrite(self._file.fileno(), data, offset)

    def close(self) -> None:
        """Wait for the last page and close what was opened here; `file` stays open."""
        self._pool.shutdown()
        self._close_direct()

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def sha256_of(path: Path, kept: Mapping[int, mmap.mmap] = MappingProxyType({})) -> str:
    """Hexadecimal SHA-256 of a file; pages `kept` in memory, by offset, are not read again. Raises `OSError`."""
    direct = open_past_cache(path, os.O_RDONLY)
    if direct is not None:
        try:
            return _sha256_of(direct, os.fstat(direct).st_size, kept)
        except OSError as error:
            if error.errno not in LACKING:
                raise
        finally:
            os.close(direct)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(descriptor: int, file_bytes: int, kept: Mapping[int, mmap.mmap]) -> str:
    """`sha256_of` with several reads at a time, since one alone does not keep a fast disk busy."""
    digest = hashlib.sha256()
    parts = _parts(file_bytes, kept)
    with ExitStack() as stack:
        buffers = [stack.enter_context(closing(mmap.mmap(-1, READ_BYTES))) for _ in range(READS_AHEAD)]
        pool = stack.enter_context(ThreadPoolExecutor(READS_AHEAD))

        def begin(buffer: mmap.mmap, part: tuple[int, int, mmap.mmap | None]) -> tuple[mmap.mmap, Any, int]:
            offset, size, page = part
            # The file need not end at a block's end, but a direct read asks for whole blocks.
            return page or buffer, None if page else pool.submit(os.preadv, descriptor, [buffer], offset), size

        reads = deque(begin(buffer, part) for buffer, part in zip(buffers, parts, strict=False))
        spare = deque(buffers)
        while reads:
            source, reading, size = reads.popleft()
            if reading is not None:
                size = min(size, reading.result())
            with memoryview(source) as view, view[:size] as part:
                digest.update(part)
            beat()
            buffer = spare.popleft()
            spare.append(buffer)
            if (following := next(parts, None)) is not None:
                reads.append(begin(buffer, following))
    return digest.hexdigest()


def _parts(file_bytes: int, kept: Mapping[int, mmap.mmap]) -> Iterator[tuple[int, int, mmap.mmap | None]]:
    """(offset, size, page) of consecutive parts: kept pages as they are, the rest without a page and cut up."""
    offset = 0
    for start, page in [*sorted(kept.items()), (file_bytes, None)]:
        while offset < start:
            size = min(READ_BYTES, start - offset)
            yield offset, size, None
            offset += size
        if page is not None:
            yield start, len(page), page
            offset = start + len(page)
