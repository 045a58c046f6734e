"""Metrics and spectra of every matrix over the refreshes, as a page embeds them: bounded, with notes on omissions.

Shape legend: T refreshes, N matrices, K singular values of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank_vit.report.interactive.packing import Packer
from lowrank_vit.report.interactive.trust import Numbers, matrix_table
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run, series
from lowrank_vit.spectral.measures.metrics import above_rounding, effective_rank, power_law, stable_rank
from lowrank_vit.spectral.measures.noise import bulk_density, marchenko_pastur
from lowrank_vit.spectral.select import module_type

KINDS = {"spec": msg("model"), "spec_ema": "EMA"}
LABELS = {
    "sigma_max": (msg("σ₁"), msg("largest singular value")),
    "stable_rank": (msg("stable rank"), "Σ σ² / σ₁²"),
    "effective_rank": (msg("effective rank"), msg("exp(entropy of σ / Σ σ)")),
    "numerical_rank": (msg("numerical rank"), msg("count")),
    "nuclear_norm": (msg("nuclear norm"), "Σ σ"),
    "alpha": (msg("power law's exponent α"), ""),
    "alpha_sigma": (msg("standard error of α"), ""),
    "alpha_ks": (msg("KS distance of the power law"), "0-1"),
    "alpha_tail": (msg("values in the power law's tail"), msg("count")),
    "mp_outliers": (msg("values beyond the noise edge"), msg("count")),
    "mp_edge": (msg("noise edge"), msg("as a singular value")),
    "mp_ks": (msg("KS distance of the bulk to noise"), "0-1"),
    "block_cos_u_overlap": (msg("overlap with the refresh before, left vectors"), msg("0: chance, 1: the same")),
    "block_cos_v_overlap": (msg("overlap with the refresh before, right vectors"), msg("0: chance, 1: the same")),
    "block_cos0_u_overlap": (msg("overlap with the first refresh, left vectors"), msg("0: chance, 1: the same")),
    "block_cos0_v_overlap": (msg("overlap with the first refresh, right vectors"), msg("0: chance, 1: the same")),
    "block_ema_cos_u_overlap": (msg("overlap of model and EMA, left vectors"), msg("0: chance, 1: the same")),
    "block_ema_cos_v_overlap": (msg("overlap of model and EMA, right vectors"), msg("0: chance, 1: the same")),
    "block_energy": (msg("energy that the earlier block still holds"), "0-1"),
    "turn_bound": (msg("bound on the block's turn"), msg("sine, above 1: none")),
    "update_normF": (msg("‖W − W′‖ since the refresh before"), msg("Frobenius")),
    "rank90": (msg("directions of 90 % of ‖W‖²"), msg("count")),
    "rank95": (msg("directions of 95 % of ‖W‖²"), msg("count")),
    "rank99": (msg("directions of 99 % of ‖W‖²"), msg("count")),
    "delta_sv_rel": (msg("change of the top values, mean"), "Δσ / σ"),
}
"""Label of a metric in place of its name in the log, and its unit or definition."""
FIRST = ("sigma_max", "stable_rank", "effective_rank", "alpha", "mp_outliers", "block_cos0_u_overlap", "cos0_u_mean")
"""Columns of the table until the reader asks for all."""
SCALARS_AT_MOST, VALUES_AT_MOST = 420_000, 420_000
"""Most embedded numbers: of matrices over time, and of spectra."""
LEAST_TIMES = 6
INDICES = 48
"""Lines of a matrix's singular values: the first ones, then ever wider spaced ones."""
BINS = 48


def matrices(run: Run, pack: Packer, notes: list[str], share: float = 1.0) -> dict[str, Any] | None:
    """The data of the page's figures of matrices; None if the run has none.

    Args:
        run: the run.
        pack: packs the arrays.
        notes: gets lines about what is left out.
        share: reduces the bounds by this factor, for a page that became too large.
    """
    numbers = _numbers(run)
    if not numbers.names:
        return None
    kinds = {kind: tr(label) for kind, label in KINDS.items() if kind in numbers.values}
    count = sum(len(of) for of in numbers.values.values()) * len(numbers.names)
    at = _thinned(len(numbers.updates), max(LEAST_TIMES, int(share * SCALARS_AT_MOST / max(1, count))))
    if len(at) < len(numbers.updates):
        notes.append(
            tr(
                "The numbers of matrices on this page are from {n} of {all} refreshes, evenly spaced.",
                n=len(at),
                all=len(numbers.updates),
            )
        )
    if run.moment is None and run.scalars:
        text = msg(
            "This page holds {n} of the logged numbers of each matrix; other numbers, and means by type and by depth, "
            "are left out."
        )
        notes.append(tr(text, n=len({metric for of in numbers.values.values() for metric in of})))
    keys = sorted({metric for of in numbers.values.values() for metric in of}, key=_place)
    spectra, thinned = _spectra(run, numbers.names, pack, int(share * VALUES_AT_MOST))
    notes.extend(thinned)
    return {
        "names": numbers.names,
        "types": [module_type(name) for name in numbers.names],
        "kinds": list(kinds.items()),
        "updates": numbers.updates[at],
        "note": tr("Means are over the matrices of a type that have the number."),
        "metrics": [{"key": key, **_label(key), "chance": _chance(key), "group": _group(key)} for key in keys],
        "values": {kind: {metric: pack(of[:, at]) for metric, of in numbers.values[kind].items()} for kind in kinds},
        "spectra": spectra,
        "spectraNote": tr(
            "Up to {n} values of a matrix: the first ones, then ever wider spaced ones. σ₁ is violet, the last yellow.",
            n=INDICES,
        ),
        "bulk": _bulk(run, numbers.names, pack),
        "table": matrix_table(numbers, kinds, keys, {key: tr(name) for key, (name, _) in LABELS.items()}, FIRST, pack),
    }


def _numbers(run: Run) -> Numbers:
    """The logged numbers of each matrix; if nothing was logged, ranks and first values of the stored spectra."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    updates = run.scalars.get("update", np.empty(0)).astype(np.int64)
    for key, values_T in run.scalars.items():
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if kind in KINDS and name and not name.startswith(("type/", "depth/", "flow/")) and name != "refresh":
            found.setdefault(kind, {}).setdefault(metric, {})[name] = values_T
    if not found:
        measures: dict[str, Callable[[np.ndarray], float]] = {
            "sigma_max": lambda s: float(s[0]),
            "stable_rank": stable_rank,
            "effective_rank": effective_rank,
        }
        for kind in KINDS:
            updates_T, modules = series(run, kind)
            if modules:
                updates = updates_T if kind == "spec" or not updates.size else updates
                found[kind] = {
                    metric: {name: np.array([measure(s) for s in s_TK]) for name, s_TK in modules.items()}
                    for metric, measure in measures.items()
                }
    names = list(dict.fromkeys(name for of in found.values() for one in of.values() for name in one))
    times = len(updates)
    values = {
        kind: {
            metric: np.array([_of_length(one.get(name), times) for name in names]) for metric, one in metrics.items()
        }
        for kind, metrics in found.items()
    }
    return Numbers(names, updates, values, dict(run.shapes))


def _of_length(values: np.ndarray | None, times: int) -> np.ndarray:
    return values if values is not None and len(values) == times else np.full(times, np.nan)


def _label(metric: str) -> dict[str, str]:
    """The label and the unit of a metric; without a label its name in the log."""
    name, unit = LABELS.get(metric, (metric, ""))
    return {"label": tr(name), "unit": tr(unit) if unit else ""}


def _place(metric: str) -> tuple[int, str]:
    known = list(LABELS)
    return (known.index(metric) if metric in known else len(known), metric)


def _group(metric: str) -> str:
    words = metric.split("_")
    return "cosine" if {"cos", "cos0"} & set(words) or metric in ("block_energy", "turn_bound") else "number"


def _chance(metric: str) -> str | None:
    """The metric of a cosine's chance value; "0" where it is 0; None where there is none."""
    if metric.endswith("_overlap"):
        return "0"
    if _group(metric) == "cosine" and "cos" in metric:
        block, side = ("block_" if metric.startswith("block_") else ""), metric.rpartition("_cos")[2].split("_")[1:]
        return f"{block}chance_{'_'.join(side)}"
    if metric.startswith(("dw_top", "opt_top")):
        return metric.replace("_top", "_chance")
    return None


def _thinned(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` places, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.empty(0, int)


def _spectra(run: Run, names: list[str], pack: Packer, most: int) -> tuple[dict[str, Any], list[str]]:
    """By kind: the updates, and by place of the matrix in `names` the indices held and their values (T, indices)."""
    found = {kind: series(run, kind, whole=False) for kind in KINDS}
    found = {kind: one for kind, one in found.items() if one[1]}
    matrices_ = sum(len(modules) for _, modules in found.values())
    indices = min(INDICES, max(8, most // max(1, matrices_ * LEAST_TIMES)))
    times = max(LEAST_TIMES, most // max(1, matrices_ * indices))
    notes: list[str] = []
    is_thinned = False
    content: dict[str, Any] = {}
    places = {name: place for place, name in enumerate(names)}
    for kind, (updates_T, modules) in found.items():
        whole = set(series(run, kind)[0].tolist())
        at = _thinned(len(updates_T), times)
        ends = [i for i, update in enumerate(updates_T) if update in whole]
        at = np.union1d(at, np.array([*ends[:1], *ends[-1:]], int))  # the spectra of the start and of now are whole
        if len(at) < len(updates_T):
            notes.append(
                tr(
                    "The {kind} spectra on this page are from {n} of {all} refreshes, evenly spaced.",
                    kind=tr(KINDS[kind]),
                    n=len(at),
                    all=len(updates_T),
                )
            )
        held: dict[str, Any] = {}
        for name, s_TK in modules.items():
            if name in places:
                chosen = np.unique(np.geomspace(1, s_TK.shape[1], indices).round().astype(int))
                is_thinned |= len(chosen) < s_TK.shape[1]
                held[str(places[name])] = {"index": chosen, "values": pack(s_TK[np.ix_(at, chosen - 1)])}
        if held:
            content[kind] = {"updates": updates_T[at], "matrices": held}
    if is_thinned:
        text = msg("This page holds up to {n} singular values of each matrix: the first ones, then ever wider spaced.")
        notes.append(tr(text, n=indices))
    return content, notes


def _bulk(run: Run, names: list[str], pack: Packer) -> dict[str, Any]:
    """By matrix: histogram of the newest whole spectrum, the law's density, the edge, and both fits in words."""
    content: dict[str, Any] = {}
    for kind, label in KINDS.items():
        _, modules = series(run, kind)
        for name, s_TK in modules.items():
            own: np.ndarray = s_TK[-1]
            s = run.scaled[name] if kind == "spec" and name in run.scaled else own
            shape = run.shapes.get(name)
            if name not in names or shape is None or not np.isfinite(s).all() or not s.size or s[0] <= 0:
                continue
            one = _against_noise(s, own, shape, pack)
            one |= {"name": name, "label": name if kind == "spec" else f"{name}, {tr(label)}"}
            content[f"{kind}/{name}"] = one
    return content


def _against_noise(s: np.ndarray, own: np.ndarray, shape: tuple[int, int], pack: Packer) -> dict[str, Any]:
    above, of_above = above_rounding(s, shape)
    noise, fit = marchenko_pastur(above, of_above), power_law(above_rounding(own, shape)[0])
    has_edge = bool(np.isfinite(noise.edge))
    right = 1.04 * max(float(s[0]), noise.edge if has_edge else 0.0)
    bars, _ = np.histogram(s, bins=np.linspace(0, right, BINS + 1), density=True)
    one: dict[str, Any] = {"right": right, "counts": pack(bars), "edge": noise.edge}
    told: list[str] = []
    if has_edge:
        x = (np.arange(120) + 0.5) / 120 * right
        one["density"] = pack((above.size - noise.outliers) / s.size * bulk_density(x, of_above, noise.sigma))
        told.append(
            tr("{n:.0f} of {all} values lie beyond the edge {at:.4g}.", n=noise.outliers, all=s.size, at=noise.edge)
        )
        told.append(tr("The bulk's KS distance to the law is {n:.3f}.", n=noise.ks))
        if noise.ks > 0.05:
            told.append(tr("Above 0.05 the bulk is no noise: edge and outliers say little."))
    if np.isfinite(fit.alpha):
        text = msg("Power law of the tail: α = {alpha:.2f} ± {error:.2f}, KS distance {ks:.2f}.")
        told.append(tr(text, alpha=fit.alpha, error=fit.sigma, ks=fit.ks))
        if fit.ks > 0.1:
            told.append(tr("Above 0.1 the tail is no power law."))
    if above.size < s.size:
        told.append(tr("{n} values are rounding, and left out of both fits.", n=s.size - above.size))
    one["told"] = " ".join(told)
    return one
