"""What happened in a run, in sentences: each computed, with the numbers that it rests on.

Changes of the spectra come first, the greatest one before the others; then what became of the training. Shape legend: B
matrices of one type, by depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run, series
from lowrank_vit.report.style import moment
from lowrank_vit.report.switching.read import Switching, in_words
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.select import module_depth, module_type

COUNT = 3
_LEAST = math.log(1.05)
"""A smaller change than by a twentieth is no news."""
_LOCAL = 1.3
"""Blocks are named whose change is so many times that of the whole type."""


_SWITCHED = 100.0


@dataclass(frozen=True)
class Finding:
    """A sentence, and how much it weighs against others: the logarithm of a factor."""

    text: str
    weight: float
    about: str
    """Type of the matrices, or another subject."""


def sentences(run: Run, switching: Switching | None = None) -> list[str]:
    """At most three, the weightiest first; fewer where the run has too little to tell."""
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
    # The stable rank moves by the square of what sigma_1 moves by.
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
                names_there = [name for name, there in zip(names, usable, strict=True) if there]
                one = _change(kind, label, names_there, first[usable], last[usable], updates_T, scale)
                found.extend([one] if one else [])
    return found


def _change(
    kind: str,
    label: str,
    names: list[str],
    first_B: np.ndarray,
    last_B: np.ndarray,
    updates_T: np.ndarray,
    scale: float,
) -> Finding | None:
    change_B = np.log(last_B / first_B)
    overall = float(np.median(change_B))
    window = max(1, round(len(names) / 4))
    means = np.convolve(change_B, np.ones(window) / window, "valid")
    at = int(np.argmax(np.abs(means)))
    there = float(means[at])
    weight = scale * max(abs(float(np.mean(change_B))), abs(there))
    if weight < _LEAST * scale:
        return None
    before, after = float(np.mean(first_B)), float(np.mean(last_B))
    is_local = abs(there) > _LOCAL * abs(overall) + _LEAST and len(names) > window
    where = blocks_of(names[at : at + window])
    of_them = float(np.exp(there))
    numbers = {"n": len(names), "before": before, "after": after, "begin": int(updates_T[0]), "end": int(updates_T[-1])}
    rests = msg("mean of {n} matrices: {before:.3g} → {after:.3g}, update {begin:,} to {end:,}")
    if len(names) < 2:
        rests = msg("mean of {n} matrix: {before:.3g} → {after:.3g}, update {begin:,} to {end:,}")
    told = {"what": label, "kind": kind, "where": where, "rests": tr(rests, **numbers)}
    if is_local and abs(overall) < _LEAST:
        form = msg("{what} of {kind} {grew} in {where}, and hardly elsewhere ({rests}).")
        text = tr(form, grew=_grew(of_them), **told)
    elif is_local:
        form = msg("{what} of {kind} {grew}, most in {where} (× {times:.2g} there; {rests}).")
        text = tr(form, grew=_grew(after / before), times=of_them, **told)
    else:
        form = msg("{what} of {kind} {grew}, in all blocks alike ({rests}).")
        form = msg("{what} of {kind} {grew} ({rests}).") if len(names) < 2 else form
        text = tr(form, grew=_grew(after / before), **told)
    return Finding(text, weight, kind)


def _of_switches(switching: Switching) -> list[Finding]:
    """That layers were put in factors, which outweighs what it does to their spectra."""
    done = [one for one in switching.switches if not one.is_dry]
    if not done:
        return []
    count, lines = len(switching.ranks_after(len(switching.switches))), in_words(switching)
    text = tr("{n} of {all} layers were put in factors; the last time at {when}.", n=count,
              all=len(switching.layers), when=lines[-1])  # fmt: skip
    return [Finding(text, _SWITCHED, "switches")]


def _grew(ratio: float) -> str:
    return tr("grew {n:.2g} times", n=ratio) if ratio >= 1 else tr("fell to {n:.2g} %", n=100 * ratio)


def blocks_of(names: list[str]) -> str:
    """Such as "blocks 9-11"; the names themselves where they have no numbers."""
    numbers = [module_depth(name) for name in names]
    if all(one.isdecimal() for one in numbers):
        ends = numbers[0], numbers[-1]
        if ends[0] == ends[1]:
            return tr("block {n}", n=ends[0])
        return tr("blocks {first}-{last}", first=ends[0], last=ends[1])
    return names[0] if len(names) == 1 else tr("{first} to {last}", first=names[0], last=names[-1])


def _of_training(run: Run) -> list[Finding]:
    found: list[Finding] = []
    losses, updates = run.train.get("loss", np.empty(0)), run.train.get("update", np.empty(0))
    if losses.size and not np.isfinite(losses[-1]):
        finite = np.flatnonzero(np.isfinite(losses))
        text = tr("The training loss is not finite: none was.")
        if finite.size:
            form = msg("The training loss is not finite: the last finite one, {loss:.3g}, is of update {n:,.0f}.")
            text = tr(form, loss=losses[finite[-1]], n=updates[finite[-1]])
        found.append(Finding(text, math.inf, "loss"))
    top1, epochs = run.epochs.get("eval_top1", np.empty(0)), run.epochs.get("epoch", np.empty(0))
    known = np.flatnonzero(np.isfinite(top1))
    parts: list[str] = []
    if known.size:
        best = known[int(np.argmax(top1[known]))]
        form = msg("Top-1 went from {first:.2f} % to {last:.2f} % (best: {best:.2f} %)")
        if has_epochs := epochs.size == top1.size:
            form = msg("Top-1 went from {first:.2f} % to {last:.2f} % (best: {best:.2f} % after epoch {epoch:.0f})")
        of = {"first": top1[known[0]], "last": top1[known[-1]], "best": top1[best]}
        parts.append(tr(form, epoch=epochs[best] + 1 if has_epochs else 0, **of))
    there = np.flatnonzero(np.isfinite(losses))
    if there.size > 1:
        form = msg("the training loss from {first:.3g} to {last:.3g} nats")
        form = form if parts else msg("The training loss went from {first:.3g} to {last:.3g} nats")
        parts.append(tr(form, first=losses[there[0]], last=losses[there[-1]]))
    waits = run.train.get("data_wait", run.epochs.get("data_wait", np.empty(0)))
    waits = waits[np.isfinite(waits)]
    if parts and waits.size:
        share = 100 * float(np.median(waits))
        parts.append(tr("{n:.1f} % of the time was spent waiting for data (median)", n=share))
    if parts:
        found.append(Finding(tr(", ").join(parts) + tr("."), 0.0, "training"))
    return found


def _sigma_max(s: np.ndarray) -> float:
    return float(s[0])
