"""The ranges of the training plan's random choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_vit.common.arguments import (
    ABOVE_0,
    NOT_NEGATIVE,
    SHARE,
    Range,
    check_ascending,
    check_choice,
    check_number,
    check_whole,
)
from lowrank_vit.plan.mixing import MixRules
from lowrank_vit.plan.operations import Policy
from lowrank_vit.plan.order import OrderName

REPEATS = Range(1, 2**16)


@dataclass(frozen=True)
class TrainRules:
    """Ranges of the random choices; names and meanings are timm's flags."""

    is_cropped: bool = True
    """Random resized crops by `scale` and `ratio`; else whole images are stretched to a square."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    policy: Policy | None = None
    color_jitter: tuple[float, ...] | None = None
    """Strength of brightness, contrast and saturation."""
    interpolation: int | None = None
    """For crops and geometric operations: NEAREST, BILINEAR or BICUBIC; None: one of the last two, drawn for each."""
    reprob: float = 0.0
    recount: int = 1
    mixing: MixRules = field(default_factory=MixRules)
    mixup_off_epoch: int = 0
    order: OrderName = "keyed"
    """For sets of more than 65,536 samples: keyed, or sorted as in earlier versions."""
    repeats: int = 1
    """How often a sample comes in an epoch, each time drawn anew; see `dealt_repeats`."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a value outside its range."""
        check_ascending(Range(0, 1, open_low=True), scale=self.scale)
        check_ascending(ABOVE_0, ratio=self.ratio)
        check_number(SHARE, hflip=self.hflip, vflip=self.vflip, reprob=self.reprob)
        check_whole(recount=self.recount)
        check_whole(REPEATS, repeats=self.repeats)
        check_whole(NOT_NEGATIVE, mixup_off_epoch=self.mixup_off_epoch)
        check_choice(("keyed", "sorted"), order=self.order)
