"""Policy strings such as `rand-m9-mstd0.5-inc1`, read by timm itself, as tables that the plan can draw from."""

from __future__ import annotations

import math
import re
from typing import Any

from timm.data import auto_augment

from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.levels import LEVELS
from lowrank_vit.plan.operations import NAMES, OpSpec, Policy

SETS = ("weights", "3a", "3aw")
_RAND = re.compile(r"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)")
_AUTO = re.compile(r"mstd\d+(\.\d+)?")
_TABLES = ("original", "originalr", "v0", "v0r", "3a")


def parse_policy(text: str) -> Policy | None:
    """The policy of timm's `--aa`; None for "" and "none". Raises `UserError` that lists what there is."""
    if text in ("", "none"):
        return None
    name, *sections = text.split("-")
    pattern = _RAND if name == "rand" else _AUTO
    wrong = [section for section in sections if not pattern.fullmatch(section)]
    if name not in ("rand", *_TABLES) or wrong:
        what = f"`{wrong[0]}` of it" if name in ("rand", *_TABLES) else f"`{name}`"
        raise UserError(
            f"--aa {text}: {what} is not known. There are rand, followed by any of -m9 (level), -n2 (operations an "
            "image), -p0.5 (chance of each), -mstd0.5 (spread of the level; above 100: uniform), -mmax10, -inc1, and "
            f"-t with {', '.join(SETS)}; and {', '.join(_TABLES)}, followed by -mstd. For none, --aa none."
        )
    return _randaugment(text) if name == "rand" else _autoaugment(text)


def _randaugment(text: str) -> Policy:
    parsed = auto_augment.rand_augment_transform(text, {})
    weights = None if parsed.choice_weights is None else tuple(float(w) for w in parsed.choice_weights)
    if weights is not None and parsed.num_layers > len(weights):
        raise UserError(
            f"--aa {text}: n is {parsed.num_layers}, but none of its {len(weights)} operations is picked twice."
        )
    rows = tuple((_spec(op),) for op in parsed.ops)
    return Policy(rows, parsed.num_layers, picks_each_layer=True, weights=weights, **_noise(parsed.ops[0]))


def _autoaugment(text: str) -> Policy:
    parsed = auto_augment.auto_augment_transform(text, {})
    rows = tuple(tuple(_spec(op) for op in row) for row in parsed.policy)
    return Policy(rows, len(rows[0]), picks_each_layer=False, **_noise(parsed.policy[0][0]))


def _spec(op: auto_augment.AugmentOp) -> OpSpec:
    assert op.name in NAMES, op.name
    return OpSpec(op.name, float(op.prob), float(op.magnitude))


def _noise(op: auto_augment.AugmentOp) -> dict[str, Any]:
    std = float(op.magnitude_std)  # type: ignore[arg-type]
    return {"level_std": math.inf if std > 100 else std, "level_max": float(op.magnitude_max or LEVELS)}  # type: ignore[arg-type]
