"""An export as a folder: a model written by timm's own writer, with its card, and read back before it is renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from lowrank_vit import __version__
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import remove_leftovers, whole_folder, writing
from lowrank_vit.common.filesystem import rename, sync, sync_directory
from lowrank_vit.common.locks import Say, try_flock
from lowrank_vit.model.hub import CONFIG, LOCAL, WEIGHTS
from lowrank_vit.publish.card import PICTURE, card
from lowrank_vit.publish.subject import Subject

CARD, MARK = "README.md", "lowrank_vit"
"""The card's file; the key of config.json that marks our exports."""
FILES = (CARD, PICTURE, WEIGHTS, CONFIG)
"""The files of an export, in the order of their renames: without the last one timm loads nothing."""
_OF_A_RUN = ("args.yaml", "metrics.jsonl", "summary.csv", "environment.json")
_ADVICE = "Choose another folder with --local-dir."
_NOT_OF_THESE_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes")
"""timm's keys about the weights that it publishes for an architecture."""


def fill(folder: Path, subject: Subject, name: str, reference: str, license_id: str) -> None:
    """Write config.json, model.safetensors, the card and the picture into an empty folder, and read them back.

    Raises `UserError` for a model that timm cannot write or load again, and `OSError`.
    """
    model: Any = subject.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    spec, own = subject.spec, model.pretrained_cfg
    model.pretrained_cfg = {k: v for k, v in own.items() if k not in (*_NOT_OF_THESE_WEIGHTS, "label_names")}
    look = {
        "input_size": (3, spec.img_size, spec.img_size),
        "mean": spec.mean,
        "std": spec.std,
        "crop_pct": spec.crop_pct,
        "interpolation": subject.interpolation,
        "crop_mode": "center",
    }
    labels = {"label_names": subject.class_names} if subject.class_names else {}
    text = card(subject, name, reference, license_id)
    mark = {MARK: {"version": __version__, "card": _sha256(text.encode())}}
    try:
        save_for_hf(model, str(folder), model_config=labels | mark, safe_serialization=True, data_config=look)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"timm cannot write {subject.name} in its hub layout: {' '.join(str(error).split())}"
        ) from error
    (folder / CARD).write_text(text, encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / CARD).stat().st_mode)  # safetensors makes it readable only by its owner
    if subject.picture:
        (folder / PICTURE).write_bytes(subject.picture)
    for path in folder.iterdir():
        with path.open("rb") as file:
            sync(file.fileno())
    _read_back(folder, subject)


def _read_back(folder: Path, subject: Subject) -> None:
    """Raise `UserError` if timm does not load the same model from the folder."""
    try:
        again = timm.create_model(f"{LOCAL}:{folder}", pretrained=True).state_dict()
    except Exception as error:  # a constructor or a filter of weights of any model
        raise UserError(f"timm cannot load what it wrote of {subject.name}: {' '.join(str(error).split())}") from error
    own = subject.model.state_dict()
    if again.keys() != own.keys() or not all(torch.equal(again[name], own[name]) for name in own):
        raise UserError(f"timm does not load the same weights of {subject.name} as it wrote. Export another model.")


def check_folder(folder: Path, *, overwrite: bool) -> str:
    """A line on what happens to the content of `folder`; empty for a folder that is new or empty.

    Raises `UserError` if it is a run's directory, not a folder, or holds anything but an unchanged export.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--local-dir {folder} is a link to nothing. Remove it, or choose another folder.")
    if not folder.exists():
        there = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
        if there.is_file():
            raise UserError(f"--local-dir {folder}: {there} is a file, not a folder. {_ADVICE}")
        return ""
    if not folder.is_dir():
        raise UserError(f"--local-dir {folder} is a file. Choose another folder.")
    with writing(folder, _ADVICE):
        names = {path.name for path in folder.iterdir() if not path.name.endswith(".part")}
    if names & set(_OF_A_RUN) or any(name.endswith(".pth.tar") for name in names):
        raise UserError(f"--local-dir {folder} is the directory of a run. Choose another folder.")
    if folders := [name for name in FILES if (folder / name).is_dir()]:
        raise UserError(f"--local-dir {folder} has a folder {folders[0]} in place of a file. Choose another folder.")
    if not names:
        return ""
    if _is_untouched(folder, names):
        return f"{folder} holds an earlier export, which is replaced"
    if overwrite:
        replaced = ", ".join(name for name in FILES if name in names) or "nothing"
        return f"{folder} holds other files, which stay; replaced: {replaced}"
    others = sorted(names - set(FILES)) or [CARD]
    why = f"{CARD} was edited" if others == [CARD] else f"it holds {', '.join(others[:3])}"
    raise UserError(
        f"--local-dir {folder} is in use and does not hold an unchanged export: {why}. Choose another folder, or "
        f"replace {', '.join(FILES)} there with --overwrite."
    )


def _is_untouched(folder: Path, names: set[str]) -> bool:
    """Whether a folder holds an export of ours and nothing else, with its card as it was written."""
    try:
        mark: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))[MARK]
        return names <= set(FILES) and mark["card"] == _sha256((folder / CARD).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_folder(folder: Path, make: Callable[[Path], None], *, overwrite: bool, say: Say) -> None:
    """Let `make` fill a hidden folder, and move its files into `folder`; on an error nothing changes.

    Raises `UserError`, also if another export is writing there.
    """
    folder = folder.resolve()  # a link to a bigger disk is there for a reason
    with writing(folder, _ADVICE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            remove_leftovers(folder.parent, folder.name)
            try:
                with whole_folder(folder) as made:
                    make(made)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise UserError(f"{folder} was made by another process meanwhile. {_ADVICE}") from error
                raise
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if try_flock(descriptor) is False:
                raise UserError(f"{folder} is in use: another export is writing there. Wait for it. {_ADVICE}")
            remove_leftovers(folder)
            if line := check_folder(folder, overwrite=overwrite):
                say(f"note: {line}")
            made = Path(tempfile.mkdtemp(prefix=".export.", suffix=".part", dir=folder))
            try:
                make(made)
                _replace(folder, made)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        finally:
            os.close(descriptor)


def _replace(folder: Path, made: Path) -> None:
    """Move the files of `made` into `folder`; a process killed meanwhile leaves no config.json, so nothing to load."""
    (folder / CONFIG).unlink(missing_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        if (made / name).exists():
            rename(made / name, folder / name)
    sync_directory(folder)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
