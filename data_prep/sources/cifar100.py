"""CIFAR-100 (Krizhevsky, 2009) from its official archives, in both their forms, packed or unpacked.

The Python form is a pickle, which could run any code when it is read. Here it is read by an unpickler that knows the
three names which the official file needs, and nothing else.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.sources.samples import Sample, Source, Superclasses
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import rename
from lowrank_vit.common.packages import needs

NUM_CLASSES, NUM_COARSE = 100, 20
PIXEL_BYTES = 3 * 32 * 32
RECORD_BYTES = 2 + PIXEL_BYTES
"""Binary form: coarse label, fine label, then the red, green and blue planes of 32 rows of 32 bytes."""
MAX_MEMBER_BYTES = 1 << 29
FOLDERS = ("cifar-100-python", "cifar-100-binary")
ARCHIVES = tuple(f"{folder}{suffix}" for folder in FOLDERS for suffix in (".tar.gz", ".tar"))

Read = Callable[[str], bytes]
"""Returns a member of the archive by its name in the folder; raises `UserError`."""


def cifar100(archive: Path, split: Literal["train", "val"]) -> Source:
    """The 50,000 training or 10,000 test images (as "val"), in the archive's order.

    `archive` is cifar-100-python.tar.gz, cifar-100-binary.tar.gz (or .tar), their folder, or a directory that holds one
    of these. Samples are uint8 (32, 32, 3), labels the fine ones; both forms give the same source.
    Raises `UserError` if there is no such archive, if it is damaged, or if a pickle asks for more than arrays.
    """
    read, form = _open(archive)
    damaged = _Damaged(archive)
    read_form = _read_python if form == "cifar-100-python" else _read_binary
    pixels, fine, coarse, fine_names, coarse_names = read_form(read, "train" if split == "train" else "test", damaged)
    if len(fine) == 0 or not len(pixels) == len(fine) == len(coarse):
        raise damaged(f"it has {len(pixels)} images, {len(fine)} fine and {len(coarse)} coarse labels")
    for name, labels, names, count in (
        ("fine", fine, fine_names, NUM_CLASSES),
        ("coarse", coarse, coarse_names, NUM_COARSE),
    ):
        if len(set(names)) != count or len(names) != count:
            raise damaged(f"it names {len(set(names))} {name} classes, expected {count}")
        if labels.min() < 0 or labels.max() >= count:
            raise damaged(f"a {name} label is outside 0..{count - 1}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    samples = [Sample(int(label), f"{split}/{i:05d}", images[i]) for i, label in enumerate(fine)]
    superclasses = Superclasses(tuple(coarse_names), _coarse_of_fine(fine, coarse, fine_names, damaged))
    return Source(str(archive), tuple(fine_names), samples, superclasses)


def download(directory: Path) -> Path:
    """Fetch the official archive (169 MB) into `directory` unless it is there, check its MD5, return its path.

    A file under that name is always whole, because it is fetched under another one. Raises `UserError`.
    """
    datasets = needs("torchvision.datasets", extra="", to="--download", instead="give --src")
    official, utils = datasets.CIFAR100, datasets.utils
    archive, beside = directory / official.filename, directory / f".{official.filename}.download"
    try:
        if not utils.check_integrity(archive, official.tgz_md5):
            beside.mkdir(parents=True, exist_ok=True)
            utils.download_url(official.url, beside, official.filename, official.tgz_md5)
            rename(beside / official.filename, archive)
            beside.rmdir()
    except (OSError, RuntimeError) as error:  # no network; or a checksum that is wrong
        raise UserError(
            f"{official.url} could not be fetched into {directory}: {error}. Download it by other means, then give "
            f"its path with --src {official.filename}."
        ) from error
    return archive


class _Damaged:
    """Makes the error for an archive whose content is wrong."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive

    def __call__(self, what: str) -> UserError:
        return UserError(
            f"--src {self.archive} is not an official CIFAR-100 archive, or damaged: {what}. "
            "Download it again, for example with --download instead of --src."
        )


def _open(archive: Path) -> tuple[Read, str]:
    """How to read the members of `archive`, and which of `FOLDERS` it is."""
    if archive.is_file():
        return _open_tar(archive)
    for folder in FOLDERS:
        for place in (archive, archive / folder):
            if (place / ("train" if folder == "cifar-100-python" else "train.bin")).is_file():
                return partial(_read_file, archive, place), folder
    for name in ARCHIVES:
        if (archive / name).is_file():
            return _open_tar(archive / name)
    what = "holds no CIFAR-100" if archive.is_dir() else "does not exist"
    raise UserError(
        f"--src {archive} {what}. Give {' or '.join(ARCHIVES[::2])}, a folder that holds it, or --download instead."
    )


def _read_file(archive: Path, folder: Path, name: str) -> bytes:
    try:
        if (folder / name).stat().st_size > MAX_MEMBER_BYTES:
            raise _Damaged(archive)(f"{name} is larger than {MAX_MEMBER_BYTES:,} bytes")
        return (folder / name).read_bytes()
    except OSError as error:
        raise _Damaged(archive)(f"{name} cannot be read ({error.strerror})") from error


def _open_tar(archive: Path) -> tuple[Read, str]:
    wanted = {f"{folder}/{name}" for folder in FOLDERS for name in ("train", "test", "meta")}
    wanted |= {f"cifar-100-binary/{name}" for name in ("train.bin", "test.bin")}
    wanted |= {f"cifar-100-binary/{kind}_label_names.txt" for kind in ("fine", "coarse")}
    damaged = _Damaged(archive)
    members: dict[str, bytes] = {}
    try:
        # Members are read, never unpacked to the disk; one after the other, because gzip cannot go back.
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if name not in wanted or not member.isfile():
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise damaged(f"{name} is larger than {MAX_MEMBER_BYTES:,} bytes")
                file = tar.extractfile(member)
                assert file is not None, name
                members[name] = file.read()
    except UserError:
        raise
    except OSError as error:
        raise damaged(f"it cannot be read ({error})") from error
    except Exception as error:  # tarfile, gzip and zlib raise a dozen kinds on damaged bytes
        raise damaged(f"it does not unpack ({error})") from error
    folder = next((folder for folder in FOLDERS if any(name.startswith(f"{folder}/") for name in members)), None)
    if folder is None:
        raise damaged("it holds neither of the folders " + " and ".join(FOLDERS))

    def read(name: str) -> bytes:
        if f"{folder}/{name}" not in members:
            raise damaged(f"it lacks {folder}/{name}")
        return members[f"{folder}/{name}"]

    return read, folder


def _read_binary(read: Read, member: str, damaged: _Damaged) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any, Any]:
    data = read(f"{member}.bin")
    if len(data) % RECORD_BYTES:
        raise damaged(f"{member}.bin has {len(data):,} bytes, not a multiple of {RECORD_BYTES:,}")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    fine, coarse = (read(f"{kind}_label_names.txt").decode("ascii", "replace").split() for kind in ("fine", "coarse"))
    return records[:, 2:], records[:, 1].astype(np.int64), records[:, 0].astype(np.int64), fine, coarse


def _read_python(read: Read, member: str, damaged: _Damaged) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any, Any]:
    batch, meta = _unpickle(read(member), member, damaged), _unpickle(read("meta"), "meta", damaged)
    pixels = batch.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXEL_BYTES,):
        raise damaged(f"`data` of {member} is not a uint8 array of {PIXEL_BYTES} columns")
    labels = []
    for kind in ("fine", "coarse"):
        values = batch.get(f"{kind}_labels")
        if not isinstance(values, list) or not all(type(value) is int and abs(value) < 1 << 31 for value in values):
            raise damaged(f"`{kind}_labels` of {member} is not a list of integers")
        labels.append(np.array(values, np.int64))
    names = []
    for kind in ("fine", "coarse"):
        values = meta.get(f"{kind}_label_names")
        if not isinstance(values, list) or not all(isinstance(value, bytes | str) for value in values):
            raise damaged(f"`{kind}_label_names` of meta is not a list of names")
        names.append([v.decode("ascii", "replace") if isinstance(v, bytes) else v for v in values])
    return pixels, labels[0], labels[1], names[0], names[1]


class _ForbiddenName(Exception):
    pass


class _ArraysOnly(pickle.Unpickler):
    """Builds dictionaries, lists, strings, numbers and uint8 arrays; all else is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return _NDARRAY
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        raise _ForbiddenName(f"{module}.{name}")


_NDARRAY = object()
"""Stands for `numpy.ndarray` in a pickle, where it is only handed on to `_reconstruct`."""


def _uint8(kind: Any, *flags: Any) -> np.dtype:
    if kind not in (b"u1", "u1"):
        raise _ForbiddenName(f"an array of type {kind!r}")
    return np.dtype(np.uint8)


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """Do what NumPy's `_reconstruct` does: make an array without elements, which gets its state later."""
    if kind is not _NDARRAY:
        raise _ForbiddenName(f"an array of {kind!r}")
    return np.ndarray((0,), np.uint8)


def _unpickle(data: bytes, member: str, damaged: _Damaged) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2, with its keys as text."""
    try:
        content = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except _ForbiddenName as error:
        raise damaged(f"the pickle {member} asks for {error}, which was not run") from error
    except Exception as error:  # damaged pickles raise nearly every built-in exception
        raise damaged(f"{member} is not a whole pickle ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise damaged(f"{member} holds no dictionary")
    return {k.decode("ascii", "replace") if isinstance(k, bytes) else k: v for k, v in content.items()}


def _coarse_of_fine(fine: np.ndarray, coarse: np.ndarray, names: Any, damaged: _Damaged) -> tuple[int, ...]:
    """The coarse class of each fine class; all samples of a fine class must have the same."""
    low, high = np.full(NUM_CLASSES, NUM_COARSE), np.full(NUM_CLASSES, -1)
    np.minimum.at(low, fine, coarse)
    np.maximum.at(high, fine, coarse)
    absent = np.flatnonzero(high < 0)
    if len(absent):
        raise damaged(f"no image of the class {names[absent[0]]}")
    torn = np.flatnonzero(low != high)
    if len(torn):
        raise damaged(f"images of the class {names[torn[0]]} have different coarse labels")
    return tuple(low.tolist())
