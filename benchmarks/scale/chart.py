"""The picture of the bench `growth`: a pair of axes for each sweep and unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.measure import SECONDS, Result, Samples
from benchmarks.harness.show import where
from benchmarks.scale import axes

LABELS = {
    "workers": "decoding threads",
    "batch": "images a batch",
    "size": "side of the crop, pixels",
    "samples": "samples in the set",
    "memory": "samples in the set",
    "width": "width of the ViT (192 tiny, 384 small, 768 base)",
    **axes.LABELS,
}
TITLES = {
    "workers": "Loading, by threads",
    "batch": "Loading, by batch size",
    "size": "Loading, by image size",
    "samples": "Loading, by number of samples",
    "memory": "Peak memory, by number of samples",
    "width": "Spectra, by width",
    **axes.TITLES,
}
_UNITS = {SECONDS: "waits, s"}
"""Of the axes, where they need words; beside them there are CPU seconds."""
APART = ("resident",)
"""Lines that would flatten the others of their panel: nothing is decoded there."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    sweep: str
    title: str
    unit: str
    lines: Mapping[str, Mapping[int, Samples]]
    """Line -> place on the axis -> what was found."""


def panels_of(result: Result) -> list[Panel]:
    """In the order of the sweeps; lines of another unit, and in loading the resident set, have a panel of their own."""
    panels = []
    growth: Mapping[str, Mapping[str, Mapping[int, str]]] = result.extra["growth"]
    for sweep, of_sweep in growth.items():
        groups: dict[tuple[str, str], dict[str, dict[int, Samples]]] = {}
        for line, places in of_sweep.items():
            cases = {int(x): result.cases[name] for x, name in sorted(places.items(), key=lambda item: int(item[0]))}
            unit = next(iter(cases.values())).unit
            own = line if line in APART and unit == "img/s" else ""
            groups.setdefault((unit, own), {})[line] = cases
        for (unit, own), lines in groups.items():
            title = TITLES[sweep] + (f": {_UNITS.get(unit, unit)}" if sweep in axes.AXES else "")
            if own:
                title = title.replace("Loading", "Resident loading")
            elif unit == SECONDS:
                title = title.replace("Spectra", "A whole refresh of the spectra")
            panels.append(Panel(sweep, title, unit, lines))
    return panels


def growth_chart(result: Result) -> bytes:
    """The medians, with whiskers from the lowest to the highest sample, as a PNG."""
    from lowrank_vit.report.style import EMA, INK, MODEL, heading, log_ticks, new_figure, png, tidy

    panels = panels_of(result)
    rows = -(-len(panels) // 2)
    figure = new_figure(9.2, 0.9 + 2.5 * rows)
    places = figure.subplots(rows, 2, squeeze=False).flatten()
    colours = {"ffcv": MODEL, "dali": EMA, "resident": INK, "gram64": MODEL, "refresh": MODEL}
    for place, panel in zip(places, panels, strict=False):
        tidy(place, panel.title, LABELS[panel.sweep], panel.unit)
        for line, cases in panel.lines.items():
            place.errorbar(
                list(cases), [case.median for case in cases.values()], yerr=_whiskers(list(cases.values())), label=line,
                marker="o", ms=4, capsize=3, color=None if panel.sweep in axes.AXES else colours.get(line, INK),
            )  # fmt: skip
        if panel.sweep in axes.AXES:
            place.set_xscale("log")
            place.set_yscale("log")
            log_ticks(place.yaxis)
            at = sorted({x for cases in panel.lines.values() for x in cases})
            place.set_xticks(at, [f"{x:,}" if x < 1e5 else f"{x:.3g}".replace("e+0", "e") for x in at])
            place.set_xticks([], minor=True)
        else:
            place.set_xticks(sorted({x for cases in panel.lines.values() for x in cases}))
            place.set_ylim(bottom=0)
        if len(panel.lines) > 1:
            beside = {} if len(panel.lines) < 4 else {"loc": "upper left", "bbox_to_anchor": (1, 1.04)}
            place.legend(frameon=False, fontsize=8.5, **beside)
    for place in places[len(panels) :]:
        place.set_visible(False)
    heading(figure, "Bench: growth", where(result))
    return png(figure)


def _whiskers(cases: Sequence[Samples]) -> list[list[float]]:
    low = [case.median - min(case.samples) for case in cases]
    return [low, [max(case.samples) - case.median for case in cases]]
