"""The files beside a `.beton`: the manifest `FILE.beton.json` and the table of its samples `FILE.beton.samples`.

The manifest holds what a `.beton` cannot (class names, origin, checksum, skipped images). A conversion first writes the
new sidecars beside the unfinished file under hidden names and removes the old ones. Then it renames the new `.beton`,
the new sample table and last the new manifest. The renames are not one step, so a crash may leave a `.beton` without a
manifest, but never beside the manifest of another file; the same command then finishes the renames.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.sources.samples import Superclasses
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.files import write_whole, writing
from lowrank_vit.common.filesystem import sync_directory

SCHEMA_VERSION = 1
"""Goes up when the meaning of a key changes; new keys alone leave it, since readers ignore keys they do not know."""
_NAMES_SHOWN = 10
ADVICE = "Check the free space and the permissions of its folder, or give another --out."
"""The next step when a conversion cannot write a file."""
CONVERTER_VERSION = 3
"""Goes up when the same source and options give other bytes than before."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A source image that is not in the `.beton`."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """A source image whose bytes were mended; its picture is whole."""

    name: str
    repairs: tuple[str, ...]
    """Which of `data_prep.formats.jpeg_segments.REPAIRS` were made."""


@dataclass(frozen=True)
class Manifest:
    """The sidecar's content; two conversions of the same source with the same libraries give equal ones."""

    num_samples: int
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    reasons: dict[str, int]
    """How many samples were stored for which reason; see `data_prep.formats.jpeg`."""
    skipped: tuple[Skipped, ...]
    source: str
    """The source as the user gave it."""
    options: dict[str, str | int | bool | None]
    """The options that decide the bytes; the number of workers is not one of them."""
    libraries: dict[str, str]
    """Versions of what decoded and encoded the images."""
    file_bytes: int
    sha256: str
    """Hexadecimal, of the whole `.beton`."""
    index_xxh3: str = ""
    """`beton.index_checksum` of header, rows and allocation table; empty in manifests of earlier versions,
    until `verify` adds it."""
    sample_bytes: int = 0
    """Sum of the samples' sizes; the rest of `file_bytes` is tables and padding."""
    page_size: int = 0
    file_list_sha256: str = ""
    """`samples.file_list_sha256` of the labels and names of all source images."""
    whole_list_sha256: str = ""
    """`samples.file_list_sha256` of the source before it was divided into parts."""
    source_stat_sha256: str = ""
    """SHA-256 of the source files' sizes and modification times; see `data_prep.writing.resuming.pack_stat`."""
    resume_key: str = ""
    """SHA-256 of everything but the source files that decides the bytes; it identifies a finished conversion."""
    sample_table_sha256: str = ""
    """SHA-256 of the sidecar `FILE.beton.samples`."""
    shard: tuple[int, int] | None = None
    """(i, n): this is part i of n, counted from 1."""
    superclasses: Superclasses | None = None
    """A coarser grouping of the classes."""
    repaired: tuple[Repaired, ...] = ()
    empty_classes: tuple[str, ...] = ()
    """Classes of which no image is left, since all of them were bad and `--on-bad skip` was given."""
    revision: str = ""
    """The version of a published data set, such as a commit of the hub; empty if unknown."""
    fingerprint: str = ""
    """SHA-256 of the names, sizes and times of the files that hold the source's rows; empty for folders of images,
    whose files are compared one by one, and for data that are in no file."""
    schema_version: int = SCHEMA_VERSION
    converter_version: int = CONVERTER_VERSION


def emptied_line(manifest: Manifest) -> str:
    """A sentence on the classes that skipping has emptied; an empty string if there are none."""
    names = manifest.empty_classes
    if not names:
        return ""
    shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN:,} more" * (len(names) > _NAMES_SHOWN))
    where = f" in part {manifest.shard[0]} of {manifest.shard[1]}" if manifest.shard else ""
    which = f"class {shown}: its" if len(names) == 1 else f"classes {shown}: their"
    return f"no image is left of {which} images{where} were all bad"


def doubt_line(reasons: Mapping[str, int]) -> str:
    """A sentence on images that an earlier converter took though they may be damaged; empty if there are none."""
    count = reasons.get("extraneous", 0)
    return (
        f"{count:,} images have surplus bytes, which may be remains of overwritten data; an earlier version of the "
        "converter took them all the same. Remove the file and convert again to find damaged images"
        if count
        else ""
    )


def manifest_path(beton: Path) -> Path:
    """Where the manifest of `beton` lies: FILE.beton -> FILE.beton.json."""
    return beton.with_name(beton.name + ".json")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest to `path` atomically. Raises `UserError` if it cannot be written."""
    _write(path, asdict(manifest))


def manifest_text(content: dict[str, Any]) -> str:
    """The text of a manifest file; `content` holds the fields of a `Manifest`."""
    content = {key: value for key, value in content.items() if value or key != "index_xxh3"}
    return json.dumps({**content, "manifest_sha256": _own_sha256(content)}, indent=1) + "\n"


def _write(path: Path, content: dict[str, Any]) -> None:
    with writing(path, ADVICE):
        write_whole(path, manifest_text(content))


def add_index_checksum(beton: Path, index_xxh3: str) -> None:
    """Write the index's checksum into a manifest that has none; its other keys stay, unknown ones too.

    Raises `UserError` if it cannot be written.
    """
    path = manifest_path(beton)
    _write(path, {**json.loads(path.read_bytes()), "index_xxh3": index_xxh3})


def check_index(beton: Path, index_xxh3: str, manifest: Manifest) -> None:
    """Raise `BetonError` if the checksum of the index of `beton` is not the one in its manifest."""
    if manifest.index_xxh3 and manifest.index_xxh3 != index_xxh3:
        raise BetonError(
            f"{beton}: its index (header, sizes, labels, addresses) is not the one that was written: its checksum is "
            f"not that in {manifest_path(beton).name}. `python -m data_prep verify {beton}` names the samples. Copy "
            "the file again, or convert the source again."
        )


def _own_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of all the other keys, as JSON without spaces and with sorted keys."""
    others = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def remove_manifest(beton: Path) -> None:
    """Remove the manifest of `beton`, if there is one, before `beton` is replaced. Raises `OSError`."""
    path = manifest_path(beton)
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_manifest(beton: Path) -> Manifest:
    """Read and check the manifest of `beton`. Raises `BetonError` if it is missing, damaged, changed or too new."""
    return read_manifest_file(manifest_path(beton))


def read_manifest_file(path: Path) -> Manifest:
    """`read_manifest`, by the manifest's own path."""
    again = "Convert the source again with `python -m data_prep`."
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BetonError(
            f"{path} is missing: the conversion was cut off, or it was not copied along. {again}"
        ) from error
    except OSError as error:
        raise BetonError(f"{path} cannot be read: {error.strerror}. Check its permissions and the disk.") from error
    except (ValueError, RecursionError) as error:
        raise BetonError(f"{path} is not valid JSON: {error}. {again}") from error
    try:
        manifest = _from_json(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"lacks the key {error}" if isinstance(error, KeyError) else str(error)
        raise BetonError(f"{path} is not a manifest of this version: {what}. {again}") from error
    if content.get("manifest_sha256", "") not in ("", _own_sha256(content)):
        raise BetonError(
            f"{path} was changed after the conversion: it has another SHA-256. Copy it again, or convert again."
        )
    return manifest


def _from_json(content: Any) -> Manifest:
    if not isinstance(content, dict):
        raise TypeError(f"expected an object, found {type(content).__name__}")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {content['schema_version']!r}, expected {SCHEMA_VERSION}")
    # Keys that came later have defaults, so that a manifest of an earlier converter is read too.
    always = {f.name for f in fields(Manifest) if f.default is MISSING} | {"schema_version", "converter_version"}
    values = {f.name: content[f.name] if f.name in always else content.get(f.name, f.default) for f in fields(Manifest)}
    for names, kind in (
        (("num_samples", "file_bytes", "converter_version", "sample_bytes", "page_size"), int),
        (("source", "sha256", "file_list_sha256", "whole_list_sha256", "source_stat_sha256"), str),
        (("sample_table_sha256", "resume_key", "index_xxh3", "revision", "fingerprint"), str),
        (("classes", "skipped"), list),
        (("repaired", "empty_classes"), (list, tuple)),
        (("reasons", "options", "libraries"), dict),
    ):
        for name in names:
            if not isinstance(values[name], kind):
                expected = kind.__name__ if isinstance(kind, type) else kind[0].__name__
                raise TypeError(f"{name} is {type(values[name]).__name__}, expected {expected}")
    if {*map(type, values["classes"])} - {str}:  # 10,000 parts tell of all classes each
        raise TypeError("classes holds something that is not a string")
    if not all(isinstance(count, int) for count in values["reasons"].values()):
        raise TypeError("reasons holds something that is not a number")
    values["skipped"] = tuple(Skipped(name=entry["name"], reason=entry["reason"]) for entry in values["skipped"])
    if "index_xxh3" in content and not re.fullmatch("[0-9a-f]{16}", values["index_xxh3"]):
        raise ValueError("index_xxh3 is not 16 hexadecimal digits")
    values["repaired"] = tuple(
        Repaired(entry["name"], tuple(map(str, entry["repairs"]))) for entry in values["repaired"]
    )
    values["classes"], values["empty_classes"] = tuple(values["classes"]), tuple(map(str, values["empty_classes"]))
    if values["shard"] is not None:
        index, count = values["shard"]
        values["shard"] = int(index), int(count)
    if values["superclasses"] is not None:
        names, of_class = values["superclasses"]["names"], values["superclasses"]["of_class"]
        values["superclasses"] = Superclasses(tuple(map(str, names)), tuple(map(int, of_class)))
    return Manifest(**values)
