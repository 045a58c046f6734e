"""Pretrained weights, through timm: those that it publishes, or those of a local file."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
from timm.models import load_state_dict
from torch import nn

from data_prep.errors import UserError

Say = Callable[[str], object]


class Build(Protocol):
    """timm's `create_model` with all arguments but those about pretrained weights."""

    def __call__(self, **pretrained: Any) -> nn.Module:
        """Make the model."""
        ...


def load_published(build: Build, name: str, num_classes: int, say: Say) -> nn.Module:
    """The model with the weights that timm publishes, from the Hugging Face hub or its local cache.

    Raises `UserError` where there are none or they cannot be fetched.
    """
    try:
        with _quick_without_network():
            model = build(pretrained=True)
    except UserError:
        raise
    except OSError as error:  # the hub's errors are among them
        raise UserError(
            f"--pretrained: the weights of {name} cannot be fetched from the Hugging Face hub (no network?), and its "
            "cache does not have them. Fetch them elsewhere and give the file with --pretrained-path FILE."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"--pretrained: {error} Choose another --model, or give a file of weights with --pretrained-path FILE."
        ) from error
    published = getattr(model, "pretrained_cfg", {}).get("num_classes")
    _tell_of_head(published, num_classes, say)
    return model


def load_pretrained_file(build: Build, path: Path, num_classes: int, say: Say) -> nn.Module:
    """The model with the weights of a file; a checkpoint's EMA weights where it has them, as timm prefers.

    Raises `UserError` for a file that is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise UserError(f"--pretrained-path {path} does not exist or is no file.")
    try:
        weights = {} if path.suffix in (".npz", ".npy") else load_state_dict(str(path))
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UserError(
            f"--pretrained-path {path} cannot be read: it is damaged, cut short, or holds no weights in a format that "
            "timm reads (.pth, .pth.tar, .safetensors, .npz)."
        ) from error
    state = torch.get_rng_state()
    fresh = build()
    head = _head_name(fresh)
    # timm keeps the head where the counts agree and makes a new one where they differ.
    in_file = int(weights[f"{head}.weight"].shape[0]) if f"{head}.weight" in weights else num_classes
    overlay = {"file": str(path), "num_classes": in_file, "custom_load": path.suffix in (".npz", ".npy")}
    torch.set_rng_state(state)  # what is not loaded is then initialised as it was before
    try:
        model = build(pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise _does_not_fit(path, " ".join(str(error).split())[:200] + " ...") from error
    # With another head timm loads whatever fits, so a file of another model would pass unnoticed.
    before, after = fresh.state_dict(), model.state_dict()
    missing = [key for key in before if before[key].ndim > 1 and torch.equal(before[key], after[key])]
    unknown = [key for key in weights if key not in before] if before.keys() & weights.keys() else []
    for keys, what in ((missing, "are not in it"), (unknown, "of it have no place in the model")):
        others = [key for key in keys if not key.startswith(head)]
        if others:
            raise _does_not_fit(path, f"{len(others)} tensors {what}, for example {others[0]}")
    _tell_of_head(in_file, num_classes, say)
    return model


def _does_not_fit(path: Path, reason: str) -> UserError:
    return UserError(
        f"--pretrained-path {path} does not fit the model: {reason}. Give the --model and --model-kwargs that it was "
        "trained with."
    )


def _head_name(model: nn.Module) -> str:
    """Of the classifier, e.g. `head`; of several the first."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return name if isinstance(name, str) else name[0]


def _tell_of_head(in_file: int | None, num_classes: int, say: Say) -> None:
    if in_file and in_file != num_classes:
        say(f"pretrained weights: the classifier of {in_file} classes is replaced by a new one of {num_classes}")


@contextlib.contextmanager
def _quick_without_network() -> Iterator[None]:
    """Without a way to the hub look in its cache only, rather than try again and again for half a minute."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or "huggingface.co"
    has_proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    before = constants.HF_HUB_OFFLINE
    if not has_proxy:
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
