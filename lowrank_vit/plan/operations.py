"""Draw the image operations: which, how strong, in which direction, with which interpolation.

A `Policy` is RandAugment (each layer picks any choice), AutoAugment (one draw picks a row of operations) or colour
jitter. Meanings of levels are timm's (`timm/data/auto_augment.py`), and timm itself reads the policies' names.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import BICUBIC, BILINEAR
from lowrank_vit.plan.philox import counter_of, philox, to_unit

if TYPE_CHECKING:
    from timm.data.auto_augment import AugmentOp

LEVELS = 10.0
"""Greatest level of timm's scale, unless `mmax` says otherwise."""


class Formula(IntEnum):
    """How an operation's argument follows from its level, see `argument_of`."""

    NONE = 0
    SIGNED = 1
    TRANSLATE = 2
    POSTERIZE = 3
    POSTERIZE_INCREASING = 4
    POSTERIZE_ORIGINAL = 5
    SOLARIZE = 6
    SOLARIZE_INCREASING = 7
    SOLARIZE_ADD = 8
    ENHANCE = 9
    ENHANCE_INCREASING = 10
    DESATURATE = 11
    BLUR = 12
    BLUR_RANDOM = 13


@njit(cache=True)
def argument_of(formula: int, factor: float, level: float, sign: float, u: float, translate: float) -> float:
    """The argument at a level of 0-10, a float.

    `factor`: of SIGNED; `sign`: +-1, for operations with a direction; `u`: uniform in (0, 1), for those that draw more;
    `translate`: pixels that level 10 translates by.
    """
    x = level / LEVELS
    # timm's `int()` cuts off, and so does `math.trunc`.
    if formula == Formula.SIGNED:
        return sign * x * factor
    if formula == Formula.TRANSLATE:
        return sign * x * translate
    if formula == Formula.POSTERIZE:
        return float(math.trunc(x * 4))
    if formula == Formula.POSTERIZE_INCREASING:
        return float(4 - math.trunc(x * 4))
    if formula == Formula.POSTERIZE_ORIGINAL:
        return float(4 + math.trunc(x * 4))
    if formula == Formula.SOLARIZE:
        return float(min(256, math.trunc(x * 256)))
    if formula == Formula.SOLARIZE_INCREASING:
        return float(256 - min(256, math.trunc(x * 256)))
    if formula == Formula.SOLARIZE_ADD:
        return float(min(128, math.trunc(x * 110)))
    if formula == Formula.ENHANCE:
        return x * 1.8 + 0.1
    if formula == Formula.ENHANCE_INCREASING:
        return max(0.1, 1.0 + sign * x * 0.9)
    if formula == Formula.DESATURATE:
        return 1.0 - min(max(0.5 + 0.5 * x, 0.5), 1.0)
    if formula == Formula.BLUR:
        return min(max(0.1 + 1.9 * x, 0.1), 2.0)
    if formula == Formula.BLUR_RANDOM:
        return 0.1 + (2.0 * min(max(x, 0.0), 1.0) - 0.1) * u
    return 0.0


class Kind(IntEnum):
    """The operation on pixels; the meaning of its argument in brackets."""

    NONE = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    """[bits to keep, 0-8]"""
    SOLARIZE = 5
    """[threshold, 0-256]"""
    SOLARIZE_ADD = 6
    """[added to pixels below 128]"""
    BRIGHTNESS = 7
    """[factor; 1 changes nothing; also of the next three]"""
    CONTRAST = 8
    COLOR = 9
    SHARPNESS = 10
    ROTATE = 11
    """[degrees counter-clockwise]"""
    SHEAR_X = 12
    """[factor; also of the next]"""
    SHEAR_Y = 13
    TRANSLATE_X = 14
    """[pixels to the left; the next: upwards]"""
    TRANSLATE_Y = 15
    BLUR = 16
    """[standard deviation of the Gaussian, pixels]"""


GEOMETRIC = (Kind.ROTATE, Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y)

# timm's name -> (kind, how its argument follows from the level 0..10, the formula's factor)
NAMES: dict[str, tuple[Kind, Formula, float]] = {
    "AutoContrast": (Kind.AUTOCONTRAST, Formula.NONE, 0),
    "Equalize": (Kind.EQUALIZE, Formula.NONE, 0),
    "Invert": (Kind.INVERT, Formula.NONE, 0),
    "Rotate": (Kind.ROTATE, Formula.SIGNED, 30),
    "Posterize": (Kind.POSTERIZE, Formula.POSTERIZE, 0),
    "PosterizeIncreasing": (Kind.POSTERIZE, Formula.POSTERIZE_INCREASING, 0),
    "PosterizeOriginal": (Kind.POSTERIZE, Formula.POSTERIZE_ORIGINAL, 0),
    "Solarize": (Kind.SOLARIZE, Formula.SOLARIZE, 0),
    "SolarizeIncreasing": (Kind.SOLARIZE, Formula.SOLARIZE_INCREASING, 0),
    "SolarizeAdd": (Kind.SOLARIZE_ADD, Formula.SOLARIZE_ADD, 0),
    "ShearX": (Kind.SHEAR_X, Formula.SIGNED, 0.3),
    "ShearY": (Kind.SHEAR_Y, Formula.SIGNED, 0.3),
    "TranslateXRel": (Kind.TRANSLATE_X, Formula.TRANSLATE, 0),
    "TranslateYRel": (Kind.TRANSLATE_Y, Formula.TRANSLATE, 0),
    "Desaturate": (Kind.COLOR, Formula.DESATURATE, 0),
    "GaussianBlur": (Kind.BLUR, Formula.BLUR, 0),
    "GaussianBlurRand": (Kind.BLUR, Formula.BLUR_RANDOM, 0),
    **{
        f"{name}{suffix}": (kind, Formula.ENHANCE_INCREASING if suffix else Formula.ENHANCE, 0)
        for name, kind in (
            ("Color", Kind.COLOR),
            ("Contrast", Kind.CONTRAST),
            ("Brightness", Kind.BRIGHTNESS),
            ("Sharpness", Kind.SHARPNESS),
        )
        for suffix in ("", "Increasing")
    },
}


@dataclass(frozen=True)
class OpSpec:
    """One operation of a policy."""

    name: str
    """A key of `NAMES`."""
    prob: float
    """Probability that it is applied once it is picked."""
    level: float
    """timm's magnitude."""


@dataclass(frozen=True)
class Policy:
    """An augmentation policy; see the module."""

    rows: tuple[tuple[OpSpec, ...], ...]
    """AutoAugment: one row is picked and applied in order. RandAugment: rows of one, picked anew for each layer."""
    layers: int
    """Number of operations per image (RandAugment), or the length of the rows."""
    picks_each_layer: bool
    weights: tuple[float, ...] | None = None
    """Chance of each row; with weights RandAugment picks without replacement, as timm."""
    level_std: float = 0.0
    """Standard deviation of the level's normal noise; infinite for a level uniform in [0, level]."""
    level_max: float = LEVELS
    translate: float = 0.45
    """Distance of a translation at level 10, as a share of the side."""


@dataclass(frozen=True)
class ImageOps:
    """The operations of a batch of B images, in order of application."""

    kinds: np.ndarray
    """int8 (B, L), `Kind`."""
    args: np.ndarray
    """float64 (B, L)."""
    interpolations: np.ndarray
    """int8 (B, L): NEAREST, BILINEAR or BICUBIC, for geometric operations."""


def draw_ops(
    policy: Policy, interpolation: int | None, img_size: int, key: np.uint64, epoch: int, ids: np.ndarray, stream: int
) -> ImageOps:
    """Draw the policy for each sample id; `interpolation` None draws bilinear or bicubic for each operation."""
    B, L = len(ids), policy.layers
    uniforms = uniform_table(key, epoch, ids, stream, 2 * L).reshape(B, L, 8)
    rows = _pick_rows(policy, uniforms[:, :, 0])
    column = np.zeros(L, np.int64) if policy.picks_each_layer else np.arange(L)
    chosen = rows * len(policy.rows[0]) + column  # (B, L), index into the tables
    probs, levels, kinds_of, formulas, factors = _tables(policy)
    spread = policy.level_std, policy.level_max
    translate = policy.translate * img_size
    kinds, args = _draw(uniforms, chosen, probs, levels, kinds_of, formulas, factors, *spread, translate)
    drawn = np.where(uniforms[:, :, 6] < 0.5, BILINEAR, BICUBIC)
    return ImageOps(kinds, args, (drawn if interpolation is None else np.full((B, L), interpolation)).astype(np.int8))


@cache
def _tables(policy: Policy) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probability, level, kind, formula and factor of all operations, row by row."""
    specs = [op for row in policy.rows for op in row]
    kinds, formulas, factors = zip(*(NAMES[op.name] for op in specs), strict=True)
    codes = np.array(kinds, np.int8), np.array(formulas, np.int8), np.array(factors, np.float64)
    return np.array([op.prob for op in specs]), np.array([op.level for op in specs], np.float64), *codes


@njit(cache=True)
def _draw(
    uniforms: np.ndarray,
    chosen: np.ndarray,
    probs: np.ndarray,
    levels: np.ndarray,
    kinds_of: np.ndarray,
    formulas: np.ndarray,
    factors: np.ndarray,
    std: float,
    level_max: float,
    translate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """int8 and float64 (B, L): kind and argument of each operation, from its eight uniforms."""
    B, L = chosen.shape
    kinds, args = np.zeros((B, L), np.int8), np.zeros((B, L))
    for n in range(B):
        for layer in range(L):
            u, op = uniforms[n, layer], int(chosen[n, layer])
            if u[1] >= probs[op]:
                continue
            level = levels[op]
            if math.isinf(std):
                level *= u[2]
            elif std > 0:
                radius = math.sqrt(-2.0 * math.log(u[2]))  # Box and Muller, 1958
                level += std * radius * math.cos(2.0 * math.pi * u[3])
            level = min(max(level, 0.0), level_max)
            sign = -1.0 if u[4] < 0.5 else 1.0
            kinds[n, layer] = kinds_of[op]
            args[n, layer] = argument_of(formulas[op], factors[op], level, sign, u[5], translate)
    return kinds, args


def draw_jitter(strengths: tuple[float, ...], key: np.uint64, epoch: int, ids: np.ndarray, stream: int) -> ImageOps:
    """Draw torchvision's ColorJitter: brightness, contrast, saturation in any order, factors within 1 +- strength."""
    B = len(ids)
    uniforms = uniform_table(key, epoch, ids, stream, 2)
    strength = np.array(strengths)
    low = np.maximum(0.0, 1.0 - strength)
    factors = low + (1.0 + strength - low) * uniforms[:, :3]
    kinds = np.array([Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR], np.int8)
    kinds = np.where(strength > 0, kinds, Kind.NONE).astype(np.int8)
    order = np.argsort(uniforms[:, 4:7], axis=1)
    return ImageOps(kinds[order], np.take_along_axis(factors, order, 1), np.full((B, 3), BILINEAR, np.int8))


def join_ops(parts: list[ImageOps]) -> ImageOps | None:
    """Operations of several draws, one after the other; None without any."""
    if not parts:
        return None
    return ImageOps(
        *(np.concatenate([getattr(p, n) for p in parts], axis=1) for n in ("kinds", "args", "interpolations"))
    )


def _pick_rows(policy: Policy, uniforms_BL: np.ndarray) -> np.ndarray:
    """int64 (B, L): the row of the policy that each layer takes."""
    count = len(policy.rows)
    if not policy.picks_each_layer:
        first = np.minimum((uniforms_BL[:, :1] * count).astype(np.int64), count - 1)
        return np.repeat(first, policy.layers, axis=1)
    if policy.weights is None:
        return np.minimum((uniforms_BL * count).astype(np.int64), count - 1)
    left = np.tile(np.array(policy.weights, np.float64), (len(uniforms_BL), 1))
    rows = np.zeros(uniforms_BL.shape, np.int64)
    for layer in range(policy.layers):
        cumulative = np.cumsum(left, axis=1)
        rows[:, layer] = (uniforms_BL[:, layer : layer + 1] * cumulative[:, -1:] >= cumulative).sum(axis=1)
        np.put_along_axis(left, rows[:, layer : layer + 1], 0.0, axis=1)
    return rows


@njit(cache=True)
def uniform_table(key: np.uint64, epoch: int, ids: np.ndarray, stream: int, blocks: int) -> np.ndarray:
    """float64 (B, 4 * blocks) strictly inside (0, 1): the draws 0..blocks-1 of each sample id."""
    table = np.empty((len(ids), 4 * blocks))
    for n in range(len(ids)):
        id_, use = counter_of(ids[n], stream)
        for draw in range(blocks):
            w0, w1, w2, w3 = philox(key, draw, id_, epoch, use)
            table[n, 4 * draw] = to_unit(w0)
            table[n, 4 * draw + 1] = to_unit(w1)
            table[n, 4 * draw + 2] = to_unit(w2)
            table[n, 4 * draw + 3] = to_unit(w3)
    return table


SETS = ("weights", "3a", "3aw")
_RAND = re.compile(r"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)")
_AUTO = re.compile(r"mstd\d+(\.\d+)?")
_TABLES = ("original", "originalr", "v0", "v0r", "3a")


def parse_policy(text: str, shown: str = "--aa ") -> Policy | None:
    """The policy of timm's `--aa`; None for "" and "none". Raises `UserError` that lists the known policies.

    `shown`: the flag or argument before the text in messages.
    """
    if text in ("", "none"):
        return None
    name, *sections = text.split("-")
    pattern = _RAND if name == "rand" else _AUTO
    wrong = [section for section in sections if not pattern.fullmatch(section)]
    if name not in ("rand", *_TABLES) or wrong:
        what = f"`{wrong[0]}` of it" if name in ("rand", *_TABLES) else f"`{name}`"
        raise UserError(
            f"{shown}{text}: {what} is not known. There are rand, followed by any of -m9 (level), -n2 (operations an "
            "image), -p0.5 (chance of each), -mstd0.5 (spread of the level; above 100: uniform), -mmax10, -inc1, and "
            f"-t with {', '.join(SETS)}; and {', '.join(_TABLES)}, followed by -mstd. For none, {shown}none."
        )
    return _randaugment(text, shown) if name == "rand" else _autoaugment(text)


def _randaugment(text: str, shown: str) -> Policy:
    from timm.data import auto_augment  # heavy

    parsed = auto_augment.rand_augment_transform(text, {})
    weights = None if parsed.choice_weights is None else tuple(float(w) for w in parsed.choice_weights)
    if weights is not None and parsed.num_layers > len(weights):
        raise UserError(
            f"{shown}{text}: n is {parsed.num_layers}, but none of its {len(weights)} operations is picked twice."
        )
    rows = tuple((_spec(op),) for op in parsed.ops)
    return Policy(rows, parsed.num_layers, picks_each_layer=True, weights=weights, **_noise(parsed.ops[0]))


def _autoaugment(text: str) -> Policy:
    from timm.data import auto_augment  # heavy

    parsed = auto_augment.auto_augment_transform(text, {})
    rows = tuple(tuple(_spec(op) for op in row) for row in parsed.policy)
    return Policy(rows, len(rows[0]), picks_each_layer=False, **_noise(parsed.policy[0][0]))


def _spec(op: AugmentOp) -> OpSpec:
    assert op.name in NAMES, op.name
    return OpSpec(op.name, float(op.prob), float(op.magnitude))


def _noise(op: AugmentOp) -> dict[str, Any]:
    std = float(op.magnitude_std)  # type: ignore[arg-type]
    return {"level_std": math.inf if std > 100 else std, "level_max": float(op.magnitude_max or LEVELS)}  # type: ignore[arg-type]
