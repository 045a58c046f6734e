"""Checks of the plans' arguments: sizes of images, shares of ranks, epochs, steps and ids."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from lowrank_vit.common.arguments import NOT_NEGATIVE, Range, check_whole, wrong_argument

SEEDS, EPOCHS = Range(0, 2**64 - 1), Range(0, 2**32 - 1)
"""Ranges of Philox's key and of a word of its counter."""


class Sizes(Protocol):
    """A set of N images as a plan needs it, such as a `Beton`."""

    heights: Any
    widths: Any
    """int (N,) each, pixels: an array, also as a property or a cached one, or what can be made one."""


class Steps(Protocol):
    """A plan's length."""

    num_samples: int
    steps_per_epoch: int


def sides_of(images: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, for `of`; they may be lists. Raises `UserError` for an object without, such as a path.

    Those of a `Beton` were checked when it was opened, and are not walked through again.
    """
    # Its own attribute only: an object that passes unknown names on to a `Beton` may have other heights and widths.
    if isinstance(sides := getattr(images, "__dict__", {}).get("sides"), tuple):
        return sides
    try:
        heights, widths = np.asarray(images.heights), np.asarray(images.widths)
    except AttributeError:
        takes = "a Beton, or an object with heights and widths"
        raise wrong_argument("images", takes, images) from None
    for name, sides in {"images.heights": heights, "images.widths": widths}.items():
        is_whole = sides.ndim == 1 and np.issubdtype(sides.dtype, np.integer)
        if not is_whole or len(sides) != len(heights) or sides.min(initial=1) < 1:
            raise wrong_argument(name, "whole numbers of pixels of at least 1, one for each image", sides)
    return heights, widths


def check_share(img_size: int, batch_size: int, rank: int, world_size: int) -> None:
    """Raise `UserError` for arguments, common to both plans, outside their range."""
    check_whole(img_size=img_size, batch_size=batch_size, world_size=world_size)
    check_whole(NOT_NEGATIVE, rank=rank)
    if rank >= world_size:
        raise wrong_argument("rank", f"a whole number below world_size={world_size}", rank)


def check_step(plan: Steps, epoch: int, step: Any) -> None:
    """Raise `UserError` for a step that a plan does not have."""
    check_whole(EPOCHS, epoch=epoch)
    if not isinstance(step, (int, np.integer)) or not 0 <= step < plan.steps_per_epoch:
        raise wrong_argument("step", f"a whole number below steps_per_epoch={plan.steps_per_epoch}", step)


def check_batch(plan: Steps, epoch: int, step: Any, ids: Any) -> None:
    """Raise `UserError` for a batch that a plan does not have; takes some microseconds."""
    check_step(plan, epoch, step)
    is_whole = isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"
    if not is_whole or (len(ids) and not 0 <= ids.min() <= ids.max() < plan.num_samples):
        raise wrong_argument("ids", f"a row of ids(epoch): whole numbers below {plan.num_samples}", ids)
