"""Operations that not every file system has, with substitutes; used wherever a file is written or mapped.

Network file systems (NFS, Lustre, SMB), FUSE, overlays and object stores each lack some of: links, syncing a file or
a folder, renaming from folder to folder, mappings that are shared, and files past the page cache. (For locks see
`lowrank_vit.common.locks`.)
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

LACKING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
"""Error numbers of calls that a file system does not have."""
_NETWORKED = frozenset(
    "nfs nfs4 lustre gpfs beegfs ceph cifs smb3 panfs wekafs pvfs2 gfs2 ocfs2 fuse.glusterfs fuse.juicefs".split()
)
"""Types of file systems whose source (/proc/self/mountinfo) names the same one on every machine."""
_UNSHARED = (*LACKING, errno.ENODEV, errno.EPERM, errno.EACCES)
T = TypeVar("T")
_MAP_FIXED = 0x10  # which Python does not name


def sync(descriptor: int) -> None:
    """Put a file on the disk (fsync), if the file system can do that. Raises `OSError` if the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def sync_directory(directory: Path) -> None:
    """Put renames and removals in `directory` on the disk, if the file system can do that."""
    with suppress(OSError):  # some refuse to open a directory, or to sync one
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder another name, at once; copy it if the file system refuses (EXDEV). Raises `OSError`.

    A file at `target` is replaced. An overlay may refuse within one folder, too: then `target` is written in place.
    """
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
            shutil.rmtree(source, ignore_errors=True)
            return
        copy = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            _copy(source, copy)
            try:
                copy.replace(target)
            except OSError as again:
                if again.errno != errno.EXDEV:
                    raise
                _copy(source, target)
        finally:
            copy.unlink(missing_ok=True)
        source.unlink()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing)
        writing.flush()
        sync(writing.fileno())


def hard_link(existing: Path, path: Path) -> bool:
    """Give a file a second name; False if it cannot have one (EPERM, EOPNOTSUPP, EMLINK ...): then copy it."""
    try:
        os.link(existing, path)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def symbolic_link(path: Path, target: Path | str, *, is_folder: bool = False) -> bool:
    """Make `path` point to `target`; False if there are no such links, or `path` cannot be made."""
    try:
        path.symlink_to(target, target_is_directory=is_folder)
    except OSError:
        return False
    return True


def open_past_cache(path: Path, flags: int) -> int | None:
    """Open a file past the page cache (O_DIRECT); None if that is refused: then open it as usual.

    Reading and writing may still be refused, by one of `LACKING`, if the file system wants another alignment.
    """
    direct: int | None = getattr(os, "O_DIRECT", None)
    with suppress(OSError):  # for any other reason, the usual way gives a better error
        return None if direct is None else os.open(path, flags | direct)
    return None


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`; None if unknown."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some file systems report only zeros


def place_of(path: Path) -> list[object]:
    """A value that is equal (as JSON) if processes, also on several machines, mean the same folder by a path.

    It holds the path, and on a file system that machines share its type, its source and the folder's inode; on any
    other the machine, too. For a path that does not exist yet, the inode of the nearest folder above it.
    """
    there = path = Path(os.path.abspath(path))  # noqa: PTH100  not `resolve`: what is returned is this path's spelling
    while not there.exists() and there != there.parent:
        there = there.parent
    stat = there.stat()
    shared = _shared_by_machines(stat.st_dev)
    where = shared or [_machine(), stat.st_dev]
    return [str(path), *where, stat.st_ino]


def _shared_by_machines(device: int) -> list[object]:
    """Type and source of the mounted file system with this device number if it is a network's; else empty."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            mounted, _, of_system = line.partition(" - ")
            if mounted.split(" ")[2] == number:
                kind, source = of_system.split(" ")[:2]
                return [kind, source] if kind in _NETWORKED else []
    return []


def _machine() -> str:
    """An id that no other machine has, nor this one after its next start."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; privately if the file system has no shared mappings. Raises `OSError`."""
    with path.open("rb") as file:
        return map_descriptor(file.fileno())


def map_descriptor(descriptor: int) -> mmap.mmap:
    """`map_file` of an open file, which may be closed afterwards."""
    return _shared_or_private(lambda flag: mmap.mmap(descriptor, 0, flags=flag, prot=mmap.PROT_READ))


def starts_of(sizes: Sequence[int]) -> list[int]:
    """The offsets at which `map_files` puts files of `sizes` bytes, and the end of the last."""
    return [0, *accumulate(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)]


class MappedFiles(NamedTuple):
    """Files mapped one after the other in memory; none of them stays open."""

    bytes: np.ndarray
    """uint8 (bytes,), read-only."""
    starts: np.ndarray
    """int64 (files,): the offset at which each begins."""
    ids: list[tuple[int, int]]
    """Device and inode of each."""


def map_files(paths: Sequence[Path], sizes: Sequence[int]) -> MappedFiles:
    """Map files of `sizes` bytes, each from a multiple of the machine's page size on; the gaps read as zeros.

    Raises `OSError`.
    """
    import numpy as np  # takes a tenth of a second, which most commands need not spend here

    if len(paths) == 1:
        with paths[0].open("rb") as file:
            found = os.fstat(file.fileno())
            array = np.frombuffer(map_descriptor(file.fileno()), np.uint8)
        return MappedFiles(array, np.zeros(1, np.int64), [(found.st_dev, found.st_ino)])
    *starts, end = starts_of(sizes)
    # Reserve the addresses with an empty private map, then map each file over its part (mmap(2), MAP_FIXED). All is
    # unmapped with the reservation, when the last view of the array is gone.
    whole = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    array, ids = np.frombuffer(whole, np.uint8), list[tuple[int, int]]()
    for path, size, start in zip(paths, sizes, starts, strict=True):
        address = array.ctypes.data + start
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            _shared_or_private(lambda flag, at=address, size=size, file=file: _map_at(at, size, flag, file.fileno()))
        ids.append((found.st_dev, found.st_ino))
    return MappedFiles(array, np.array(starts, np.int64), ids)


def read_by_pieces(mapped: np.ndarray) -> None:
    """Tell the kernel that a mapped stretch is read in small pieces at any places, so that it reads nothing ahead.

    A page that is in memory already is then mapped in 6 us instead of 10 to 60, measured on Linux 6.18.
    """
    _advise(mapped, mmap.MADV_RANDOM)


def read_through(mapped: np.ndarray) -> None:
    """Bring all of a one-dimensional mapped array, such as a column of a table, into memory, despite `read_by_pieces`.

    A column of 14 million rows was read from the disk in 0.2 to 0.8 s instead of 7 to 13, on Linux 6.18.
    """
    _advise(mapped, mmap.MADV_NORMAL)
    # One element a page. (MADV_WILLNEED reads only the first part of so long a stretch: it took as long as without.)
    mapped[:: max(1, mmap.PAGESIZE // mapped.strides[0])].max(initial=0)
    _advise(mapped, mmap.MADV_RANDOM)


def _advise(mapped: np.ndarray, advice: int) -> None:
    """Call madvise(2) on all pages between an array's ends; if the file system does not take it, nothing is lost."""
    if not mapped.size:
        return
    span = sum((length - 1) * stride for length, stride in zip(mapped.shape, mapped.strides, strict=True))
    start = mapped.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = mapped.ctypes.data + span + mapped.itemsize - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def can_be_read(byte: memoryview) -> bool:
    """Whether a byte of a mapped file can be read; if the file was cut shorter, reading kills the process (SIGBUS).

    An empty view, as from beyond the map, cannot be read. The kernel reads the byte for us, and reports EFAULT. Raises
    `OSError` if no pipe can be made.
    """
    reading, writing = os.pipe()
    try:
        return os.write(writing, byte) == 1
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(reading)
        os.close(writing)


def _shared_or_private(map_with: Callable[[int], T]) -> T:
    try:
        return map_with(mmap.MAP_SHARED)
    except OSError as error:
        if error.errno not in _UNSHARED:
            raise
        return map_with(mmap.MAP_PRIVATE)


def _map_at(address: int, size: int, flag: int, descriptor: int) -> None:
    """Map a file over the present mapping at an address. Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    if libc.mmap(address, size, mmap.PROT_READ, flag | _MAP_FIXED, descriptor, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
