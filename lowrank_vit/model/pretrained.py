"""Pretrained weights, through timm: those that it publishes, or those of a local file.

timm fits them to the model: position embeddings are interpolated to another image size, patch embeddings to another
patch size, and the head is made anew for another number of classes. What it then leaves out without a word is looked
at here.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
import timm
import timm.models
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError

Say = Callable[[str], object]
CONNECT_S = 5.0
"""How long to wait for the hub before it counts as out of reach."""
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz")
HEADS = ("head", "head.fc", "fc", "classifier")
"""What the last layer is called where timm does not tell: in files of other programs."""


class Build(Protocol):
    """timm's `create_model` with all arguments but those about pretrained weights."""

    def __call__(self, **pretrained: Any) -> nn.Module:
        """Make the model."""
        ...


def load_published(build: Build, name: str, num_classes: int, say: Say) -> nn.Module:
    """The model with the weights that timm publishes, from the Hugging Face hub or its local cache.

    Raises `UserError` where there are none, where they cannot be fetched, or where they do not fit.
    """
    published = timm.models.get_pretrained_cfg(name)
    try:
        with _quick_without_network(), _recorded_loads() as loads:
            model = build(pretrained=True)
    except UserError:
        raise
    except OSError as error:  # the hub's errors are among them
        raise _out_of_reach(name) from error
    except (RuntimeError, ValueError, AssertionError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            f"--pretrained: timm has no weights for {name} with these options: {_in_one_line(error)} Choose another "
            "--model, or give a file of weights with --pretrained-path FILE."
        ) from error
    _check_fit(model, name, loads, "--pretrained", say)
    _tell_of_head(published.num_classes if published else None, num_classes, say)
    return model


def load_pretrained_file(build: Build, name: str, path: Path, num_classes: int, say: Say) -> nn.Module:
    """The model with the weights of a file; a checkpoint's EMA weights where it has them, as timm prefers.

    Raises `UserError` for a file that is missing, damaged, or of another model.
    """
    flag = f"--pretrained-path {path}"
    in_file = classes_in(path, head_names(name))
    # timm keeps the head where both numbers agree, and wants every tensor then. -1: there is none to keep.
    overlay = {"file": str(path), "num_classes": in_file or -1, "label_offset": 0, "custom_load": _is_npz(path)}
    try:
        with _recorded_loads() as loads:
            model = build(pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError, AttributeError, AssertionError, TypeError) as error:
        raise _does_not_fit(flag, _in_one_line(error)) from error
    _check_fit(model, name, loads, flag, say)
    _tell_of_head(in_file, num_classes, say)
    return model


def require_weights(path: Path) -> None:
    """Raise `UserError` where --pretrained-path names no file."""
    if not path.is_file():
        found = sorted(str(p) for p in path.glob("*") if p.suffix in SUFFIXES) if path.is_dir() else []
        hint = f" That folder has: {', '.join(found)}." if found else ""
        raise UserError(f"--pretrained-path {path} does not exist or is no file.{hint}")


def check_published(name: str) -> None:
    """Raise `UserError` where timm has no weights for a model, or where they are neither in reach nor in the cache."""
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"--pretrained: timm has no weights for {name}. Choose another --model, or give a file of weights with "
            "--pretrained-path FILE."
        )
    if not cfg.hf_hub_id or cfg.file or cfg.state_dict:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    with _quick_without_network():
        is_out_of_reach = constants.HF_HUB_OFFLINE
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if is_out_of_reach and not any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, one), str) for one in names):
        raise _out_of_reach(name)


def _out_of_reach(name: str) -> UserError:
    return UserError(
        f"--pretrained: the weights of {name} cannot be fetched from the Hugging Face hub (no network?), and its "
        "local cache does not have them. Fetch them elsewhere and give the file with --pretrained-path FILE."
    )


def classes_in(path: Path, heads: tuple[str, ...]) -> int | None:
    """How many classes the head in a file tells apart; None for a file without a head. Raises `UserError`."""
    require_weights(path)
    try:
        if _is_npz(path):
            with path.open("rb") as file, np.load(file) as arrays:  # numpy leaves a damaged file open
                biases = (arrays[key] for key in arrays.files if key.endswith("head/bias"))
                return next((len(bias) for bias in biases), None)
        weights = timm.models.load_state_dict(str(path))
        tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError("no tensors")
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UserError(
            f"--pretrained-path {path} cannot be read: it is damaged, cut short, or holds no weights in a form that "
            f"timm reads ({', '.join(SUFFIXES)}). Give a file such as a run's model_best.pth.tar."
        ) from error
    return next((int(tensors[f"{head}.weight"].shape[0]) for head in heads if f"{head}.weight" in tensors), None)


def _is_npz(path: Path) -> bool:
    """Google's own format, which each timm model reads in a way of its own."""
    return path.suffix == ".npz"


def head_names(name: str) -> tuple[str, ...]:
    """What the classifier of a model may be called in a file of weights, the likeliest first."""
    cfg = timm.models.get_pretrained_cfg(name)
    own = (cfg.classifier if cfg else None) or ()
    return (*((own,) if isinstance(own, str) else own), *HEADS)


@contextlib.contextmanager
def _recorded_loads() -> Generator[list[Any], None, None]:
    """Keep what `load_state_dict` answers timm, which drops it: the missing and the unexpected keys.

    timm's own lines about them are held back, since the caller says which of them matter.
    """
    original, answers = nn.Module.load_state_dict, list[Any]()
    log = logging.getLogger("timm.models._builder")
    is_silent = log.disabled

    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answers.append(original(self, *args, **kwargs))
        return answers[-1]

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    log.disabled = True
    try:
        yield answers
    finally:
        log.disabled = is_silent
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _check_fit(model: nn.Module, name: str, loads: list[Any], flag: str, say: Say) -> None:
    """Raise `UserError` for weights of another model; say which layers stay new (a pooling's norm) or go unused.

    With a new head timm loads whatever it finds, so that weights of another depth would pass unnoticed.
    """
    heads = tuple(f"{head}." for head in head_names(name))
    own = model.state_dict()
    missing = [key for load in loads for key in load.missing_keys if not key.startswith(heads)]
    unused = [key for load in loads for key in load.unexpected_keys if not key.startswith(heads)]
    loaded = _tops(own.keys() - set(missing))
    lacks = [key for key in missing if key.partition(".")[0] in loaded]
    has_more = [key for key in unused if key.partition(".")[0] in loaded]
    if lacks:
        raise _does_not_fit(flag, f"it lacks {len(lacks)} tensors, for example {lacks[0]}")
    if has_more:
        raise _does_not_fit(flag, f"{len(has_more)} of its tensors have no place, for example {has_more[0]}")
    if sum(own[key].numel() for key in missing) > 0.5 * sum(value.numel() for value in own.values()):
        raise _does_not_fit(flag, f"it lacks most layers, for example {missing[0]}")
    if missing:
        say(f"pretrained weights: they have no {', '.join(sorted(_tops(missing)))}, which stays freshly initialised")
    if unused:
        say(f"pretrained weights: their {', '.join(sorted(_tops(unused)))} has no place in the model and is not used")


def _tops(keys: Any) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def _does_not_fit(flag: str, reason: str) -> UserError:
    return UserError(
        f"{flag} does not fit the model: {reason}. Give the --model and --model-kwargs that the weights were trained "
        "with."
    )


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _tell_of_head(before: int | None, num_classes: int, say: Say) -> None:
    if not before:
        say(f"pretrained weights: they have no head, a new one of {num_classes} classes is made")
    elif before != num_classes:
        say(f"pretrained weights: head of {before} classes replaced by one of {num_classes}")


@contextlib.contextmanager
def _quick_without_network() -> Generator[None, None, None]:
    """Where the hub cannot be reached, look in its local cache alone rather than try again for most of a minute."""
    from huggingface_hub import constants

    url = urlparse(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE
    if not before and not urllib.request.getproxies():  # a proxy finds the way where this machine cannot
        address = url.hostname or "huggingface.co", url.port or (80 if url.scheme == "http" else 443)
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True  # what the environment variable would set
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
