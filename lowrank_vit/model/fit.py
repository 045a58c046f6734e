"""Fitting weights to a model: position embeddings, and the head's rows by class name; other differences are refused.

Weights that must fit exactly (`load_weights`) are checked here. Weights that only initialise a model (`build_with`) are
fitted by timm to another image size, patch size and head; the tensors that timm then skips silently are checked here.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Protocol

import timm.models
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from data_prep.sources.samples import abbreviated, positions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.model.class_match import Classes, Trust, match, published_names
from lowrank_vit.model.low_rank import factor_names, ranks_of, rebuild, with_products
from lowrank_vit.model.weights import Checkpoint, read_checkpoint

HEADS = ("head", "head.fc", "fc", "classifier")
"""Names of the last layer in other programs' files, for which timm has no name."""


class Build(Protocol):
    """timm's `create_model` with all arguments given except those about pretrained weights."""

    def __call__(self, **pretrained: Any) -> nn.Module:
        """Make the model."""
        ...


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: dict[str, Tensor], model_name: str) -> None:
    """Copy `weights` into `model`; its layers are factorised like those of the file.

    Raises `UserError` for a checkpoint of another model, and tells how it differs.
    """
    rebuild(model, weights, checkpoint.lowrank_ranks, str(checkpoint.path))
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(weights[k].shape)} there, {tuple(v.shape)} here"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    kinds = [k for k, v in own.items() if k in weights and v.is_floating_point() != weights[k].is_floating_point()]
    if missing or unknown or shapes or kinds:
        differences = []
        if checkpoint.arch and checkpoint.arch != model_name:
            differences.append(f"it was saved from {checkpoint.arch}")
        if shapes:
            differences.append(f"{len(shapes)} tensors have another shape ({shapes[0]})")
        if kinds:
            differences.append(f"{len(kinds)} have another dtype ({kinds[0]} is {weights[kinds[0]].dtype})")
        if missing:
            differences.append(f"{len(missing)} are missing ({missing[0]})")
        if unknown:
            differences.append(f"{len(unknown)} are unknown here ({unknown[0]})")
        raise UserError(
            f"Checkpoint {checkpoint.path} does not fit --model {model_name}: {'; '.join(differences)}. Give the "
            "--model, --model-kwargs, --img-size and --num-classes that it was trained with."
        )
    model.load_state_dict(weights)


def resized(model: nn.Module, weights: dict[str, Tensor], path: Path, say: Say) -> dict[str, Tensor]:
    """The weights with their position embedding, (1, N, D), interpolated to the model's patches, as in timm.

    `say` reports it. Only a square grid is resized; other embeddings stay unchanged, and loading reports the
    difference.
    """
    own, theirs = model.state_dict().get("pos_embed"), weights.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if own is None or theirs is None or grid is None or own.ndim != 3 or theirs.shape[::2] != own.shape[::2]:
        return weights
    num_prefix = own.shape[1] - math.prod(grid)  # class token and registers, if they have position embeddings
    side = math.isqrt(max(0, theirs.shape[1] - num_prefix))
    if theirs.shape == own.shape or num_prefix < 0 or side**2 + num_prefix != theirs.shape[1] or not side:
        return weights
    say(f"note: the position embedding of {path} is interpolated from {side} x {side} patches to {grid[0]} x {grid[1]}")
    fitted = resample_abs_pos_embed(theirs, new_size=list(grid), num_prefix_tokens=num_prefix)
    return {**weights, "pos_embed": fitted}


def load_initial(
    model: nn.Module, path: Path, model_name: str, say: Say, of_data: tuple[Classes, Trust] | None = None
) -> None:
    """Copy the weights of --initial-checkpoint into the model and report which; only the image size may differ.

    The head's rows are reordered to the classes of `of_data`, by name. Raises `UserError` naming the file.
    """
    checkpoint = read_checkpoint(path, "--initial-checkpoint")
    weights, is_ema = checkpoint.weights_to_start_from()
    rebuild(model, weights, checkpoint.lowrank_ranks, str(path))
    if of_data:
        advice = f"--pretrained-path {path} starts with a new head if the number of classes differs."
        weights = _with_head_of(weights, checkpoint, model, model_name, *of_data, say, advice)
    load_weights(model, checkpoint, resized(model, weights, path, say), model_name)
    say(f"initial weights: {_whose(checkpoint, is_ema=is_ema)}{_in_factors(model)}")


def build_with_file(build: Build, name: str, checkpoint: Checkpoint, num_classes: int, say: Say) -> nn.Module:
    """The model with weights fitted by timm, from --pretrained-path or a hub model's file; `say` reports which.

    For factorised layers, timm fits their products, and the factors are restored afterwards. Raises `UserError` for
    weights of another model.
    """
    flag = f"--model {checkpoint.source}" if checkpoint.source else f"--pretrained-path {checkpoint.path}"
    in_file = checkpoint.num_outputs(head_names(name))
    # timm keeps the head if both numbers agree, and then needs every tensor. -1: there is no head to keep.
    overlay: dict[str, Any] = {"num_classes": in_file or -1, "label_offset": 0}
    is_ema, weights = False, dict[str, Tensor]()
    if checkpoint.is_npz:
        overlay |= {"file": str(checkpoint.path), "custom_load": True}
    else:
        weights, is_ema = checkpoint.weights_to_start_from()
        whole = with_products(weights)
        overlay |= {"state_dict": {key: one if key in weights else one.float() for key, one in whole.items()}}
    try:
        model = build_with(build, name, flag, (in_file, num_classes), say, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError, AttributeError, AssertionError, TypeError) as error:
        raise _does_not_fit(flag, in_one_line(error)) from error
    head = head_names(name) if in_file != num_classes else ()
    factors = {
        f"{one}.{end}": weights[f"{one}.{end}"]
        for one in factor_names(weights)
        for end in ("up", "down")
        if one not in head
    }
    rebuild(model, factors, {}, flag)
    model.load_state_dict(factors, strict=False)
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]  # not copied with the model
    if checkpoint.no_tensors:
        unused = ", ".join(checkpoint.no_tensors)
        say(f"pretrained weights: their {unused} has no place in the model and is not used")
    if not checkpoint.is_npz:
        say(f"pretrained weights: {_whose(checkpoint, is_ema=is_ema)}{_in_factors(model)}")
    return model


def fit_kept_head(
    model: nn.Module, checkpoint: Checkpoint, model_name: str, say: Say, data: Classes, trust: Trust
) -> None:
    """Reorder the rows of a head kept by --pretrained-path to the data's classes, by name, in place.

    A head for other classes stays as it is, as an initialisation, which `say` reports.
    """
    weights = model.state_dict()
    head = _head_in(weights, model_name)
    if not head or checkpoint.num_outputs(head_names(model_name)) != len(weights[head[0]]):  # a new head
        return
    try:
        fitted = _with_head_of(weights, checkpoint, model, model_name, data, trust, say, "")
    except UserError:
        what = abbreviated(checkpoint.class_names or ["without names"])
        say(f"note: the head of {checkpoint.path} has other classes ({what}); it is kept as an initialisation")
        return
    model.load_state_dict(fitted)


def tell_of_published_head(model_name: str, data: Classes, say: Say) -> None:
    """Report it if --pretrained has kept a head of ImageNet's classes for other classes, as timm does."""
    cfg = timm.models.get_pretrained_cfg(model_name)
    known = published_names(data.count) if cfg and cfg.num_classes == data.count else None
    if known and data.names and positions(data.names, known) is None:
        say(
            f"note: the head of {model_name} has ImageNet's classes, not {data.what}'s; it is kept as an initialisation"
        )


def head_names(name: str) -> tuple[str, ...]:
    """Possible names of a model's classifier in a weight file, the most likely first."""
    cfg = timm.models.get_pretrained_cfg(name)
    own = (cfg.classifier if cfg else None) or ()
    return (*((own,) if isinstance(own, str) else own), *HEADS)


def _whose(checkpoint: Checkpoint, *, is_ema: bool) -> str:
    return f"{'the EMA of' if is_ema else 'those of'} {checkpoint.source or checkpoint.path}"


def _in_factors(model: nn.Module) -> str:
    return f", {len(ranks)} factorised layers" if (ranks := ranks_of(model)) else ""


def _head_in(weights: dict[str, Tensor], model_name: str) -> list[str]:
    """Names of the classifier's tensors, of both classifiers if a model has two; each tensor has a row per class."""
    found = [f"{head}.{kind}" for head in head_names(model_name) for kind in ("weight", "up", "bias")]
    return list(dict.fromkeys(key for key in found if key in weights))


def _with_head_of(
    weights: dict[str, Tensor],
    checkpoint: Checkpoint,
    model: nn.Module,
    model_name: str,
    data: Classes,
    trust: Trust,
    say: Say,
    advice: str,
) -> dict[str, Tensor]:
    """The weights with the head's rows reordered: first those of the data's classes, then others that still fit.

    Outputs beyond the file's rows (--larger-head) stay as in `model`. Raises `UserError` if the classes do not match.
    Without a head the weights are unchanged.
    """
    head, own = _head_in(weights, model_name), model.state_dict()
    if not head or any(key not in own or weights[key].shape[1:] != own[key].shape[1:] for key in head):
        return weights  # another model's, as loading will report
    num_rows, wanted = len(weights[head[0]]), len(own[head[0]])
    names = checkpoint.class_names
    if names is None and (data.names is None or wanted > data.count) and num_rows == wanted:
        return weights
    found = match(data, Classes(str(checkpoint.path), num_rows, names), trust, advice)
    for remark in found.remarks:
        say(remark)
    if found.is_identity and num_rows == wanted:
        return weights
    taken = set(found.outputs)
    rows = [*found.outputs, *(row for row in range(num_rows) if row not in taken)][:wanted]
    new = f"; the head's last {wanted - num_rows:,} outputs stay as initialised" if num_rows < wanted else ""
    say(f"initial weights: {len(found.outputs):,} of the head's {num_rows:,} rows, in the order of {data.what}{new}")
    return {**weights, **{key: torch.cat([weights[key][rows], own[key][len(rows) :].cpu()]) for key in head}}


def build_with(
    build: Build, name: str, flag: str, outputs: tuple[int | None, int], say: Say, **pretrained: Any
) -> nn.Module:
    """The model that timm builds with the weights of `pretrained`; `say` reports missing and unused tensors.

    `outputs`: number of outputs of the weights' head and of the model's. With a new head timm loads whatever it finds,
    so weights of another depth would pass unnoticed: they raise `UserError`. Other errors are timm's.
    """
    with _recorded_loads() as loads:
        model = build(pretrained=True, **pretrained)
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
        say(f"pretrained weights: they have no {', '.join(sorted(_tops(missing)))}, which stays randomly initialised")
    if unused:
        say(f"pretrained weights: their {', '.join(sorted(_tops(unused)))} has no place in the model and is not used")
    before, now = outputs
    if not before:
        say(f"pretrained weights: they have no head; the model gets a new one with {now} classes")
    elif before != now:
        say(f"pretrained weights: head of {before} classes replaced by one of {now}")
    return model


@contextlib.contextmanager
def _recorded_loads() -> Generator[list[Any], None, None]:
    """Record what `load_state_dict` returns to timm, which drops it: the missing and the unexpected keys.

    timm's own log lines about them are suppressed, since the caller reports those that matter.
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


def _tops(keys: Iterable[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def _does_not_fit(flag: str, reason: str) -> UserError:
    return UserError(
        f"{flag} does not fit the model: {reason}. Give the --model and --model-kwargs that the weights were trained "
        "with."
    )


def in_one_line(error: Exception) -> str:
    """An error's text in one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
