"""Replace a file so that a reader sees the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_vit.common.errors import UserError


@contextmanager
def replacing(path: Path) -> Generator[io.BufferedRandom]:
    """Yield a hidden file beside `path`, open for writing and reading, that takes `path`'s place at the end.

    On leaving without an error its bytes are on the disk before it is renamed. On any exception, Ctrl-C included, it
    is removed and `path` stays as it was. Raises `UserError` for every `OSError` inside: full disk, no permission.
    """
    # Write through a link rather than replace it: a link to a bigger disk is there for a reason.
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():  # otherwise only the rename at the very end would find out
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not target.parent.exists():  # where the parent is a file, opening says so and `mkdir` does not
            target.parent.mkdir(parents=True, exist_ok=True)
        # Not `tempfile`: it makes files that only their owner can read, whatever the umask.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Check the free space and the permissions of its folder, or give another --out."
        ) from error


def sync_directory(directory: Path) -> None:
    """Put renames and removals in `directory` on the disk, where the file system can do that."""
    with suppress(OSError):  # some network file systems refuse to sync a directory
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
