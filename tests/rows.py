"""The photographs of `tests.photos` as others have them: tables of Hugging Face's `datasets`, shards of WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from tests.photos import write_folder

CLASSES = ["flower", "temple"]
PAIRS = list[tuple[bytes, str]]
"""A JPEG's bytes and the name of its class."""


def photos(root: Path) -> PAIRS:
    """Those of `write_folder` below `root`, in the order of the converter."""
    write_folder(root)
    return [(path.read_bytes(), name) for name in CLASSES for path in sorted((root / name).glob("*.jpg"))]


def table(rows: Iterable[tuple[Any, Any]], label: Any = None) -> Any:
    """A `datasets.Dataset` with an image and a label in each row; bytes or None for an image."""
    features = datasets.Features(image=datasets.Image(), label=label or datasets.ClassLabel(names=CLASSES))
    images = ({"bytes": data, "path": f"{n:02d}.jpg"} if data is not None else None for n, (data, _) in enumerate(rows))
    is_named = isinstance(features["label"], datasets.ClassLabel)
    labels = [features["label"].str2int(one) if is_named and isinstance(one, str) else one for _, one in rows]
    return datasets.Dataset.from_dict({"image": list(images), "label": labels}, features=features)


def write_parquet(folder: Path, rows: Iterable[tuple[Any, Any]], split: str = "train", label: Any = None) -> Path:
    """A table as `folder`/SPLIT-00000-of-00001.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    table(list(rows), label).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(key: str, image: bytes | None, label: Any, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """A sample's files: its image and, for a dict .json, else .cls; None for what it lacks."""
    found = [(f"{key}.{suffix}", image)] if image is not None else []
    if isinstance(label, Mapping):
        return [*found, (f"{key}.json", json.dumps(label).encode())]
    return found if label is None else [*found, (f"{key}.cls", str(label).encode())]


def write_shards(folder: Path, rows: PAIRS, count: int = 3, name: str = "x-train") -> Path:
    """`folder`/NAME-000.tar and so on, keys with folders in them."""
    for n in range(count):
        part = range(len(rows) * n // count, len(rows) * (n + 1) // count)
        write_tar(
            folder / f"{name}-{n:03d}.tar", (m for i in part for m in members(f"a.b/{i:04d}", rows[i][0], rows[i][1]))
        )
    return folder
