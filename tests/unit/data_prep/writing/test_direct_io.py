"""Files past the page cache have the same bytes, whatever the system allows."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.writing import direct_io

PAGE, O_DIRECT = 1 << 21, os.O_DIRECT


@pytest.fixture(params=["direct", "no O_DIRECT", "refused when opened", "refused when used", "short"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that allow less and less."""
    opened, pwrite, preadv = os.open, os.pwrite, os.preadv
    directs = set()

    def open_direct(path, flags, *more, **named):
        if flags & O_DIRECT and request.param == "refused when opened":
            raise OSError(errno.EINVAL, "refused")
        descriptor = opened(path, flags, *more, **named)
        directs.discard(descriptor)
        if flags & O_DIRECT:
            directs.add(descriptor)
        return descriptor

    def refuse(function):
        def refused(descriptor, *more):
            if descriptor in directs:
                raise OSError(errno.EINVAL, "refused")
            return function(descriptor, *more)

        return refused

    if request.param == "no O_DIRECT":
        monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "open", open_direct)
    if request.param == "refused when used":
        monkeypatch.setattr(os, "pwrite", refuse(pwrite))
        monkeypatch.setattr(os, "preadv", refuse(preadv))
    if request.param == "short":
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data[:100_000]), offset))


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_pages_are_written_where_they_belong(tmp_path: Path, folder: str) -> None:
    path = (tmp_path if folder == "disk" else Path("/dev/shm")) / f"lowrank_vit_test_{os.getpid()}.bin"
    if not path.parent.is_dir():
        pytest.skip("no /dev/shm")
    random = np.random.default_rng(0)
    try:
        with path.open("w+b") as file:
            writer, expected = direct_io.PageWriter(path, file), bytearray(4 * PAGE)
            for n in (2, 0, 3):
                page = mmap.mmap(-1, PAGE)
                page[:] = expected[n * PAGE : (n + 1) * PAGE] = random.bytes(PAGE)
                writer.write(page, n * PAGE).result()
            writer.close()
        assert path.read_bytes() == expected
    finally:
        path.unlink()


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("size", [0, 1, 4096, PAGE, direct_io.READ_BYTES, 9 * direct_io.READ_BYTES + 4097])
def test_checksums_are_hashlibs(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "x").write_bytes(content)
    assert direct_io.sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()
