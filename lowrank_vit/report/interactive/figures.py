"""The figures of training, flows, circuits, vectors, low-rank switches and compressions.

A figure is a dictionary that `js/charts.js` draws: id, title, note, and `views`, name to a list of panels. With more
than one view the reader chooses. A panel has a title, labels `x` and `y`, and `series` or one `heat` map. A panel can
hold the series of several runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_vit.report.compression.read import Compression, rises
from lowrank_vit.report.events import Columns
from lowrank_vit.report.interactive.packing import Packer
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run
from lowrank_vit.report.spectra.motion import FLOW_PANELS, by_block, levels_of
from lowrank_vit.report.spectra.values import vector_pairs
from lowrank_vit.report.style import EMA, MODEL, MUTED, TRAIN, by_type, index_ticks
from lowrank_vit.report.switching.read import Switching, mean_over_time
from lowrank_vit.report.training_plot import is_covered
from lowrank_vit.spectral.measures.circuits import chance_stable_rank
from lowrank_vit.spectral.measures.metrics import stable_rank

POINTS = 3_000
"""Most points of a curve; longer ones keep evenly spaced points."""
SQUARES = 24
"""Most blocks whose maps of heads or vectors are embedded."""


_OF_REGULARISERS = (
    ("nuclear_norm", msg("Nuclear norm of the regularised matrices"), msg("Σ σ, sum of the matrices")),
    ("stable_rank", msg("Stable rank of the regularised matrices"), msg("Σ σ² / σ₁², mean of the matrices")),
    ("stable_rank_error", msg("Worst certificate of their σ₁"), msg("share of σ₁")),
    ("stable_rank_left_out", msg("Its gradients that could not be computed"), msg("count so far")),
    ("clipped_values", msg("Clipped singular values"), msg("count")),
)
"""Column of the train lines, title and unit: the progress of a penalty or a bound."""


def series_of(name: str, x: Any, y: np.ndarray, pack: Packer, **look: Any) -> dict[str, Any] | None:
    """A line; None without a finite value. `look`: color, look (a type) or shade (0-1), dash, width, mode, error."""
    y = np.asarray(y, np.float64)
    if not np.isfinite(y).any():
        return None
    x, at = np.asarray(x), np.unique(np.linspace(0, len(y) - 1, min(len(y), POINTS)).round().astype(int))
    return {"name": name, "x": x[at] if x.dtype.kind in "iuUO" else pack(x[at], exact=True), "y": pack(y[at]), **look}


def panel(title: str, x: str, y: str, series: Sequence[dict[str, Any] | None], **more: Any) -> dict[str, Any] | None:
    """A panel of the series that are not None; None without any."""
    there = [one for one in series if one]
    return {"title": title, "x": x, "y": y, "series": there, **more} if there else None


def figure(
    identity: str, title: str, note: str, views: Mapping[str, Sequence[Any]], **more: Any
) -> dict[str, Any] | None:
    """A figure of the views that have panels; None without any."""
    there = {name: [one for one in panels if one] for name, panels in views.items()}
    there = {name: panels for name, panels in there.items() if panels}
    return {"id": identity, "title": title, "note": note, "views": there, **more} if there else None


def training_figure(run: Run, pack: Packer, notes: list[str]) -> dict[str, Any] | None:
    """Loss, accuracy, learning rate, throughput and waiting over the updates."""
    train, epochs = run.train, run.epochs
    if len(train.get("update", ())) > POINTS:
        text = msg("This page holds {n:,} of the log's {all:,} lines, evenly spaced.")
        notes.append(tr(text, all=len(train["update"]), n=POINTS))

    def line(columns: Columns, name: str, label: str, color: str, scale: float = 1.0, **look: Any) -> Any:
        if name not in columns:
            return None
        return series_of(label, columns["update"].astype(np.int64), scale * columns[name], pack, color=color, **look)

    rates = train if np.isfinite(train.get("lr", np.nan)).any() else epochs
    speeds = train if np.isfinite(train.get("img_per_s", np.nan)).any() else epochs
    losses = [
        None
        if is_covered(train, epochs)
        else line(train, "loss", tr("train, each report"), TRAIN, width=1, mode="lines"),
        line(epochs, "train_loss", tr("train, epoch mean"), MUTED),
        line(epochs, "eval_loss", tr("eval"), MODEL, width=2.2),
        line(epochs, "eval_ema_loss", tr("eval, EMA"), EMA, symbol="square", width=2.2),
    ]
    accuracies = [
        line(epochs, "eval_top1", "top-1", MODEL, width=2.2),
        line(epochs, "eval_ema_top1", "top-1, EMA", EMA, symbol="square", width=2.2),
        line(epochs, "eval_top5", "top-5", MODEL, dash="dash", width=1.3),
        line(epochs, "eval_ema_top5", "top-5, EMA", EMA, symbol="square", dash="dash", width=1.3),
    ]
    throughput = [line(speeds, "img_per_s", tr("images / s"), MODEL)]
    waiting = [line(speeds, "data_wait", tr("waiting for data"), EMA, 100.0)]
    update = tr("update")
    panels = [
        panel(tr("Loss"), update, tr("cross-entropy, nats"), losses),
        panel(tr("Accuracy on the evaluation set"), update, tr("accuracy, %"), accuracies, positive=False),
        panel(tr("Learning rate"), update, tr("learning rate"), [line(rates, "lr", "lr", MODEL)], positive=False,
              yaxis={"tickformat": "~g"}),
        panel(tr("Throughput"), update, tr("images / s"), throughput, positive=False, yaxis={"rangemode": "tozero"}),
        panel(tr("Waiting for data"), update, tr("share of the time, %"), waiting, positive=False,
              yaxis={"rangemode": "tozero"}),
        *(panel(tr(title), update, tr(unit), [line(train, key, tr(title), EMA)], positive=False)
          for key, title, unit in _OF_REGULARISERS),
    ]  # fmt: skip
    return figure("training", tr("Training"), "", {"all": panels}, logarithmic="off", logName=tr("logarithmic loss"))


def flows_figure(run: Run, pack: Packer) -> dict[str, Any] | None:
    """Tokens and attention of each block: over the validations, and the newest by depth."""
    over_time, by_depth = [], []
    updates = run.flows.get("update", np.empty(0)).astype(np.int64)
    for metric, title, label, level, of_level in FLOW_PANELS:
        found = {kind: by_block(run, kind, metric) for kind in ("spec", "spec_ema")}
        blocks = list(found["spec"])
        levels, far = levels_of(run, metric, level, len(updates))
        unit = tr(label)
        if far:
            unit = tr("{unit}\n{level}: {n:.4g}", unit=unit, level=tr(of_level), n=far)
        by_depth.append(
            panel(tr(title), tr("block"), unit, whole=True, series=[
                *(series_of(name, np.arange(len(of)), np.array([v[-1] for v in of.values()]), pack, color=color,
                            symbol=symbol)
                  for (name, color, symbol), of in zip(((tr("model"), MODEL, "circle"), ("EMA", EMA, "square")),
                                                       found.values(), strict=True) if of),
                series_of(tr(of_level), np.arange(len(levels)), np.array([v[-1] for v in levels.values()]), pack,
                          color="ink", dash="dash", width=1, mode="lines") if of_level and levels else None,
            ])
        )  # fmt: skip
        if len(updates) > 1:
            over_time.append(
                panel(tr(title), tr("update"), unit, [
                    series_of(block, updates, values, pack, shade=_share(place, len(blocks)))
                    for place, (block, values) in enumerate(found["spec"].items())
                ])
            )  # fmt: skip
    images = run.flows.get("spec/flow/images", np.array([np.nan]))[-1]
    note = tr("From {n:,.0f} images of the validation set.", n=images) if np.isfinite(images) else ""
    return figure(
        "flows",
        tr("Tokens and attention of the blocks"),
        note,
        {tr("newest, by depth"): by_depth, tr("over the validations"): over_time},
    )


def circuits_figure(run: Run, pack: Packer) -> dict[str, Any] | None:
    """Ranks of each head's QK and OV by depth, and which heads read what heads of the block before wrote."""
    found = {key.rpartition("/")[2]: one for key, one in run.circuits.blocks.items() if key.startswith("spec/")}
    ranks: list[Any] = []
    for field, title in (("qk_HK", tr("QK: queries and keys")), ("ov_HK", tr("OV: values and output"))):
        heads = [[stable_rank(s) for s in getattr(one, field)] for one in found.values()]
        x = np.array([block for block, of in enumerate(heads) for _ in of], int)
        chance = [chance_stable_rank(one.width, getattr(one, field).shape[1]) for one in found.values()]
        names = [
            tr("{block}, head {head}", block=block, head=head)
            for block, of in zip(found, heads, strict=True)
            for head in range(len(of))
        ]
        ranks.append(
            panel(title, tr("block"), tr("stable rank of a head"), whole=True, series=[
                series_of(tr("a head"), x, np.array([one for of in heads for one in of]), pack, color=MODEL,
                          mode="markers", size=5, opacity=0.6, text=names),
                series_of(tr("mean"), np.arange(len(heads)), np.array([np.mean(of) for of in heads]), pack, color=EMA),
                series_of(tr("chance"), np.arange(len(heads)), np.array(chance), pack, color="ink", dash="dash",
                          width=1, mode="lines"),
            ])
        )  # fmt: skip
    views: dict[str, list[Any]] = {tr("ranks of heads"): ranks}
    with_pairs = [(name, one) for name, one in found.items() if one.q_HG.size]
    for name, one in with_pairs[:: max(1, -(-len(with_pairs) // SQUARES))]:
        views[tr("{name} reads the block before", name=name)] = [
            square(tr("{which}-composition", which=which), np.square(scores) * one.width,
                   tr("squared score, chance = 1"), tr("head before"), tr("head"), pack, scale="RdBu")
            for which, scores in (("Q", one.q_HG), ("K", one.k_HG))
        ]  # fmt: skip
    return figure(
        "circuits", tr("Circuits of heads"), tr("Dashed: what independent Gaussian factors would have."), views
    )


def square(title: str, values: np.ndarray, label: str, x: str, y: str, pack: Packer, **heat: Any) -> dict[str, Any]:
    """A map with rows and columns numbered from 1."""
    ticks = [[str(one) for one in index_ticks(count)] for count in values.shape]
    return {
        "title": title, "x": x, "y": y, "height": 380,
        "yaxis": {"autorange": "reversed", "showgrid": False, "type": "category", "tickvals": ticks[0]},
        "xaxis": {"showgrid": False, "type": "category", "tickvals": ticks[1]},
        "heat": {"x": [str(i + 1) for i in range(values.shape[1])], "y": [str(i + 1) for i in range(values.shape[0])],
                 "z": [pack(row) for row in values], "label": label, "over": x, **heat},
    }  # fmt: skip


def vectors_figure(run: Run, pack: Packer) -> dict[str, Any] | None:
    """Cosines between the recorded vectors then and now, of the middle matrix of each type."""
    views: dict[str, list[Any]] = {}
    for old, now, name, before, after in vector_pairs(run):
        view = tr("{name}: update {old:,} to {now:,}", name=name, old=old, now=now)
        for side in ("u", "v"):
            cosines = np.abs(getattr(before, side).T @ getattr(after, side))
            title = tr("left vectors") if side == "u" else tr("right vectors")
            views.setdefault(view, []).append(
                square(title, cosines, tr("|cosine|"), tr("index now"), tr("index then"), pack, range=[0, 1])
            )
    return figure(
        "vectors", tr("Singular vectors then and now"),
        tr("The top vectors, largest value first. A bright diagonal: the vectors have not changed."), views,
    )  # fmt: skip


def switching_figure(switching: Switching, run: Run, pack: Packer) -> dict[str, Any] | None:
    """Rank of every layer over the updates, and the evidence of the refreshes."""
    looks, switches = switching.looks, switching.switches
    steps = np.array([0, *(one.update for one in switches), run.status.updates if run.status else 0], int)
    steps[-1] = max(steps)
    ranks = [
        series_of(name, steps, np.array(
            [stage.get(name, min(run.shapes[name]) if name in run.shapes else np.nan)
             for stage in [*(switching.ranks_after(i) for i in range(len(switches) + 1)),
                           switching.ranks_after(len(switches))]], float),
            pack, shade=_share(place, len(switching.layers)), width=1.3)
        for place, name in enumerate(switching.layers)
    ]  # fmt: skip
    for one in filter(None, ranks):
        one["stepped"] = True
    evidence: list[Any] = []
    at = np.array([look.update for look in looks], int)
    titles = (
        ("energy", "energy_of_chance", tr("Energy in earlier directions")),
        ("cosine", "chance", tr("Cosine with earlier directions")),
        ("above_noise", "", tr("Share above noise of the same entries")),
    )
    for key, chance, title in titles:
        lines: list[Any] = []
        for kind, names in by_type(switching.layers).items():
            lines.append(series_of(kind, at, mean_over_time(looks, key, names), pack, look=kind))
            if chance:
                level = mean_over_time(looks, chance, names)
                thin = {"dash": "dash", "width": 1, "legend": False, "mode": "lines"}
                lines.append(series_of(tr("chance, {type}", type=kind), at, level, pack, look=kind, **thin))
        marked = [one.update for one in switches]
        evidence.append(panel(title, tr("update"), tr("share, 0-1"), lines, lines=marked))
    title = tr("Ranks of the layers in a dry run") if switching.is_dry else tr("Ranks of the layers")
    rank_panel = panel(title, tr("update"), tr("rank"), ranks, height=420)
    return figure(
        "lowrank", tr("Factorised layers"), tr("Dashed upright lines: switches."),
        {tr("ranks"): [rank_panel], tr("evidence by type"): evidence},
    )  # fmt: skip


_METHODS = {
    "svd": ("#7a8793", "square"),
    "asvd": ("#009e73", "triangle-up"),
    "fwsvd": ("#e69f00", "triangle-down"),
    "svdllm": ("#0072b2", "diamond"),
    "kfac": ("#d55e00", "circle"),
}


def compression_figure(found: Compression, pack: Packer) -> dict[str, Any] | None:
    """Top-1 and loss over the share that is left, measured over predicted rises of the loss, and ranks by layer."""
    by = found.content.get("by", "params")
    left = tr("parameters left, share of the model") if by == "params" else tr("FLOPs left, share of the model")
    panels: dict[str, list[Any]] = {"top1": [], "loss": []}
    predicted: list[Any] = []
    for line in found.methods:
        points = sorted((one for one in found.points if found.line_of(one) == line), key=lambda one: one[by])
        color, symbol = _METHODS.get(points[0]["method"], ("#7a8793", "circle"))
        x = np.array([one[by] / max(1, found.original[by]) for one in points], float)
        for name, into in panels.items():
            errors = np.array([2 * (one.get(f"{name}_error") or 0.0) for one in points], float)
            values = np.array([np.nan if one[name] is None else one[name] for one in points], float)
            into.append(series_of(line, x, values, pack, color=color, symbol=symbol, error=pack(errors)))
    for method in dict.fromkeys(point["method"] for point in found.points):
        measured, foreseen = rises(found, method)
        color, symbol = _METHODS.get(method, ("#7a8793", "circle"))
        if len(measured):
            predicted.append(series_of(method, foreseen, measured, pack, color=color, symbol=symbol, mode="markers"))
    for name, into in panels.items():
        value = found.original[name]
        whole = np.full(2, np.nan if value is None else value, float)
        into.append(
            series_of(
                tr("original"), np.array([0.0, 1.0]), whole, pack, color="ink", dash="dash", width=1, mode="lines"
            )
        )
    ranks = [
        panel(found.line_of(points[0]), tr("layer"), tr("rank"), [
            series_of(f"{point['budget']:g}", np.array(list(found.full_ranks), str), np.array(
                [full if point["ranks"].get(name) is None else point["ranks"][name]
                 for name, full in found.full_ranks.items()], float), pack, shade=_share(i, len(points)))
            for i, point in enumerate(points)], height=420)
        for points in ([p for p in found.points if found.line_of(p) == line] for line in found.methods)
    ]  # fmt: skip
    weighted: dict[str, dict[str, list[float]]] = found.content.get("spectra") or {}
    spectra = {
        tr("spectra of {name}", name=name): [
            panel(name, tr("index i"), "σᵢ / σ₁", [
                series_of(method, np.arange(1, len(s) + 1), np.array(s, float) / (s[0] or np.nan), pack, mode="lines",
                          color=_METHODS.get(method, ("#7a8793", ""))[0], dash="dash" if method == "svd" else "solid")
                for method, s in of.items() if s], log=True, height=400)]
        for name, of in list(weighted.items())[:SQUARES]
    }  # fmt: skip
    views = {
        tr("curves"): [
            panel(tr("Top-1"), left, "%", panels["top1"]),
            panel(tr("Loss"), left, "nats", panels["loss"]),
            panel(tr("Measured over predicted rise of the loss"), tr("predicted, nats"), tr("measured, nats"),
                  predicted, xlog=True, log=True),
        ],
        tr("ranks by layer"): ranks,
        **spectra,
    }  # fmt: skip
    return figure(
        "compression",
        tr("Compression"),
        tr("{what}. Bars: two standard errors of paired differences.", what=found.subtitle),
        views,
        place="end",
    )


def _share(place: int, count: int) -> float:
    """A position on the page's scale of colours: 0 for the first of `count`, 1 for the last."""
    return place / max(count - 1, 1)
