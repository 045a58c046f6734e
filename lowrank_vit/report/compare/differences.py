"""The largest differences between groups of runs, in sentences, compared with the spread over seeds.

The spread of a number over seeds is its standard deviation within the groups, pooled over all with two runs or more. A
difference is proven where Student's t of it has p < 0.05 after Bonferroni's correction for all numbers and pairs of
groups that were looked at. Equal seeds, as counts of few values have by chance, give no spread: such a difference is
never proven. Large differences that are not proven are reported with what is missing.

Between groups of equal size Student's t hardly depends on the numbers' distribution. Between unequal ones it does: a
skewed count in the small group looks far from the spread of the large one. There the standard error is at least that of
the two groups' own spreads (Welch, Biometrika 34 (1947)), and the degrees of freedom are those of two groups of the
smaller size. So a single run proves no difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtr

from lowrank_vit.report.compare.curves import names_of
from lowrank_vit.report.compare.groups import Compared, Group
from lowrank_vit.report.compare.scores import BEST, scores_of, spread_of
from lowrank_vit.report.interactive.changes import blocks_of, plain
from lowrank_vit.report.interactive.matrices import KINDS
from lowrank_vit.report.language import language, msg, tr
from lowrank_vit.report.style import by_type

COUNT, LEVEL = 3, 0.05
"""Sentences on proven differences, as many on others, and the p-value below which a difference is proven."""
FAR = 3.0
"""Standard deviations over seeds from which a difference is worth a sentence even if it is not proven."""
SCORES = "scores"
_MOST_RUNS = 20
"""More runs per group are not suggested."""
_LEAST = math.log(1.01)
"""A smaller weight, less than 1 %, is not worth a sentence."""
_SAME = 1e-9
"""Seeds are equal up to rounding if their standard deviation is at most this share of their numbers."""
_LOCAL = 0.5
"""Blocks are named if their difference is above this share of the largest."""


@dataclass(frozen=True)
class Measure:
    """One number of every run."""

    label: str
    subject: str
    """Type of the matrices, or `SCORES`; each has at most one sentence."""
    values: list[float]
    """By run; NaN where a run has none."""
    weigh: Callable[[float], float]
    """The scale on which differences of measures are compared: mostly the logarithm, so that factors count."""
    text: Callable[[float], str]
    of_matrices: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By matrix: its number in every run; `values` are the means of these."""
    is_factor: bool = True
    """Whether a difference is given as a factor."""
    rank: int = 0
    """The place of a score among the scores; only the first one gets a sentence."""


@dataclass(frozen=True)
class Difference:
    """The difference of a measure between two groups."""

    measure: Measure
    high: int
    low: int
    """Places of the groups."""
    weight: float
    spread: float
    """Standard deviation over seeds; 0 where they are equal, NaN where no group has two runs with the number."""
    apart: float
    """Distance of the means, 0 or more."""
    freedom: int
    """Degrees of freedom of the spread: runs minus groups, of those that have the number."""
    runs: tuple[int, int]
    """Runs of both groups that have the number."""
    p: float
    """Two-sided p of Student's t, not corrected; NaN where the spread is not known, or a group has a single run."""

    @property
    def deviations(self) -> float:
        """The difference in standard deviations over seeds; NaN where these are not known."""
        return self.apart / self.spread if self.spread > 0 else math.nan


def differences(measures: Sequence[Measure], groups: Sequence[Sequence[int]]) -> list[Difference]:
    """The difference of every measure between every two groups, the weightiest first. `groups`: the runs' places."""
    found: list[Difference] = []
    for measure in measures:
        values = [[value for i in of if math.isfinite(value := measure.values[i])] for of in groups]
        freedom = sum(len(of) - 1 for of in values if of)
        squares = sum(float(np.var(of)) * len(of) for of in values if of)
        spread = math.sqrt(squares / freedom) if freedom else math.nan
        if spread <= _SAME * max((abs(value) for of in values for value in of), default=0.0):
            spread = 0.0
        for a, b in itertools.combinations(range(len(groups)), 2):
            if not values[a] or not values[b]:
                continue
            means = float(np.mean(values[a])), float(np.mean(values[b]))
            high, low = (a, b) if means[0] >= means[1] else (b, a)
            apart = abs(means[0] - means[1])
            weight = abs(measure.weigh(means[0]) - measure.weigh(means[1]))
            if not math.isfinite(weight):
                continue
            runs = len(values[a]), len(values[b])
            p = _p_value(values[a], values[b], apart, spread, freedom)
            found.append(Difference(measure, high, low, weight, spread, apart, freedom, runs, p))
    return sorted(found, key=lambda one: -one.weight)


def _p_value(a: Sequence[float], b: Sequence[float], apart: float, spread: float, freedom: int) -> float:
    """Two-sided p of Student's t; between groups of unequal size see the module's docstring."""
    least = min(len(a), len(b))
    if least < 2 or not spread > 0:
        return math.nan
    own = math.sqrt(sum(float(np.var(of, ddof=1)) / len(of) for of in (a, b)))
    error = max(spread * math.sqrt(1 / len(a) + 1 / len(b)), own)
    return 2 * float(stdtr(freedom if len(a) == len(b) else min(freedom, 2 * (least - 1)), -apart / error))


def sentences(compared: Compared) -> list[str]:
    """The proven differences, the largest first, their number, and large ones that are not proven; `COUNT` each."""
    groups = [group.at for group in compared.groups]
    if len(groups) < 2:
        return [_of_one_group(compared)]
    found = differences(measures(compared), groups)
    if not found:
        return [tr("The runs have no number in common that could be compared.")]
    if found[0].weight <= _LEAST:
        return [tr("No compared number differs by more than 1 % between the runs.")]
    # Comparisons that cannot be proven were looked at too: without them the others' correction would be too small.
    count = sum(one.freedom > 0 for one in found)
    if not count:
        return [_begun(_sentence(compared, one, 0)) for one in _by_subject(found)]
    proven = [one for one in found if one.p * count < LEVEL]
    told = _by_subject(proven)
    heaviest = {one.measure.subject: one.weight for one in reversed(proven)}
    others = [one for one in found if one not in proven and one.weight > heaviest.get(one.measure.subject, 0.0)]
    large = _by_subject([one for one in others if not one.deviations < FAR])
    numbers = tr(
        "Proven differences (beyond the spread over seeds, p < {level} after Bonferroni's correction): {k} of {n}.",
        level=LEVEL,
        k=len(proven),
        n=count,
    )
    said = [_begun(_sentence(compared, one, count)) for one in told]
    unproven = [tr("Not proven: {sentence}", sentence=_sentence(compared, one, count)) for one in large]
    if not proven and not large:
        unproven = [tr("The largest one: {sentence}", sentence=_sentence(compared, found[0], count))]
    return [*said, numbers, *unproven]


def _by_subject(found: Sequence[Difference]) -> list[Difference]:
    """The weightiest difference of each subject, for scores the first score (top-1); without negligible ones.

    A score is included however many matrices have larger differences.
    """
    chosen: dict[str, Difference] = {}
    for one in found:
        if one.weight > _LEAST and one.measure.subject != SCORES:
            chosen.setdefault(one.measure.subject, one)
    scores = [one for one in found if one.weight > _LEAST and one.measure.subject == SCORES]
    best = min(scores, key=lambda one: one.measure.rank, default=None)
    of_matrices = list(chosen.values())[: COUNT - (best is not None)]
    return sorted([*of_matrices, *([best] if best else [])], key=lambda one: -one.weight)


def _of_one_group(compared: Compared) -> str:
    scores = scores_of([run.epochs for run in compared.runs])
    known = next((one for one in scores if one.when == BEST), None)
    alone = tr("The runs differ in their seeds alone, so no difference between them is claimed.")
    if known is None:
        return alone
    best = tr("best {score}", score=tr(known.label))
    spread = tr("{spread} (n = {n})", spread=known.spread(), n=len(compared.runs))
    return f"{alone} {tr('{score}: {spread}.', score=_begun(best), spread=spread)}"


def _held(one: Difference, count: int) -> str:
    """The difference in terms of the spread over seeds, and what is missing if that does not prove it."""
    if not one.freedom:
        if not count:
            return tr("one run each, so the spread over seeds is not known")
        return tr("no group has two runs with this number, so its spread over seeds is not known: add seeds")
    if not one.spread:
        return tr("its seeds have equal values, so their spread is not known: add seeds")
    far = one.deviations
    words: dict[str, Any] = {"d": f"{far:,.0f}" if far >= 10 else f"{far:.2g}", "n": count}
    if math.isnan(one.p):
        held = tr("{d} standard deviations over seeds, but a single run proves no difference", **words)
    else:
        p = min(1.0, one.p * count)
        words["p"] = f"p = {p:.1g}" if p >= 1e-6 else "p < 10⁻⁶"
        held = tr("{d} standard deviations over seeds, {p} after correction (× {n})", **words)
        if p < LEVEL:
            return held
    if far < FAR:
        return held
    if runs := _runs_to_prove(one, count):
        return held + tr("; {runs} runs of each group would prove it if difference and spread stay", runs=runs)
    return held + tr("; not even {runs} runs of each group would prove it", runs=_MOST_RUNS)


def _runs_to_prove(one: Difference, count: int) -> int:
    """How many runs of each group would prove the same difference with the same spread; 0: more than `_MOST_RUNS`."""
    fewest = max(one.runs) + (one.runs[0] == one.runs[1])
    for runs in range(max(2, fewest), _MOST_RUNS + 1):
        t = one.apart / (one.spread * math.sqrt(2 / runs))
        if 2 * float(stdtr(2 * (runs - 1), -t)) * count < LEVEL:
            return runs
    return 0


def _sentence(compared: Compared, one: Difference, count: int) -> str:
    """What differs, where and by how much. `count`: the number of comparisons, 0 where no spread is known."""
    measure, groups = one.measure, (compared.groups[one.high], compared.groups[one.low])
    values = [[v for i in group.at if math.isfinite(v := measure.values[i])] for group in groups]
    means = [float(np.mean(of)) for of in values]
    ratio = means[0] / means[1] if measure.is_factor and means[1] > 0 else math.nan
    told = [tr("{spread} (n = {n})", spread=spread_of(of, measure.text), n=len(of)) for of in values]
    words = {"label": measure.label, "high": _short(groups[0].name), "low": _short(groups[1].name)}
    words |= {"where": _where(one, groups), "a": told[0], "b": told[1], "held": _held(one, count)}
    if ratio >= 1.1:
        text = msg("{label} is {by} times as large in {high} as in {low}{where}: {a} against {b}; {held}.")
        return tr(text, by=f"{ratio:.2g}" if ratio < 99 else plain(ratio), **words)
    if math.isfinite(ratio):
        text = msg("{label} is {by} % larger in {high} than in {low}{where}: {a} against {b}; {held}.")
        return tr(text, by=f"{100 * (ratio - 1):.2g}", **words)
    text = msg("{label} is {by} higher in {high} than in {low}{where}: {a} against {b}; {held}.")
    return tr(text, by=measure.text(means[0] - means[1]), **words)


def _where(one: Difference, groups: tuple[Group, Group]) -> str:
    """The blocks of a type, at most half, whose difference is more than twice that of every other block."""
    found: dict[str, float] = {}
    for name, values in one.measure.of_matrices.items():
        high, low = ([v for i in group.at if math.isfinite(v := values[i])] for group in groups)
        if high and low:
            found[name] = one.measure.weigh(float(np.mean(high))) - one.measure.weigh(float(np.mean(low)))
    if not found or not all(map(math.isfinite, found.values())):
        return ""
    names, most = list(found), max(found.values())
    chosen = [at for at, name in enumerate(names) if found[name] > _LOCAL * most]
    rest = max((abs(found[name]) for at, name in enumerate(names) if at not in chosen), default=math.inf)
    if most <= _LEAST or 2 * len(chosen) > len(names) or rest > _LOCAL * min(found[names[at]] for at in chosen):
        return ""
    return tr(", most in {blocks}", blocks=blocks_of([names[at] for at in chosen]))


def measures(compared: Compared) -> list[Measure]:
    """The numbers to compare: best scores, and means by type at the last common moment."""
    scores = scores_of([run.epochs for run in compared.runs])
    found: list[Measure] = []
    for one in scores:
        if one.when == BEST:
            label, weigh = tr("best {score}", score=tr(one.label)), _of_percent if "%" in one.label else _log
            found.append(Measure(label, SCORES, one.values, weigh, one.text, is_factor=False, rank=len(found)))
    for kind, weights in KINDS.items():
        for subject, members in by_type(names_of(compared, kind)).items():
            label = subject if kind == "spec" else tr(", ").join([subject, tr(weights)])
            for metric, (name, weigh) in _NUMBERS.items():
                of_runs = [numbers.at_end(kind, metric) for numbers in compared.numbers]
                of = {one: [found_.get(one, math.nan) for found_ in of_runs] for one in members}
                means = [_mean([values[i] for values in of.values()]) for i in range(len(compared.runs))]
                text = tr("{number} of {type}", number=tr(name), type=label)
                found.append(Measure(text, subject, means, weigh, _four, of, metric not in _NO_FACTOR))
    return [one for one in found if any(map(math.isfinite, one.values))]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _of_percent(value: float) -> float:
    """The logarithm of the remaining error in percent, at least 0.01."""
    return math.log(max(100 - value, 0.01))


_NUMBERS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "sigma_max": (msg("σ₁"), _log),
    # The stable rank changes by the square of the factor of sigma_1.
    "stable_rank": (msg("stable rank"), lambda value: 0.5 * _log(value)),
    "effective_rank": (msg("effective rank"), _log),
    "alpha": (msg("power-law exponent α"), _log),
    "mp_outliers": (msg("count of values beyond the noise edge"), lambda value: 0.5 * math.log1p(max(value, 0.0))),
    "block_cos0_u_overlap": (msg("overlap of left vectors with the start"), float),
}
"""Metric to its name in a sentence, and the scale of its differences."""
_NO_FACTOR = ("mp_outliers", "block_cos0_u_overlap")


def _four(value: float) -> str:
    return f"{value:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"


def _begun(text: str) -> str:
    """With a capital letter, except Greek ones; a Chinese sentence may begin with a name, which stays as it is."""
    return text[0].upper() + text[1:] if text[0].isascii() and language() == "en" else text
