"""What the plan draws for image operations: which, how strong, in which direction, with which interpolation.

A `Policy` is RandAugment (each layer picks any choice), AutoAugment (one draw picks a row of operations) or colour
jitter. Meanings of levels are timm's (`timm/data/auto_augment.py`); strings are parsed by `lowrank_vit.augment.policy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit

from lowrank_vit.data.philox import philox, to_unit

LEVELS = 10.0
"""Greatest level of timm's scale, unless `mmax` says otherwise."""


class Kind(IntEnum):
    """What is done to the pixels; the argument's meaning in brackets."""

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
NEAREST, BILINEAR, BICUBIC = 0, 1, 2

# timm's name -> (kind, how its argument follows from the level 0..10)
NAMES: dict[str, tuple[Kind, str]] = {
    "AutoContrast": (Kind.AUTOCONTRAST, "none"),
    "Equalize": (Kind.EQUALIZE, "none"),
    "Invert": (Kind.INVERT, "none"),
    "Rotate": (Kind.ROTATE, "signed 30"),
    "Posterize": (Kind.POSTERIZE, "posterize"),
    "PosterizeIncreasing": (Kind.POSTERIZE, "posterize increasing"),
    "PosterizeOriginal": (Kind.POSTERIZE, "posterize original"),
    "Solarize": (Kind.SOLARIZE, "solarize"),
    "SolarizeIncreasing": (Kind.SOLARIZE, "solarize increasing"),
    "SolarizeAdd": (Kind.SOLARIZE_ADD, "solarize add"),
    "ShearX": (Kind.SHEAR_X, "signed 0.3"),
    "ShearY": (Kind.SHEAR_Y, "signed 0.3"),
    "TranslateXRel": (Kind.TRANSLATE_X, "translate"),
    "TranslateYRel": (Kind.TRANSLATE_Y, "translate"),
    "Desaturate": (Kind.COLOR, "desaturate"),
    "GaussianBlur": (Kind.BLUR, "blur"),
    "GaussianBlurRand": (Kind.BLUR, "blur random"),
    **{
        f"{name}{suffix}": (kind, f"enhance{' increasing' * bool(suffix)}")
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
    """Chance that it is applied when it was picked."""
    level: float
    """timm's magnitude."""


@dataclass(frozen=True)
class Policy:
    """An augmentation policy; see the module."""

    rows: tuple[tuple[OpSpec, ...], ...]
    """AutoAugment: one row is picked and applied in order. RandAugment: rows of one, picked anew for each layer."""
    layers: int
    """Operations an image gets (RandAugment), or the length of the rows."""
    picks_each_layer: bool
    weights: tuple[float, ...] | None = None
    """Chance of each row; with weights RandAugment picks without replacement, as timm."""
    level_std: float = 0.0
    """Standard deviation of the level's normal noise; infinite for a level uniform in [0, level]."""
    level_max: float = LEVELS
    translate: float = 0.45
    """Share of the side that level 10 translates by."""


@dataclass(frozen=True)
class ImageOps:
    """The operations of a batch of B images, in order of application."""

    kinds: np.ndarray
    """int8 (B, L), `Kind`."""
    args: np.ndarray
    """float64 (B, L)."""
    kernels: np.ndarray
    """int8 (B, L): NEAREST, BILINEAR or BICUBIC, for geometric operations."""


def draw_ops(
    policy: Policy, kernel: int | None, img_size: int, key: np.uint64, epoch: int, ids: np.ndarray, stream: int
) -> ImageOps:
    """Draw the policy for each sample id; `kernel` None draws bilinear or bicubic for each operation."""
    B, L = len(ids), policy.layers
    uniforms = uniform_table(key, epoch, ids, stream, 2 * L).reshape(B, L, 8)
    rows = _pick_rows(policy, uniforms[:, :, 0])
    column = np.zeros(L, np.int64) if policy.picks_each_layer else np.arange(L)
    specs = [op for row in policy.rows for op in row]
    width = len(policy.rows[0])
    chosen = rows * width + column  # (B, L), index into specs
    probs = np.array([op.prob for op in specs])[chosen]
    base = np.array([op.level for op in specs])[chosen]
    applied = uniforms[:, :, 1] < probs
    levels = np.clip(_levels(policy.level_std, base, uniforms), 0.0, policy.level_max)
    signs = np.where(uniforms[:, :, 4] < 0.5, -1.0, 1.0)
    kinds, args = np.zeros((B, L), np.int8), np.zeros((B, L))
    for name in {op.name for op in specs}:
        mask = applied & np.array([op.name == name for op in specs])[chosen]
        kinds[mask] = NAMES[name][0]
        args[mask] = argument(name, levels[mask], signs[mask], uniforms[:, :, 5][mask], policy.translate * img_size)
    drawn = np.where(uniforms[:, :, 6] < 0.5, BILINEAR, BICUBIC)
    return ImageOps(kinds, args, (drawn if kernel is None else np.full((B, L), kernel)).astype(np.int8))


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
    """One after the other; None without any."""
    if not parts:
        return None
    return ImageOps(*(np.concatenate([getattr(p, n) for p in parts], axis=1) for n in ("kinds", "args", "kernels")))


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


def _levels(std: float, base: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    if std == 0.0:
        return base
    if math.isinf(std):
        return base * uniforms[:, :, 2]
    radius = np.sqrt(-2.0 * np.log(uniforms[:, :, 2]))  # Box and Muller, 1958
    return base + std * radius * np.cos(2.0 * np.pi * uniforms[:, :, 3])


def argument(name: str, level: np.ndarray, sign: np.ndarray, u: np.ndarray, translate: float) -> np.ndarray:
    """float64, as `level`: an operation's argument at levels of 0-10, as timm's `*_level_to_arg` has it.

    `name`: a key of `NAMES`; `sign`: +-1, for operations with a direction; `u`: uniform in (0, 1), for those that draw
    more; `translate`: pixels that level 10 translates by.
    """
    x = level / LEVELS
    # `int()` there cuts off, and so does `np.trunc`.
    match NAMES[name][1].split():
        case ["none"]:
            return np.zeros_like(x)
        case ["signed", scale]:
            return sign * x * float(scale)
        case ["translate"]:
            return sign * x * translate
        case ["posterize"]:
            return np.trunc(x * 4)
        case ["posterize", "increasing"]:
            return 4 - np.trunc(x * 4)
        case ["posterize", "original"]:
            return 4 + np.trunc(x * 4)
        case ["solarize"]:
            return np.minimum(256, np.trunc(x * 256))
        case ["solarize", "increasing"]:
            return 256 - np.minimum(256, np.trunc(x * 256))
        case ["solarize", "add"]:
            return np.minimum(128, np.trunc(x * 110))
        case ["enhance"]:
            return x * 1.8 + 0.1
        case ["enhance", "increasing"]:
            return np.maximum(0.1, 1.0 + sign * x * 0.9)
        case ["desaturate"]:
            return np.clip(1.0 - np.clip(0.5 + 0.5 * x, 0.5, 1.0), 0.0, 1.0)
        case ["blur"]:
            return np.clip(0.1 + 1.9 * x, 0.1, 2.0)
        case ["blur", "random"]:
            return 0.1 + (2.0 * np.clip(x, 0.0, 1.0) - 0.1) * u
    raise AssertionError(name)


@njit(cache=True)
def uniform_table(key, epoch, ids, stream, blocks):
    """float64 (B, 4 * blocks) strictly inside (0, 1): the draws 0..blocks-1 of each sample id."""
    table = np.empty((len(ids), 4 * blocks))
    for n in range(len(ids)):
        for draw in range(blocks):
            w0, w1, w2, w3 = philox(key, draw, ids[n], epoch, stream)
            table[n, 4 * draw] = to_unit(w0)
            table[n, 4 * draw + 1] = to_unit(w1)
            table[n, 4 * draw + 2] = to_unit(w2)
            table[n, 4 * draw + 3] = to_unit(w3)
    return table
