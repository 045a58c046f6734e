"""Find the `.beton` files that a run's data options mean, and make them where only their source is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.errors import BetonError, UserError
from data_prep.image_folder import SPLIT_NAMES
from data_prep.manifest import Manifest, manifest_path, read_manifest
from data_prep.parts import find_parts
from lowrank_vit.data.one_process import one_process_in

FOLDER = ".lowrank_vit"
"""Converted images lie below their folder in this one."""
CIFAR100_FOLDER = "cifar100.lowrank_vit"
TORCH_DATASETS = Path("~/.cache/torch/datasets")
"""timm's own default for `torch/...` data sets."""
Say = Callable[[str], object]


@dataclass(frozen=True)
class DataOptions:
    """Which data; names and meanings are the flags'."""

    dataset: str = ""
    data_dir: Path | None = None
    dataset_download: bool = False
    beton_dir: Path | None = None
    train_split: str = "train"
    val_split: str = "validation"
    on_bad: Literal["error", "skip"] = "error"
    """What a conversion does about an image that does not decode."""


def locate(options: DataOptions, say: Say = print) -> tuple[Path, Path]:
    """The training and the validation `.beton` (either may stand for its parts), converted now if need be.

    Raises `UserError`: nothing there, no split, not writable, images that do not decode.
    """
    if options.dataset == "torch/cifar100":
        return _cifar100(options, say)
    root = options.data_dir or Path("data")
    if _is_there(root / "train.beton") or _is_there(root / "val.beton"):
        return root / "train.beton", root / "val.beton"
    if options.dataset == "digits":
        from data_prep.convert import convert_digits

        convert_digits(root)
        return root / "train.beton", root / "val.beton"
    folders = [_split(root, name) for name in (options.train_split, options.val_split)]
    if not any(folders):
        raise UserError(
            f"--data-dir {root}: there is neither train.beton nor a folder of images named {options.train_split}. Give "
            "a folder with train/ and val/, one folder a class in each, or files that `python -m data_prep` wrote, or "
            "train on the embedded digits with --dataset digits."
        )
    train, val = folders
    if train is None or val is None:
        flag, wanted = ("--train-split", options.train_split) if train is None else ("--val-split", options.val_split)
        raise UserError(
            f"--data-dir {root} has {(train or val or root).name}/ but no folder for {flag} {wanted}. Add it, or name "
            f"another with {flag}."
        )
    return _converted(train, val, options, say)


def locate_validation(path: Path, options: DataOptions, say: Say = print) -> Path:
    """The `.beton` that `path` means: itself, val.beton in it, or the validation split of a folder of images.

    A folder of class folders is taken as it is. Raises `UserError`.
    """
    if not path.is_dir():
        return path
    if _is_there(path / "val.beton"):
        return path / "val.beton"
    folder = _split(path, options.val_split) or path
    out = (options.beton_dir or (path if folder != path else path.parent) / FOLDER) / f"{folder.name}.beton"
    if not _is_current(out, folder):
        _convert({out: folder}, out.parent, options, say)
    return out


def _is_there(beton: Path) -> bool:
    return beton.exists() or bool(find_parts(beton))


def _split(root: Path, name: str) -> Path | None:
    """The folder of a split, by its own name or one of timm's synonyms."""
    synonyms = next((names for names in SPLIT_NAMES.values() if name in names), ())
    return next((root / n for n in (name, *synonyms) if (root / n).is_dir()), None)


def _converted(train: Path, val: Path, options: DataOptions, say: Say) -> tuple[Path, Path]:
    out_dir = options.beton_dir or train.parent / FOLDER
    folders = {out_dir / f"{folder.name}.beton": folder for folder in (train, val)}
    if not all(_is_current(out, folder) for out, folder in folders.items()):
        _convert(folders, out_dir, options, say)
    first, second = folders
    return first, second


def _convert(folders: dict[Path, Path], out_dir: Path, options: DataOptions, say: Say) -> None:
    from data_prep.convert import convert_folders

    with one_process_in(out_dir, say, "Give a folder that can be written with --beton-dir."):
        if not all(_is_current(out, folder) for out, folder in folders.items()):
            say(f"converting {' and '.join(str(folder) for folder in folders.values())} into {out_dir} (once)")
            convert_folders(folders, on_bad=options.on_bad, progress=True)
            for out in folders:  # what changed before now is in it
                os.utime(manifest_path(out))


def _is_current(out: Path, folder: Path) -> bool:
    """Whether `out` was finished from `folder`, and no file was added to or removed from a class since.

    Looks at the class folders alone: to list a million files takes a minute. The converter looks at each of them.
    """
    manifest = _manifest(out)
    if manifest is None or Path(manifest.source).resolve() != folder.resolve():
        return False
    written = manifest_path(out).stat().st_mtime
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    return list(manifest.classes) == classes and all((folder / c).stat().st_mtime <= written for c in classes)


def _manifest(out: Path) -> Manifest | None:
    try:
        return read_manifest(out) if out.exists() else None
    except BetonError:
        return None


def _cifar100(options: DataOptions, say: Say) -> tuple[Path, Path]:
    root = options.data_dir or _default_root(say)
    for folder in (root, out_dir := options.beton_dir or root / CIFAR100_FOLDER):
        paths = folder / "train.beton", folder / "val.beton"
        if all(_is_there(path) and _manifest(path) for path in paths):
            return paths
    from data_prep.cifar100 import download
    from data_prep.convert import convert_cifar100

    with one_process_in(out_dir, say, "Give a folder that can be written with --data-dir or --beton-dir."):
        paths = out_dir / "train.beton", out_dir / "val.beton"
        if not all(_manifest(path) for path in paths):
            names = ("cifar-100-python", "cifar-100-python.tar.gz", "cifar-100-binary", "cifar-100-binary.tar.gz")
            archive = next((root / name for name in names if (root / name).exists()), None)
            if archive is None and not options.dataset_download:
                raise UserError(
                    f"--dataset torch/cifar100: {root} holds neither {names[0]}/ nor {names[1]}. Add "
                    "--dataset-download (169 MB), or give the folder that holds it with --data-dir."
                )
            archive = archive or download(root)
            say(f"converting {archive} into {out_dir} (once)")
            convert_cifar100(archive, out_dir, progress=True)
    return paths


def _default_root(say: Say) -> Path:
    root = TORCH_DATASETS.expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(root, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        say(f"data root ./data, since {root} cannot be written (--data-dir chooses another)")
        return Path("data")
    say(f"data root {root} (--data-dir chooses another)")
    return root
