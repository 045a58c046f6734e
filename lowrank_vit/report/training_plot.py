"""`training.png`: loss, accuracy, learning rate and throughput over the updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.events import Columns
from lowrank_vit.report.read import Run
from lowrank_vit.report.style import EMA, MODEL, MUTED, TRAIN, heading, log_ticks, new_figure, png, tidy, update_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_plot(run: Run) -> bytes | None:
    """The picture as PNG bytes, with a panel for each quantity that the run has; None if it has none."""
    panels: list[Callable[[Axes, Run], None]] = []
    if _has(run.train, "loss") or _has(run.epochs, "train_loss") or _has(run.epochs, "eval_loss"):
        panels.append(_loss)
    if _has(run.epochs, "eval_top1"):
        panels.append(_accuracy)
    if _has(run.train, "lr") or _has(run.epochs, "lr"):
        panels.append(_learning_rate)
    if _has(run.train, "img_per_s") or _has(run.epochs, "img_per_s"):
        panels.append(_throughput)
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 0.9 + 3.1 * rows)
    for index, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        draw(axes, run)
        axes.set_xlim(0, None)
        update_ticks(axes.xaxis)
    heading(figure, "Training", _subtitle(run))
    return png(figure)


def _subtitle(run: Run) -> str:
    parts = [str(run.args["model"])] if run.args.get("model") else []
    if run.status:
        of_planned = f" of {run.status.planned:,}" if run.status.planned else ""
        parts.append(f"{run.status.epochs:,}{of_planned} epochs, {run.status.updates:,} updates")
    return "  ·  ".join(parts)


def _loss(axes: Axes, run: Run) -> None:
    tidy(axes, "Loss", "update", "loss (cross-entropy, nats)")
    if not is_covered(run.train, run.epochs):
        _line(axes, run.train, "loss", "train, each report", TRAIN, linewidth=0.8, alpha=0.7)
    _line(axes, run.epochs, "train_loss", "train, epoch mean", MUTED, linewidth=1.6)
    _line(axes, run.epochs, "eval_loss", "eval", MODEL, linewidth=2)
    _line(axes, run.epochs, "eval_ema_loss", "eval, EMA", EMA, linewidth=2)
    losses = np.concatenate([line.get_ydata() for line in axes.get_lines()])  # pyright: ignore[reportArgumentType]
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    _legend(axes)


def _accuracy(axes: Axes, run: Run) -> None:
    tidy(axes, "Accuracy on the evaluation set", "update", "accuracy (%)")
    _line(axes, run.epochs, "eval_top5", "top-5", MODEL, linewidth=1.3, linestyle="--", alpha=0.7)
    _line(axes, run.epochs, "eval_ema_top5", "top-5, EMA", EMA, linewidth=1.3, linestyle="--", alpha=0.7)
    _line(axes, run.epochs, "eval_top1", "top-1", MODEL, linewidth=2)
    _line(axes, run.epochs, "eval_ema_top1", "top-1, EMA", EMA, linewidth=2)
    axes.set_ylim(0, 102)
    _legend(axes)


def _learning_rate(axes: Axes, run: Run) -> None:
    tidy(axes, "Learning rate", "update", "learning rate")
    _line(axes, run.train if _has(run.train, "lr") else run.epochs, "lr", "lr", MODEL, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")  # a power of ten on top would collide with the title


def _throughput(axes: Axes, run: Run) -> None:
    tidy(axes, "Throughput", "update", "images / s")
    columns = run.train if _has(run.train, "img_per_s") else run.epochs
    _line(axes, columns, "img_per_s", "images / s", MODEL, linewidth=1.6)
    axes.set_ylim(0, 1.08 * np.nanmax(columns["img_per_s"]) or 1)
    if not _has(columns, "data_wait"):
        return
    waiting = axes.twinx()
    tidy(waiting, ylabel="time waiting for data (%)")
    waiting.grid(visible=False)
    shown = columns | {"data_wait": 100 * columns["data_wait"]}
    _line(waiting, shown, "data_wait", "waiting for data", EMA, linewidth=1.2)
    waiting.set_ylim(0, 100)
    for side, color in ((axes, MODEL), (waiting, EMA)):  # colours show which scale belongs to which line
        side.yaxis.label.set_color(color)
        side.tick_params(axis="y", colors=color)


def _has(columns: Columns, name: str) -> bool:
    return name in columns and bool(np.isfinite(columns[name]).any())


def is_covered(train: Columns, epochs: Columns) -> bool:
    """Whether every line of the log is at the end of an epoch, where it equals the epoch's mean."""
    return "train_loss" in epochs and set(train.get("update", ())) <= set(epochs["update"])


def _line(axes: Axes, columns: Columns, name: str, label: str, color: str, **style: float | str) -> None:
    if _has(columns, name):
        few = np.isfinite(columns[name]).sum() <= 30  # a lone point has no line
        marker = {"marker": "o", "markersize": 3} if few else {}
        axes.plot(columns["update"], columns[name], label=label, color=color, **marker, **style)  # pyright: ignore[reportArgumentType]


def _legend(axes: Axes) -> None:
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=MUTED)
