"""--initial-checkpoint: the weights that a run starts from, read as timm's `create_model` reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models
import torch
from torch import Tensor, nn

from data_prep.sources.class_names import abbreviated, positions
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.checkpoint import (
    BETTER,
    Checkpoint,
    class_names_in,
    is_state_dict,
    load_weights,
    require_file,
    top_level,
)
from lowrank_vit.model.class_match import Classes, Trust, match, published_names
from lowrank_vit.model.pretrained import classes_in, head_names

Say = Callable[[str], object]
EMA_KEYS = ("state_dict_ema", "model_ema")
"""Where timm looks for EMA weights first."""


def load_initial(
    model: nn.Module, path: Path, model_name: str, say: Say, of_data: tuple[Classes, Trust] | None = None
) -> None:
    """Copy a file's weights into the model and say which; they must fit.

    The EMA's where it has them, as in timm, unless the file says that the model itself scored higher. timm's own helper
    reads the file: weights of DDP and of compiled modules under the plain names, `{"model": ...}`, safetensors. The
    head's rows are brought into the order of the classes of `of_data`, by their names. Raises `UserError` naming the
    file.
    """
    require_file(path)
    top = top_level(path)
    use_ema = top.get(BETTER) != "model"
    try:
        weights = timm.models.load_state_dict(str(path), use_ema=use_ema)
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UserError(
            f"--initial-checkpoint {path} cannot be read: it is damaged, cut short, or no file with tensors and plain "
            "values only. Give a file such as a run's model_best.pth.tar."
        ) from error
    if not is_state_dict(weights):
        raise UserError(f"--initial-checkpoint {path} holds no `state_dict`. Give a checkpoint with weights.")
    if of_data:
        advice = f"--pretrained-path {path} starts with a new head where the number of classes differs."
        weights = _with_head_of(weights, path, top, model, model_name, *of_data, say, advice)
    load_weights(model, Checkpoint(path, top), weights, model_name)
    is_ema = use_ema and any(top.get(key) is not None for key in EMA_KEYS)
    say(f"initial weights: {'the EMA of' if is_ema else 'those of'} {path}")


def fit_kept_head(model: nn.Module, path: Path, model_name: str, say: Say, data: Classes, trust: Trust) -> None:
    """Bring the rows of a head that --pretrained-path has kept into the order of the data's classes, by their names.

    In place. A head of other classes stays as it is, which is said: it is a start like another.
    """
    weights = model.state_dict()
    head = _head_in(weights, model_name)
    if not head or classes_in(path, head_names(model_name)) != len(weights[head[0]]):  # a new head
        return
    top = top_level(path)
    try:
        fitted = _with_head_of(weights, path, top, model, model_name, data, trust, say, "")
    except UserError:
        what = abbreviated(class_names_in(top) or ["without names"])
        say(f"note: the head of {path} is of other classes ({what}); it is kept as a start")
        return
    model.load_state_dict(fitted)


def tell_of_published_head(model_name: str, data: Classes, say: Say) -> None:
    """Say so where --pretrained has kept a head of ImageNet's classes for others, as timm does."""
    cfg = timm.models.get_pretrained_cfg(model_name)
    known = published_names(data.count) if cfg and cfg.num_classes == data.count else None
    if known and data.names and positions(data.names, known) is None:
        say(f"note: the head of {model_name} is of ImageNet's classes, not of {data.what}; it is kept as a start")


def _head_in(weights: dict[str, Tensor], model_name: str) -> list[str]:
    """The tensors of the classifier, of both where a model has two; each has a row for each class."""
    found = [f"{head}.{kind}" for head in head_names(model_name) for kind in ("weight", "bias")]
    return list(dict.fromkeys(key for key in found if key in weights))


def _with_head_of(
    weights: dict[str, Tensor],
    path: Path,
    top: dict[str, Any],
    model: nn.Module,
    model_name: str,
    data: Classes,
    trust: Trust,
    say: Say,
    advice: str,
) -> dict[str, Tensor]:
    """The weights with the head's rows for the data's classes, in their order, and then the others that still fit in.

    Outputs beyond the file's rows, of --larger-head, stay as `model` has them. Raises `UserError` where the classes do
    not fit. Without a head there is nothing to do.
    """
    head, own = _head_in(weights, model_name), model.state_dict()
    if not head or any(key not in own or weights[key].shape[1:] != own[key].shape[1:] for key in head):
        return weights  # of another model, as loading will say
    num_rows, wanted = len(weights[head[0]]), len(own[head[0]])
    names = class_names_in(top)
    if names is None and (data.names is None or wanted > data.count) and num_rows == wanted:
        return weights
    found = match(data, Classes(str(path), num_rows, names), trust, advice)
    for remark in found.remarks:
        say(remark)
    if found.is_identity and num_rows == wanted:
        return weights
    taken = set(found.outputs)
    rows = [*found.outputs, *(row for row in range(num_rows) if row not in taken)][:wanted]
    new = f"; the head's last {wanted - num_rows:,} outputs stay as initialised" if num_rows < wanted else ""
    say(f"initial weights: {len(found.outputs):,} of the head's {num_rows:,} rows, in the order of {data.what}{new}")
    return {**weights, **{key: torch.cat([weights[key][rows], own[key][len(rows) :].cpu()]) for key in head}}
