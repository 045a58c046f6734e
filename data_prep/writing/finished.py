"""A conversion's last steps, sidecars under hidden names and then renames, and how the same command finds them done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from data_prep.formats.manifest import Manifest, manifest_path, read_manifest, read_manifest_file, write_manifest
from data_prep.formats.sample_table import sample_table_path, write_sample_table
from data_prep.sources.samples import Sample, file_list_sha256
from data_prep.writing.beton import pack_stat
from data_prep.writing.direct_io import sha256_of
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.files import sync_directory


def _pending(out: Path) -> tuple[Path, Path]:
    """Where the sample table and the manifest wait."""
    return out.with_name(f".{out.name}.partial.samples"), out.with_name(f".{out.name}.partial.json")


def write_pending(out: Path, table: bytes, manifest: Manifest) -> None:
    """Put both sidecars of `out` on the disk, not yet under their names. Raises `UserError`."""
    table_path, manifest_file = _pending(out)
    write_sample_table(table_path, table)
    write_manifest(manifest_file, manifest)


def rename_pending(out: Path) -> None:
    """Give both sidecars their names, the manifest last. Raises `UserError`."""
    table_path, manifest_file = _pending(out)
    try:
        table_path.replace(sample_table_path(out))
        manifest_file.replace(manifest_path(out))
    except OSError as error:
        raise UserError(f"the sidecars of {out} cannot be renamed: {error.strerror}. Check its folder.") from error
    sync_directory(out.parent)


def find_finished(
    out: Path,
    key: str,
    files: str,
    samples: Sequence[Sample],
    source_stat: Callable[[Sample], tuple[int, int]],
    on_bad: Literal["error", "skip"],
) -> Manifest | None:
    """The manifest of `out` if the same conversion of the same source files has finished it, else None.

    `key`: of all that decides the bytes; `files`: `file_list_sha256` of `samples`. Sidecars whose renaming a crash has
    prevented are renamed.
    """
    _recover(out, key)
    try:
        manifest = read_manifest(out)
    except BetonError:
        return None
    is_same = manifest.resume_key == key and manifest.file_list_sha256 == files
    if not is_same or not is_whole(out, manifest) or (manifest.skipped and on_bad == "error"):
        return None
    return manifest if _stat_sha256(samples, source_stat) == manifest.source_stat_sha256 else None


def is_current(
    out: Path, manifest: Manifest, samples: Sequence[Sample], source_stat: Callable[[Sample], tuple[int, int]]
) -> bool:
    """Whether `out` is whole and was made of just these source files as they are now.

    Unlike `find_finished` it does not ask where the files lie, by which versions of libraries they were converted and
    with which options. `manifest` is that of `out`.
    """
    return (
        is_whole(out, manifest)
        and manifest.file_list_sha256 == file_list_sha256(samples)
        and manifest.source_stat_sha256 == _stat_sha256(samples, source_stat)
    )


def is_whole(out: Path, manifest: Manifest) -> bool:
    """Whether `out` has the size, and its sample table the content, that its manifest tells."""
    try:
        table = sample_table_path(out).read_bytes()
        return out.stat().st_size == manifest.file_bytes and _sha256(table) == manifest.sample_table_sha256
    except OSError:
        return False


def _stat_sha256(samples: Sequence[Sample], source_stat: Callable[[Sample], tuple[int, int]]) -> str:
    stats = hashlib.sha256()
    for sample in samples:
        stats.update(pack_stat(source_stat(sample)))
    return stats.hexdigest()


def _recover(out: Path, key: str) -> None:
    table_path, manifest_file = _pending(out)
    if not manifest_file.exists() or manifest_path(out).exists():
        return
    with suppress(OSError, UserError):
        manifest = read_manifest_file(manifest_file)
        if manifest.resume_key != key or sha256_of(out) != manifest.sha256:  # a seldom case: there is time to make sure
            return
        if table_path.exists():
            rename_pending(out)
        else:  # the crash came between the two renames
            manifest_file.replace(manifest_path(out))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
