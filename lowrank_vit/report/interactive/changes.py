"""How a metric of one type of matrices changed, in words; each statement holds for every block that it names.

Shape legend: N matrices of the type, in model order.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

from lowrank_vit.report.language import msg, tr
from lowrank_vit.spectral.select import module_depth

STILL = 0.05
"""A smaller relative change counts as none."""
_LEAST = math.log1p(STILL)
_APART = 1.3
"""The blocks with the greatest change are named separately if it is more than so many times the least."""


def change_in_words(
    names: list[str], first_N: np.ndarray, last_N: np.ndarray, *, is_all: bool = True
) -> tuple[str, float]:
    """Which blocks grew, fell or stayed, the greatest change first, and its weight.

    Args:
        names: the matrices.
        first_N: their values before, above 0.
        last_N: their values after, above 0.
        is_all: whether the type has no others.

    Returns:
        The words, which follow "σ₁ of attn.proj"; empty where no matrix changed. Factors and means are of the blocks
        named with them, to three digits. The weight is the mean absolute logarithm of the factor over the quarter of
        the matrices that changed most.
    """
    change_N = np.log(last_N / first_N)
    size_N = np.abs(change_N)
    weight = float(np.mean(np.sort(size_N)[-max(1, round(len(names) / 4)) :]))
    moved = [at for at in (np.flatnonzero(change_N >= _LEAST), np.flatnonzero(change_N <= -_LEAST)) if at.size]
    parts: list[str] = []
    for at in sorted(moved, key=lambda at: -float(np.mean(size_N[at]))):
        before, after = plain(float(np.mean(first_N[at]))), plain(float(np.mean(last_N[at])))
        means = f"{before} → {after}"
        means = tr("mean {means}", means=means) if at.size > 1 else means
        is_everywhere = is_all and at.size == len(names) > 2 and all(map(module_depth, names))
        where = tr("all {n} blocks", n=at.size) if is_everywhere else _blocks(names, at)
        has_grown = bool(change_N[at[0]] > 0)
        form = msg("grew {by} in {where} ({means})") if has_grown else msg("fell to {by} in {where} ({means})")
        if len(names) == 1 and is_all:
            form = msg("grew {by} ({means})") if has_grown else msg("fell to {by} ({means})")
        text = tr(form, by=_factors(change_N[at]), where=where, means=means)
        most = at[_standing_out(size_N[at])]
        if most.size:
            text += tr(", most in {where} ({by})", where=_blocks(names, most), by=_factors(change_N[most]))
        parts.append(text)
    still = np.flatnonzero(size_N < _LEAST)
    if parts and still.size:
        where = tr("the other {n}", n=still.size) if is_all and still.size > 1 else _blocks(names, still)
        parts.append(tr("changed by less than {n:.0f} % in {where}", n=100 * STILL, where=where))
    if len(parts) < 2:
        return "".join(parts), weight
    return tr("{some}, and {last}", some=tr(", ").join(parts[:-1]), last=parts[-1]), weight


def _standing_out(size_N: np.ndarray) -> np.ndarray:
    """Places of the matrices, at most half, that changed more than all others; empty where all changed alike."""
    half, most = len(size_N) // 2, float(size_N.max())
    if len(size_N) < 3 or most < _APART * float(size_N.min()) + _LEAST:
        return np.empty(0, int)
    falling = np.sort(size_N)[::-1]
    gaps = falling[:half] - falling[1 : half + 1]
    widest = int(np.argmax(gaps))
    is_group = gaps[widest] >= max(_LEAST, 0.3 * (most - float(size_N.min())))
    at = np.flatnonzero(size_N >= (falling[widest] if is_group else most - math.log(1.01)))
    return at if len(at) <= half else np.empty(0, int)


def _factors(change_N: np.ndarray) -> str:
    """Such as "3.1 times", "1.76-2.3 times", "37 %"."""
    has_grown = bool(change_N[0] > 0)
    ends = [plain((1 if has_grown else 100) * math.exp(one)) for one in (change_N.min(), change_N.max())]
    return tr(msg("{n} times") if has_grown else msg("{n} %"), n="-".join(dict.fromkeys(ends)))


def plain(value: float) -> str:
    """A number to three digits, never with an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{value:,.0f}" if rounded >= 1000 else np.format_float_positional(rounded, trim="-")


def _blocks(names: list[str], at: np.ndarray) -> str:
    return blocks_of([names[i] for i in at])


def blocks_of(names: list[str]) -> str:
    """Such as "blocks 0-2, 9-11"; the names themselves where they have no numbers."""
    depths = [module_depth(name) for name in names]
    if not all(depths) or len(set(depths)) < len(depths):
        return _listed(names)
    numbers = sorted(tuple(map(int, depth.split("."))) for depth in depths)
    runs: list[list[tuple[int, ...]]] = []
    for one in numbers:
        if runs and runs[-1][-1] == (*one[:-1], one[-1] - 1):
            runs[-1].append(one)
        else:
            runs.append([one])
    ends = [dict.fromkeys(".".join(map(str, one)) for one in (run[0], run[-1])) for run in runs]
    listed = _listed(["-".join(of) for of in ends])
    return tr("block {n}", n=listed) if len(names) == 1 else tr("blocks {n}", n=listed)


def _listed(texts: list[str]) -> str:
    return reduce(lambda some, more: tr("{some}, {more}", some=some, more=more), texts)
