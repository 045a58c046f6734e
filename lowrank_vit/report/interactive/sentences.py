"""What happened in a run, in computed sentences with the numbers behind them.

Changes of the spectra come first, the greatest before the others; then the result of the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowrank_vit.report.interactive.changes import STILL, change_in_words
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run, series
from lowrank_vit.report.style import moment
from lowrank_vit.report.switching.read import Switching, in_words
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.select import module_type

COUNT = 3
_LEAST = math.log1p(STILL)
"""A smaller weight is not worth a sentence."""
_SWITCHED = 100.0


@dataclass(frozen=True)
class Finding:
    """A sentence and its weight, which is the logarithm of a factor."""

    text: str
    weight: float
    about: str
    """Type of the matrices, or another subject."""


def sentences(run: Run, switching: Switching | None = None) -> list[str]:
    """At most three sentences, the weightiest first; fewer if the run has too little to tell."""
    spectral = sorted([*_of_spectra(run), *(_of_switches(switching) if switching else ())], key=lambda one: -one.weight)
    training = _of_training(run)
    urgent = [one for one in training if one.weight == math.inf]
    chosen: list[Finding] = urgent[:1]
    room = COUNT - (1 if training and not urgent else 0)
    for one in spectral:
        if len(chosen) < room and one.about not in [other.about for other in chosen]:
            chosen.append(one)
    for one in [*training, *spectral]:  # whatever is left
        if len(chosen) < COUNT and one not in chosen:
            chosen.append(one)
    return [one.text for one in chosen]


def _of_spectra(run: Run) -> list[Finding]:
    updates_T, modules = series(run, "spec")
    if not modules:
        return []
    types: dict[str, list[str]] = {}
    for name in modules:
        types.setdefault(module_type(name), []).append(name)
    found: list[Finding] = []
    broken = [name for name, s_TK in modules.items() if not np.isfinite(s_TK[-1]).all()]
    if broken:
        text = tr("Weights are not finite {when}: {n} of {all} matrices, {first} first.", n=len(broken),
                  all=len(modules), first=broken[0], when=moment(run, updates_T[-1]))  # fmt: skip
        found.append(Finding(text, math.inf, "not finite"))
    if len(updates_T) < 2:
        return found
    # The stable rank changes by the square of the factor of sigma_1.
    measures = (
        ("σ₁", _sigma_max, 1.0),
        (tr("stable rank"), stable_rank, 0.5),
        (tr("effective rank"), effective_rank, 1.0),
    )
    for kind, names in types.items():
        for label, measure, scale in measures:
            first, last = (np.array([measure(modules[name][t]) for name in names]) for t in (0, -1))
            usable = np.isfinite(first) & np.isfinite(last) & (first > 0) & (last > 0)
            if usable.any():
                there = [name for name, is_there in zip(names, usable, strict=True) if is_there]
                said, weight = change_in_words(there, first[usable], last[usable], is_all=bool(usable.all()))
                if said and weight >= _LEAST:
                    form = msg("{what} of {kind} {said}, from update {begin:,} to {end:,}.")
                    ends = {"begin": int(updates_T[0]), "end": int(updates_T[-1])}
                    found.append(Finding(tr(form, what=label, kind=kind, said=said, **ends), scale * weight, kind))
    return found


def _of_switches(switching: Switching) -> list[Finding]:
    """The sentence that layers were factorised, which outweighs the change of their spectra."""
    done = [one for one in switching.switches if not one.is_dry]
    if not done:
        return []
    count, lines = len(switching.ranks_after(len(switching.switches))), in_words(switching)
    text = tr("{n} of {all} layers were factorised; the last time at {when}.", n=count,
              all=len(switching.layers), when=lines[-1])  # fmt: skip
    return [Finding(text, _SWITCHED, "switches")]


def _of_training(run: Run) -> list[Finding]:
    found: list[Finding] = []
    losses, updates = run.train.get("loss", np.empty(0)), run.train.get("update", np.empty(0))
    if losses.size and not np.isfinite(losses[-1]):
        finite = np.flatnonzero(np.isfinite(losses))
        text = tr("The training loss was never finite.")
        if finite.size:
            form = msg("The training loss is not finite; the last finite one is {loss:.3g} at update {n:,.0f}.")
            text = tr(form, loss=losses[finite[-1]], n=updates[finite[-1]])
        found.append(Finding(text, math.inf, "loss"))
    parts = _of_accuracy(run)
    there = np.flatnonzero(np.isfinite(losses))
    if there.size > 1:
        form = msg("the training loss went from {first:.3g} to {last:.3g} nats")
        form = form if parts else msg("The training loss went from {first:.3g} to {last:.3g} nats")
        parts.append(tr(form, first=losses[there[0]], last=losses[there[-1]]))
    waits = run.train.get("data_wait", run.epochs.get("data_wait", np.empty(0)))
    waits = waits[np.isfinite(waits)]
    if parts and waits.size:
        share = 100 * float(np.median(waits))
        parts.append(tr("{n:.1f} % of the time was spent waiting for data (median)", n=share))
    if parts:
        found.append(Finding(tr("; ").join(parts) + tr("."), 0.0, "training"))
    return found


def _of_accuracy(run: Run) -> list[str]:
    """First, last and best top-1 of the model, and of its EMA if that was scored."""
    columns = {name: run.epochs.get(name, np.empty(0)) for name in ("eval_top1", "eval_ema_top1")}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    names = {"eval_top1": msg("Top-1 of the model"), "eval_ema_top1": msg("top-1 of the EMA")}
    if len(columns) == 1:
        names = {"eval_top1": msg("Top-1"), "eval_ema_top1": msg("Top-1 of the EMA")}
    epochs, parts = run.epochs.get("epoch", np.empty(0)), list[str]()
    for name, values in columns.items():
        known = np.flatnonzero(np.isfinite(values))
        best = known[int(np.argmax(values[known]))]
        form = msg("{what} went from {first:.2f} % to {last:.2f} % (best: {best:.2f} %)")
        if has_epochs := epochs.size == values.size:
            form = msg("{what} went from {first:.2f} % to {last:.2f} % (best: {best:.2f} % after epoch {epoch:.0f})")
        if best == known[-1]:
            form = msg("{what} went from {first:.2f} % to {last:.2f} %, its best")
        if known.size == 1:
            form = msg("{what} is {last:.2f} %, measured once")
        of = {"first": values[known[0]], "last": values[known[-1]], "best": values[best]}
        parts.append(tr(form, what=tr(names[name]), epoch=epochs[best] + 1 if has_epochs else 0, **of))
    return parts


def _sigma_max(s: np.ndarray) -> float:
    return float(s[0])
