"""Number the meaning of seeds and flags, so that an older run never silently continues with another meaning.

A run's checkpoints and its args.yaml hold the number under `KEY`; a file without one is from before there were numbers,
`FIRST`. `CHANGES` lists the changes since: the first makes number 2, and so on. To change the meaning of a seed or a
flag, append a `Change`; never remove or reorder one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_vit.common.errors import UserError

KEY = "meaning"
FIRST = 1


@dataclass(frozen=True)
class Change:
    """One change of meaning."""

    what: str
    """For people: the new behaviour and the old one; without a full stop."""
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Options by name, without dashes in front, with the values that give the old meaning; they may be new ones."""
    cannot: str = ""
    """Why an older run cannot be resumed; empty if `before` suffices, or if the data tell what was meant."""
    concerns: Callable[[Mapping[str, Any]], bool] = lambda args: True
    """Whether it affects a run with these options, by name; a missing option is at its default."""


def _is_mixed(args: Mapping[str, Any]) -> bool:
    return any(args.get(name) for name in ("mixup", "cutmix", "cutmix-minmax"))


def _is_of_folders(args: Mapping[str, Any]) -> bool:
    """Whether a run may have read class folders."""
    dataset = str(args.get("dataset") or "").lower()
    others = ("digits", "torch/cifar100", "hfds/", "hfids/", "wds/")
    return not args.get("synthetic") and not dataset.startswith(others)


def _may_be_large(args: Mapping[str, Any]) -> bool:
    """Whether a run's sets may have more than 65,536 samples."""
    dataset = str(args.get("dataset") or "").lower()
    return not args.get("synthetic") and dataset not in ("digits", "torch/cifar100")


def _may_decode_on_a_gpu(args: Mapping[str, Any]) -> bool:
    return not args.get("synthetic") and args.get("loader", "auto") in ("auto", "dali")


CHANGES: tuple[Change, ...] = (
    Change(
        "mixup and cutmix are drawn for each --mix-block images; before, once for a global batch",
        {"mix-block": 0},
        concerns=_is_mixed,
    ),
    Change(
        "classes are the folders that hold images, as in timm, and no longer those directly in the split",
        {"nested-classes": "top"},
        concerns=_is_of_folders,
    ),
    Change(
        "an EMA without --model-ema-warmup or --no-model-ema-warmup has a warm-up in runs of fewer than "
        "10 / (1 - decay) updates; before, it had none",
        {"model-ema-warmup": False},
        concerns=lambda args: args.get("model-ema", True),
    ),
    Change(
        "random erasing comes after mixup and cutmix; before, it came ahead of them",
        {"erase-first": True},
        concerns=lambda args: _is_mixed(args) and bool(args.get("reprob")),
    ),
    Change(
        "DALI interpolates the colours of JPEGs on a GPU as it does on a CPU; before, it repeated them",
        {"jpeg-fancy-upsampling": False},
        concerns=_may_decode_on_a_gpu,
    ),
    Change(
        "Muon leaves first layer, embeddings and classifier to its AdamW; before, it orthogonalised their updates, too",
        {"muon-fallback": False},
        concerns=lambda args: "muon" in str(args.get("opt")).lower(),
    ),
    Change(
        "one in --spec-full-every refreshes computes whole spectra, the others only first values; before, all did",
        {"spec-full-every": 1},
        concerns=lambda args: bool(args.get("spec-monitor")),
    ),
    Change(
        "metrics.jsonl and trackers get means of the spectra and spectra/ has every number; before, they got all",
        {"spec-log": "all", "wandb-spec": "all"},
        concerns=lambda args: bool(args.get("spec-monitor")),
    ),
    Change(
        "sets above 65,536 images are shuffled by a keyed permutation; before, they were sorted by random numbers",
        {"epoch-order": "sorted"},
        concerns=_may_be_large,
    ),
)


def now() -> int:
    """The number of the meaning that seeds and flags have in this program."""
    return FIRST + len(CHANGES)


def number_in(content: Mapping[str, Any], source: str) -> int | None:
    """The number in a file's content; None without one. Raises `UserError` for a number that is not known here."""
    number = content.get(KEY)
    if number is None:
        return None
    if type(number) is not int or number < FIRST:
        raise UserError(f"{source}: `{KEY}: {number}` must be a whole number, {FIRST} to {now()}. Remove that line.")
    if number > now():
        raise UserError(
            f"{source} was written by a newer lowrank-vit: the meaning of its seeds and flags has the number {number}, "
            f"and this program knows up to {now()}. Update lowrank-vit to continue it, or begin a new run with options "
            "of your own."
        )
    return number


def changes_since(number: int, args: Mapping[str, Any]) -> list[Change]:
    """The changes after `number` that affect a run with the options `args`, by name."""
    return [change for change in CHANGES[number - FIRST :] if change.concerns(args)]


def values_before(number: int, args: Mapping[str, Any]) -> dict[str, Any]:
    """The options, by name, that restore the meaning of `number` for a run with the options `args`."""
    values: dict[str, Any] = {}
    for change in reversed(changes_since(number, args)):  # of two about one option the older one counts
        values |= change.before
    return values


def check_can_go_on(number: int, args: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` if this program can no longer do what a run of that number meant."""
    for change in changes_since(number, args):
        if change.cannot:
            raise UserError(
                f"{source} is of an older run, and {change.what}. It cannot be resumed: {change.cannot}. Begin a new "
                "run from its weights with --initial-checkpoint, or resume it with the version that began it."
            )
