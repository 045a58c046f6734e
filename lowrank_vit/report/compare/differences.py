"""The largest differences between groups of runs, in sentences, held against what seeds alone make of a number.

The spread of a number over seeds is its standard deviation within the groups, pooled over all that have two runs or
more. A difference is claimed where Student's t of it has p < 0.05 after Bonferroni's correction for all numbers and
pairs of groups that were looked at; without such a group nothing is known of the spread, and the sentence says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtr

from lowrank_vit.report.compare.curves import names_of
from lowrank_vit.report.compare.groups import Compared, Group
from lowrank_vit.report.compare.scores import BEST, scores_of, spread_of
from lowrank_vit.report.interactive.matrices import KINDS
from lowrank_vit.report.interactive.sentences import blocks_of
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.style import by_type

COUNT, LEVEL = 3, 0.05
_LEAST = math.log(1.01)
"""A smaller weight than of a hundredth is no news."""
_LOCAL = 1.3
"""Blocks are named whose difference weighs so many times that of the whole type."""


@dataclass(frozen=True)
class Measure:
    """One number of every run."""

    label: str
    subject: str
    """Type of the matrices, or "scores": of each there is one sentence at most."""
    values: list[float]
    """By run; NaN where a run has none."""
    weigh: Callable[[float], float]
    """On its scale differences of measures are held against one another: a factor's logarithm, mostly."""
    text: Callable[[float], str]
    of_matrices: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By name of a matrix: its number in every run, whose mean `values` are."""
    is_factor: bool = True
    """Whether a difference is told as a factor."""


@dataclass(frozen=True)
class Difference:
    """Of a measure between two groups."""

    measure: Measure
    high: int
    low: int
    """Places of the groups."""
    weight: float
    deviations: float
    """The difference in standard deviations over seeds; NaN where these are not known."""
    p: float
    """Of Student's t, not corrected; NaN where the spread is not known."""


def differences(measures: Sequence[Measure], groups: Sequence[Sequence[int]]) -> list[Difference]:
    """Every measure between every two groups, the weightiest first. `groups`: places of the runs of each."""
    found: list[Difference] = []
    for measure in measures:
        values = [[value for i in of if math.isfinite(value := measure.values[i])] for of in groups]
        freedom = sum(len(of) - 1 for of in values if of)
        squares = sum(float(np.var(of)) * len(of) for of in values if of)
        spread = math.sqrt(squares / freedom) if freedom else math.nan
        for a, b in itertools.combinations(range(len(groups)), 2):
            if not values[a] or not values[b]:
                continue
            means = float(np.mean(values[a])), float(np.mean(values[b]))
            high, low = (a, b) if means[0] >= means[1] else (b, a)
            apart = abs(means[0] - means[1])
            weight = abs(measure.weigh(means[0]) - measure.weigh(means[1]))
            if not math.isfinite(weight):
                continue
            error = spread * math.sqrt(1 / len(values[a]) + 1 / len(values[b]))
            p = math.nan if math.isnan(error) else _p(apart, error, freedom)
            deviations = apart / spread if spread else (math.nan if math.isnan(spread) else math.inf)
            found.append(Difference(measure, high, low, weight, deviations, p))
    return sorted(found, key=lambda one: -one.weight)


def _p(apart: float, error: float, freedom: int) -> float:
    """Of both tails; seeds that make no difference at all (a number without a spread) leave any difference certain."""
    if error <= 1e-12 * apart:
        return 0.0 if apart > 0 else 1.0
    return 2 * float(stdtr(freedom, -apart / error))


def sentences(compared: Compared) -> list[str]:
    """At most three, the largest difference first; what is not beyond the spread over seeds is not claimed."""
    groups = [group.at for group in compared.groups]
    if len(groups) < 2:
        return [_of_one_group(compared)]
    found = differences(measures(compared), groups)
    if not found:
        return [tr("The runs have no number in common that could be compared.")]
    known = [one for one in found if not math.isnan(one.p)]
    if not known and found[0].weight <= _LEAST:
        return [tr("No number that is compared differs by more than a hundredth between the runs.")]
    if not known:
        unsure = tr("one run each, so there is no spread over seeds to hold it against")
        return [_sentence(compared, one, unsure) for one in _by_subject(found)]
    sure = [one for one in known if one.p * len(known) < LEVEL]
    if not sure:
        nothing = tr(
            "No difference is claimed: of {n} comparisons none is beyond what seeds alone make of it "
            "(p < {level} after Bonferroni's correction).",
            n=len(known),
            level=LEVEL,
        )
        first = _sentence(compared, known[0], _held(known[0], len(known)))
        return [nothing, tr("The largest one: {sentence}", sentence=first)]
    told = [_sentence(compared, one, _held(one, len(known))) for one in _by_subject(sure)]
    of_all = tr(
        "Of {n} comparisons {k} are beyond what seeds alone make of them (p < {level} after Bonferroni's correction).",
        n=len(known),
        k=len(sure),
        level=LEVEL,
    )
    return [*told, of_all][:COUNT]


def _by_subject(found: Sequence[Difference]) -> list[Difference]:
    """The weightiest of each subject; those that weigh hardly anything are left out."""
    chosen: dict[str, Difference] = {}
    for one in found:
        if one.weight > _LEAST or not chosen:
            chosen.setdefault(one.measure.subject, one)
    return list(chosen.values())[:COUNT]


def _of_one_group(compared: Compared) -> str:
    scores = scores_of([run.epochs for run in compared.runs])
    known = next((one for one in scores if one.when == BEST), None)
    alone = tr("The runs differ in their seeds alone, so no difference between them is claimed.")
    if known is None:
        return alone
    best = tr("best {score}", score=tr(known.label))
    return f"{alone} {_begun(best)}: {known.spread()} (n = {len(compared.runs)})."


def _held(one: Difference, count: int) -> str:
    """What the difference is held against."""
    if math.isinf(one.deviations):
        return tr("under other seeds the number is the same")
    p, far = min(1.0, one.p * count), one.deviations
    return tr(
        "{d} standard deviations over seeds, {p} after correction for {n} comparisons",
        d=f"{far:,.0f}" if far >= 10 else f"{far:.2g}",
        p=f"p = {p:.1g}" if p >= 1e-6 else "p < 10⁻⁶",
        n=count,
    )


def _sentence(compared: Compared, one: Difference, held: str) -> str:
    measure, groups = one.measure, (compared.groups[one.high], compared.groups[one.low])
    values = [[v for i in group.at if math.isfinite(v := measure.values[i])] for group in groups]
    means = [float(np.mean(of)) for of in values]
    ratio = means[0] / means[1] if measure.is_factor and means[1] > 0 else math.nan
    told = [f"{spread_of(of, measure.text)} (n = {len(of)})" for of in values]
    words = {"label": measure.label, "high": _short(groups[0].name), "low": _short(groups[1].name)}
    words |= {"where": _where(one, groups), "a": told[0], "b": told[1], "held": held}
    if ratio >= 1.1:
        text = msg("{label} is {by} times as large in {high} as in {low}{where}: {a} against {b}; {held}.")
        return _begun(tr(text, by=f"{ratio:.2g}", **words))
    if math.isfinite(ratio):
        text = msg("{label} is {by} % larger in {high} than in {low}{where}: {a} against {b}; {held}.")
        return _begun(tr(text, by=f"{100 * (ratio - 1):.2g}", **words))
    text = msg("{label} is {by} higher in {high} than in {low}{where}: {a} against {b}; {held}.")
    return _begun(tr(text, by=measure.text(means[0] - means[1]), **words))


def _where(one: Difference, groups: tuple[Group, Group]) -> str:
    """Blocks in which a difference of a type is much larger than elsewhere."""
    found: dict[str, float] = {}
    for name, values in one.measure.of_matrices.items():
        high, low = ([v for i in group.at if math.isfinite(v := values[i])] for group in groups)
        if high and low:
            found[name] = one.measure.weigh(float(np.mean(high))) - one.measure.weigh(float(np.mean(low)))
    apart = np.array(list(found.values()))
    window = max(1, round(len(apart) / 4))
    if len(apart) <= window or not np.isfinite(apart).all():
        return ""
    means = np.convolve(apart, np.ones(window) / window, "valid")
    at = int(np.argmax(np.abs(means)))
    if abs(float(means[at])) <= _LOCAL * abs(float(np.median(apart))) + _LEAST:
        return ""
    return tr(", most in {blocks}", blocks=blocks_of(list(found)[at : at + window]))


def measures(compared: Compared) -> list[Measure]:
    """The numbers that runs are compared by: best scores, and means by type at the last common moment."""
    scores = scores_of([run.epochs for run in compared.runs])
    found: list[Measure] = []
    for one in scores:
        if one.when == BEST:
            label, weigh = tr("best {score}", score=tr(one.label)), _of_percent if "%" in one.label else _log
            found.append(Measure(label, "scores", one.values, weigh, one.text, is_factor=False))
    for kind, weights in KINDS.items():
        for subject, members in by_type(names_of(compared, kind)).items():
            label = subject if kind == "spec" else f"{subject}, {tr(weights)}"
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
    """The logarithm of the error that is left, at least a hundredth of a percent."""
    return math.log(max(100 - value, 0.01))


_NUMBERS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "sigma_max": (msg("σ₁"), _log),
    # The stable rank moves by the square of what sigma_1 moves by.
    "stable_rank": (msg("stable rank"), lambda value: 0.5 * _log(value)),
    "effective_rank": (msg("effective rank"), _log),
    "alpha": (msg("power-law exponent α"), _log),
    "mp_outliers": (msg("count of values beyond the noise edge"), lambda value: 0.5 * math.log1p(max(value, 0.0))),
    "block_cos0_u_overlap": (msg("overlap of left vectors with the start"), float),
}
"""Metric to its name in a sentence, and how differences of it weigh."""
_NO_FACTOR = ("mp_outliers", "block_cos0_u_overlap")


def _four(value: float) -> str:
    return f"{value:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"


def _begun(text: str) -> str:
    """With a capital letter, but for Greek ones."""
    return text[0].upper() + text[1:] if text[0].isascii() else text
