"""What happened in a run, in sentences: each computed, with the numbers that it rests on.

Changes of the spectra come first, the greatest one before the others; then what became of the training. Shape legend: B
matrices of one type, by depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowrank_vit.report.read import Run, series
from lowrank_vit.report.style import moment
from lowrank_vit.report.switching.read import Switching, in_words
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.select import module_type

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
        of = f"{len(broken)} of {len(modules)} matrices, {broken[0]} first"
        found.append(Finding(f"Weights are not finite {moment(run, updates_T[-1])}: {of}.", math.inf, "not finite"))
    if len(updates_T) < 2:
        return found
    # The stable rank moves by the square of what sigma_1 moves by.
    measures = (("σ₁", _sigma_max, 1.0), ("stable rank", stable_rank, 0.5), ("effective rank", effective_rank, 1.0))
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
    where = _blocks(names[at : at + window])
    of_them = np.exp(there)
    between = f"update {updates_T[0]:,} to {updates_T[-1]:,}"
    rests = f"mean of {len(names)} {'matrices' if len(names) > 1 else 'matrix'}: {before:.3g} → {after:.3g}, {between}"
    if is_local and abs(overall) < _LEAST:
        text = f"{label} of {kind} {_grew(of_them)} in {where}, and hardly elsewhere ({rests})."
    elif is_local:
        text = f"{label} of {kind} {_grew(after / before)}, most in {where} ({_times(of_them)}; {rests})."
    else:
        text = f"{label} of {kind} {_grew(after / before)}, in all blocks alike ({rests})."
        text = text.replace(", in all blocks alike", "") if len(names) < 2 else text
    return Finding(text, weight, kind)


def _of_switches(switching: Switching) -> list[Finding]:
    """That layers were put in factors, which outweighs what it does to their spectra."""
    done = [one for one in switching.switches if not one.is_dry]
    if not done:
        return []
    count, lines = len(switching.ranks_after(len(switching.switches))), in_words(switching)
    text = f"{count} of {len(switching.layers)} layers were put in factors; the last time at {lines[-1]}."
    return [Finding(text, _SWITCHED, "switches")]


def _grew(ratio: float) -> str:
    return f"grew {ratio:.2g} times" if ratio >= 1 else f"fell to {100 * ratio:.2g} %"


def _times(ratio: float) -> str:
    return f"× {ratio:.2g} there"


def _blocks(names: list[str]) -> str:
    """Such as "blocks 9-11"; the names themselves where they have no numbers."""
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    if all(len(one) == 1 for one in numbers):
        ends = numbers[0][0], numbers[-1][0]
        return f"block {ends[0]}" if ends[0] == ends[1] else f"blocks {ends[0]}-{ends[1]}"
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _of_training(run: Run) -> list[Finding]:
    found: list[Finding] = []
    losses, updates = run.train.get("loss", np.empty(0)), run.train.get("update", np.empty(0))
    if losses.size and not np.isfinite(losses[-1]):
        finite = np.flatnonzero(np.isfinite(losses))
        since = (
            f"the last finite one, {losses[finite[-1]]:.3g}, is of update {updates[finite[-1]]:,.0f}"
            if finite.size
            else "none was"
        )
        found.append(Finding(f"The training loss is not finite: {since}.", math.inf, "loss"))
    top1, epochs = run.epochs.get("eval_top1", np.empty(0)), run.epochs.get("epoch", np.empty(0))
    known = np.flatnonzero(np.isfinite(top1))
    parts: list[str] = []
    if known.size:
        best = known[int(np.argmax(top1[known]))]
        when = f" after epoch {epochs[best] + 1:.0f}" if epochs.size == top1.size else ""
        parts.append(
            f"Top-1 went from {top1[known[0]]:.2f} % to {top1[known[-1]]:.2f} % (best: {top1[best]:.2f} %{when})"
        )
    there = np.flatnonzero(np.isfinite(losses))
    if there.size > 1:
        text = f"the training loss from {losses[there[0]]:.3g} to {losses[there[-1]]:.3g} nats"
        parts.append(text if parts else f"The training loss went{text.removeprefix('the training loss')}")
    waits = run.train.get("data_wait", run.epochs.get("data_wait", np.empty(0)))
    waits = waits[np.isfinite(waits)]
    if parts and waits.size:
        parts.append(f"{100 * float(np.median(waits)):.1f} % of the time was spent waiting for data (median)")
    if parts:
        found.append(Finding(", ".join(parts) + ".", 0.0, "training"))
    return found


def _sigma_max(s: np.ndarray) -> float:
    return float(s[0])
