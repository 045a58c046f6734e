"""Options of low-rank training, and the check that they do not contradict one another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from tyro.conf import arg

from lowrank_vit.common.arguments import ABOVE_0, NOT_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_1, Range
from lowrank_vit.common.errors import UserError

_SHARE_BELOW_1 = Range(0, 1, open_low=True, open_high=True)
_EXAMPLE = "8=0.15 20=0.08"

RankRule = Literal["none", "energy", "mp", "kfac"]
"""How the rank of a layer is chosen; none: no layer is factorised during training."""


@dataclass(frozen=True)
class LowRank:
    """Training that factorises layers: once their directions have settled, at given epochs, or from the start."""

    lowrank_init: Annotated[float | None, _SHARE_BELOW_1] = None
    """Factorise the target layers from the start, to this share of their parameters, by the SVD of their initial
    weights."""
    lora: Annotated[int | None, POSITIVE] = None
    """LoRA: train adapters of this rank beside the target layers, and the head; freeze everything else."""
    lora_alpha: Annotated[float | None, ABOVE_0, arg(help_behavior_hint="(default: the rank, so by 1)")] = None
    """LoRA: scale the adapters by alpha / rank."""
    lora_dropout: Annotated[float, SHARE_BELOW_1] = 0.0
    """LoRA: dropout rate of the adapters' inputs."""
    lowrank_train: RankRule = "none"
    """Factorise layers during training once their directions have settled. This chooses their rank: energy, by
    --lowrank-energy; mp, singular values above the Marchenko-Pastur edge; kfac, greedily under --lowrank-budget. Needs
    --spec-monitor."""
    lowrank_targets: str = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    """Names of the linear layers that may be factorised, or their endings, separated by commas."""
    lowrank_energy: Annotated[float, _SHARE_BELOW_1] = 0.9
    """--lowrank-train energy: keep the smallest rank with this share of a layer's squared singular values."""
    lowrank_budget: Annotated[float, _SHARE_BELOW_1] = 0.15
    """--lowrank-train kfac: share of their parameters that all target layers together keep in the end."""
    lowrank_settled: Annotated[int, POSITIVE] = 3
    """A layer has settled when this many complete refreshes in a row find the same first directions."""
    lowrank_thresholds: Annotated[
        tuple[float, float, float], _SHARE_BELOW_1, arg(metavar="ENERGY COSINE ABOVE_NOISE")
    ] = (0.75, 0.7, 0.2)
    """What a refresh must reach for a layer to settle, from 0 (chance) to 1 (certainty): energy of the weights in the
    directions found before, cosine between these and the new ones, and energy above the noise."""
    lowrank_switches: Annotated[int, POSITIVE] = 3
    """Largest number of times in a run that layers are factorised; also the largest length of --lowrank-schedule."""
    lowrank_at_once: Annotated[
        float | None, SHARE, arg(help_behavior_hint="(default: 1 / number of switches left)")
    ] = None
    """Factorise settled layers only when together they hold at least this share of the parameters that could still be
    factorised. The share falls as updates run out (to a half at half-time). 0: no layer waits."""
    lowrank_schedule: Annotated[tuple[str, ...], arg(metavar="EPOCH=BUDGET ...")] = ()
    """After EPOCH epochs, factorise all target layers to this share of their parameters, settled or not. What has
    settled is then only logged."""
    lowrank_dry_run: bool = False
    """Only log when layers would be factorised, and to which rank. Training stays the same, to the bit."""
    lowrank_moments: Literal["carry", "restart"] = "carry"
    """Optimizer state of new factors: carried over from the matrix, or restarted with a short warm-up."""
    lowrank_decay: Literal["factors", "product"] = "factors"
    """Apply weight decay to each factor, or to their product (Frobenius decay)."""
    lowrank_calibration_images: Annotated[int, POSITIVE] = 1024
    """kfac: number of training images for its moments, drawn by --seed. The first 128 also measure the loss at a
    switch."""
    reg_nuclear: Annotated[float, NOT_NEGATIVE] = 0.0
    """Nuclear-norm penalty: add this times the sum of the layers' singular values to the loss; 0: off."""
    reg_stable_rank: Annotated[float, NOT_NEGATIVE] = 0.0
    """Stable-rank penalty: add this times the sum of the layers' stable ranks, |W|_F^2 / sigma_1^2, to the loss; 0:
    off."""
    spectral_clip: Annotated[float | None, ABOVE_0, arg(help_behavior_hint="(default: off)")] = None
    """Clip the layers' singular values at this value."""
    reg_every: Annotated[int, POSITIVE] = 10
    """Updates between two clippings, and between two computations of the penalties' gradients (reused in between)."""
    reg_targets: Annotated[str | None, arg(help_behavior_hint="(default: as --lowrank-targets)")] = None
    """Layers that the --reg options and --spectral-clip act on: names or endings, separated by commas."""
    reg_coupled: bool = False
    """Add the penalties' gradients to the loss's, as an L2 penalty would be. Otherwise they are decoupled, like AdamW's
    weight decay: weights move by learning rate times gradient."""


def parse_schedule(texts: tuple[str, ...]) -> dict[int, float]:
    """--lowrank-schedule as {epochs before the switch: share of the targets' parameters}, in order.

    Raises `UserError` for a malformed text or share, and for epochs out of order.
    """
    pairs: list[tuple[int, float]] = []
    for text in texts:
        match = re.fullmatch(r"([0-9]+)=([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)", text)
        if not match or float(match[2]) not in _SHARE_BELOW_1:
            raise UserError(
                "--lowrank-schedule takes EPOCH=BUDGET, a whole number and a share above 0 and below 1, e.g. "
                f"{_EXAMPLE}; not `{text}`."
            )
        pairs.append((int(match[1]), float(match[2])))
    for (epoch, budget), (later, smaller) in itertools.pairwise(pairs):
        if later <= epoch:
            raise UserError(
                f"--lowrank-schedule: epoch {later} follows epoch {epoch}. Give each epoch once, in ascending order."
            )
        if smaller >= budget:
            raise UserError(
                f"--lowrank-schedule: ranks never grow, so {later}={smaller:g} does nothing after {epoch}={budget:g}. "
                "Each budget must be smaller than the one before."
            )
    if pairs and pairs[0][0] == 0:
        raise UserError("--lowrank-schedule: the smallest EPOCH is 1. It is the number of epochs before the switch.")
    return dict(pairs)


def _regularises(options: LowRank) -> bool:
    return bool(options.reg_nuclear or options.reg_stable_rank)


def _acts_on_weights(options: LowRank) -> bool:
    return _regularises(options) or options.spectral_clip is not None


class _Need(NamedTuple):
    """A condition without which a flag does nothing."""

    is_met: Callable[[LowRank], bool]
    why: str
    """The rest of the sentence that begins with the flag."""


_LORA = _Need(
    lambda options: options.lora is not None,
    "needs --lora, which is not given. Add --lora RANK, or leave it out.",
)
_TRAIN = _Need(
    lambda options: options.lowrank_train != "none",
    "needs --lowrank-train, which is not given. Add --lowrank-train kfac (or energy, mp), or leave it out.",
)
_KFAC = _Need(
    lambda options: options.lowrank_train == "kfac",
    "needs --lowrank-train kfac, which is not given. Give that rule, or leave it out.",
)
_ENERGY = _Need(  # beside kfac's schedule it sets the ranks that refreshes log
    lambda options: (
        options.lowrank_train == "energy" or bool(options.lowrank_train == "kfac" and options.lowrank_schedule)
    ),
    "needs --lowrank-train energy, which is not given. Give that rule, or leave it out.",
)
_NO_SCHEDULE = _Need(
    lambda options: not options.lowrank_schedule,
    "applies when layers are factorised once they settle, but --lowrank-schedule sets the epochs and their budgets. "
    "Leave one of them out.",
)
_FACTORS = _Need(
    lambda options: options.lowrank_train != "none" or options.lowrank_init is not None,
    "needs layers that --lowrank-train or --lowrank-init factorises, and neither is given. Add one of them, or leave "
    "it out.",
)
_TARGETS = _Need(
    lambda options: (
        _FACTORS.is_met(options) or _LORA.is_met(options) or (_acts_on_weights(options) and options.reg_targets is None)
    ),
    "names the layers of --lowrank-train, --lowrank-init, --lora, or of regularisers without --reg-targets, but none "
    "of these is given. Add one of them, or leave it out.",
)
_PENALTY = _Need(
    _regularises,
    "needs --reg-nuclear or --reg-stable-rank, and neither is given. Add one of them with its weight, e.g. "
    "--reg-nuclear 0.05, or leave it out.",
)
_ACTING = _Need(
    _acts_on_weights,
    "needs --reg-nuclear, --reg-stable-rank or --spectral-clip, and none is given. Add one of them, e.g. "
    "--reg-nuclear 0.05, or leave it out.",
)
_NEEDS: dict[str, tuple[_Need, ...]] = {
    "lora_alpha": (_LORA,),
    "lora_dropout": (_LORA,),
    "lowrank_targets": (_TARGETS,),
    "lowrank_energy": (_TRAIN, _ENERGY),
    "lowrank_budget": (_TRAIN, _KFAC, _NO_SCHEDULE),
    "lowrank_settled": (_TRAIN,),
    "lowrank_thresholds": (_TRAIN,),
    "lowrank_switches": (_TRAIN,),
    "lowrank_at_once": (_TRAIN, _NO_SCHEDULE),
    "lowrank_schedule": (_TRAIN,),
    "lowrank_dry_run": (_TRAIN,),
    "lowrank_moments": (_TRAIN,),
    "lowrank_decay": (_FACTORS,),
    "lowrank_calibration_images": (_TRAIN,),
    "reg_every": (_ACTING,),
    "reg_targets": (_ACTING,),
    "reg_coupled": (_PENALTY,),
}
"""Conditions by field; fields that are not here work by themselves."""


def check_low_rank(options: LowRank, *, is_watched: bool) -> None:
    """Raise `UserError` for options that need or exclude another; `is_watched`: with --spec-monitor."""
    _check_idle(options)
    _check_lora(options)
    if options.lowrank_train == "none":
        return
    if options.lowrank_init is not None:
        raise UserError(
            "--lowrank-init factorises the targets from the start, and --lowrank-train during training. Leave one of "
            "them out."
        )
    schedule, most = parse_schedule(options.lowrank_schedule), options.lowrank_switches
    if len(schedule) > most:
        raise UserError(
            f"--lowrank-schedule has {len(schedule)} epochs, and --lowrank-switches {most} lets a run switch no more "
            f"often than that. Add --lowrank-switches {len(schedule)}, or leave epochs out."
        )
    if not is_watched:
        raise UserError(
            f"--lowrank-train {options.lowrank_train} needs the refreshes of --spec-monitor, which is off. Add "
            "--spec-monitor."
        )


def _check_idle(options: LowRank) -> None:
    """Raise `UserError` for the first option, not at its default, that does nothing beside the others."""
    defaults = LowRank()
    for name, needs in _NEEDS.items():
        if getattr(options, name) == getattr(defaults, name):
            continue
        if missing := next((need for need in needs if not need.is_met(options)), None):
            raise UserError(f"--{name.replace('_', '-')} {missing.why}")


def _check_lora(options: LowRank) -> None:
    """Raise `UserError` for options beside --lora that change the targets' own weights."""
    if options.lora is None:
        return
    changing = {
        "lowrank-init": options.lowrank_init is not None,
        "lowrank-train": options.lowrank_train != "none",
        "reg-nuclear": options.reg_nuclear,
        "reg-stable-rank": options.reg_stable_rank,
        "spectral-clip": options.spectral_clip is not None,
    }
    if other := [name for name, is_given in changing.items() if is_given]:
        raise UserError(
            f"--lora keeps the targets' own weights as they are, and --{other[0]} changes them. Leave one of them out."
        )
