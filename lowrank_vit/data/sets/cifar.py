"""`--dataset torch/cifar100`: the data root, the archive in it or downloaded, and its conversion."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.formats.sidecars import manifest_path
from data_prep.sources.image_folder import SPLIT_NAMES
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say, one_process_in
from lowrank_vit.data.sets.made_once import manifest_of

FOLDER = "cifar100.lowrank_vit"
"""Folder of the converted files below the data root."""
TORCH_DATASETS = Path("~/.cache/torch/datasets")
HERE = Path("data")
_ARCHIVES = ("cifar-100-python", "cifar-100-python.tar.gz", "cifar-100-binary", "cifar-100-binary.tar.gz")
"""torchvision's names of the archive, unpacked or packed."""
_NAMES = "train.beton", "val.beton"


@dataclass(frozen=True)
class _Root:
    path: Path
    why: str


def cifar100(
    data_dir: Path | None,
    beton_dir: Path | None,
    *,
    download: bool,
    splits: tuple[str, str],
    say: Say,
    flag: str = "--data-dir",
) -> tuple[Path, Path]:
    """train.beton and val.beton of CIFAR-100, which are converted now from the archive in the data root if need be.

    The data root is `data_dir`, else `~/.cache/torch/datasets` or ./data: the first that holds CIFAR-100, or else the
    first that can be written. `download` fetches the archive if it is missing or damaged. `splits` names the training
    and the validation split and must be CIFAR-100's own (`test` is the validation set). `flag` is the command's name
    for `data_dir`. Raises `UserError`.
    """
    _check_splits(*splits)
    root = _root(data_dir, beton_dir, flag)
    say(f"CIFAR-100: data root {root.path} ({root.why})")
    out_dir = beton_dir or root.path / FOLDER
    for folder in (root.path, out_dir):
        if _is_converted(folder, root.path):
            return folder / _NAMES[0], folder / _NAMES[1]
    if find_archive(root.path) is None and not download:
        raise UserError(
            f"--dataset torch/cifar100: {root.path} holds neither {_ARCHIVES[0]}/ nor {_ARCHIVES[1]}. Add "
            f"--dataset-download (169 MB), or give the folder that holds one with {flag}."
        )
    with one_process_in(out_dir, say, f"Give a folder that can be written with {flag} or --beton-dir."):
        if not _is_converted(out_dir, root.path):  # by another process meanwhile
            # Only now: before we hold the lock, another process may be writing a file without a manifest.
            if any((out_dir / name).exists() and not _is_cifar100(out_dir / name) for name in _NAMES):
                raise UserError(f"{out_dir} holds a train.beton or val.beton of other data. Give another --beton-dir.")
            _convert(root.path, out_dir, download, say)
    return out_dir / _NAMES[0], out_dir / _NAMES[1]


def find_archive(root: Path) -> Path | None:
    """The archive of CIFAR-100 in `root`, unpacked or packed; `root` may be its folder itself."""
    if root.name in _ARCHIVES and (root.is_file() or (root / "meta").is_file()):
        return root
    return next((root / name for name in _ARCHIVES if (root / name).exists()), None)


def _check_splits(train: str, val: str) -> None:
    if train not in SPLIT_NAMES["train"] or val not in (*SPLIT_NAMES["val"], "test"):
        raise UserError(
            f"--train-split {train} --val-split {val}: CIFAR-100 has the splits train (50,000 images) and test, which "
            "is also called validation (10,000). Leave both flags out."
        )


def _root(data_dir: Path | None, beton_dir: Path | None, flag: str) -> _Root:
    if data_dir is not None:
        return _Root(data_dir, flag)
    usual = TORCH_DATASETS.expanduser()
    for path in (usual, HERE):
        if find_archive(path) or any(_is_converted(folder, path) for folder in (beton_dir or path / FOLDER, path)):
            return _Root(path, f"CIFAR-100 is there; {flag} chooses another")
    if _can_be_written(usual):
        return _Root(usual, f"the default; {flag} chooses another")
    return _Root(HERE, f"since {usual} cannot be written; {flag} chooses another")


def _can_be_written(folder: Path) -> bool:
    """Whether `folder` could be written, or be made and written; nothing is made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _is_cifar100(beton: Path) -> bool:
    manifest = manifest_of(beton)
    return manifest is not None and len(manifest.classes) == 100 and manifest.superclasses is not None


def _is_converted(folder: Path, root: Path) -> bool:
    """Whether both files exist, are CIFAR-100's, whole, and not older than an archive in `root`."""
    betons = [folder / name for name in _NAMES]
    if not all(_is_cifar100(beton) for beton in betons):
        return False
    manifests = [(beton, manifest_of(beton)) for beton in betons]
    if any(manifest is None or beton.stat().st_size != manifest.file_bytes for beton, manifest in manifests):
        return False
    archive = find_archive(root)
    written = min(manifest_path(beton).stat().st_mtime for beton in betons)
    return archive is None or folder == root or _newest(archive) <= written


def _newest(archive: Path) -> float:
    """When the archive, or the last of its files, was written or put there."""
    files = [archive / name for name in ("train", "test", "meta")] if archive.is_dir() else [archive]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _convert(root: Path, out_dir: Path, download: bool, say: Say) -> None:
    from data_prep.convert import convert_cifar100
    from data_prep.sources import cifar100 as archives

    try:
        archive = find_archive(root)
        if archive is None:
            say(f"downloading {_ARCHIVES[1]} (169 MB) into {root}")
            archive = archives.download(root)
        say(f"converting {archive} into {out_dir} (once)")
        try:
            convert_cifar100(archive, out_dir, progress=True)
        except UserError:
            if not download or archive.name != _ARCHIVES[1]:
                raise
            say(f"{archive} is damaged, downloading it again (169 MB)")
            convert_cifar100(archives.download(archive.parent), out_dir, progress=True)
    except UserError as error:
        text = str(error).replace("with --download instead of --src", "with --dataset-download")
        text = text.replace("give its path with --src cifar-100-python.tar.gz", f"put it into {root}")
        text = text.replace("--download needs", "--dataset-download needs").replace("--src ", "")
        raise UserError(text.replace("another --out", "another --beton-dir")) from error
