"""The ratios and speeds that the benches are to reach, in one place, and the table that holds results against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lowrank_vit.bench.show import number


@dataclass(frozen=True)
class Aim:
    """At least `least` for a ratio or a case of a bench, at the median."""

    bench: str
    name: str
    least: float
    what: str
    """For the table, a few words."""
    device: Literal["any", "cuda"] = "any"
    """Where it is meant."""


AIMS = (
    Aim("prep", "passthrough_decode_vs_ffcv", 2.0, "convert, all decoded, / FFCV's writer"),
    Aim("prep", "passthrough_header_vs_ffcv", 8.0, "convert, headers read, / FFCV's writer"),
    Aim("prep", "reencode_vs_ffcv", 1.2, "convert to 400 px / FFCV's writer"),
    Aim("loader", "ffcv_vs_stock_ffcv", 0.95, "loader ffcv / FFCV's Loader"),
    Aim("loader", "dali_cpu_vs_stock_dali", 0.95, "loader dali / plain DALI pipeline"),
    Aim("loader", "best_vs_timm", 2.0, "best loader / timm's loader"),
    Aim("loader", "plan", 1e6, "plan, samples/s on one core"),
    Aim("loader", "dali_gpu", 12_000, "loader dali on the GPU, img/s", "cuda"),
    Aim("loader", "resident_32px", 100_000, "resident 32 px images, img/s", "cuda"),
    Aim("augment", "full_recipe_vs_timm", 2.0, "augmentation / timm's transforms"),
    Aim("augment", "full_recipe", 400_000, "augmentation on the GPU, img/s", "cuda"),
    Aim("spectral", "gram64_vs_inline_svd", 3.0, "float64 spectra / inline float32 SVD"),
    Aim("end-to-end", "end_to_end_vs_synthetic", 0.97, "training / its synthetic step", "cuda"),
)
"""As `docs/benchmarks/README.md` states them. Where none stands for a bench, its ratios are reported all the same."""


@dataclass(frozen=True)
class Verdict:
    """An aim and what was found."""

    aim: Aim
    samples: tuple[float, ...]
    """Empty where the bench did not run to its end."""
    median: float | None

    @property
    def is_reached(self) -> bool | None:
        """None where nothing was found."""
        return None if self.median is None else self.median >= self.aim.least


def judge(results: Mapping[str, Mapping[str, Any]], aims: Sequence[Aim] = AIMS) -> list[Verdict]:
    """Hold the JSON of benches, by bench, against the aims of these benches that are meant for their device."""
    verdicts = []
    for aim in aims:
        if aim.bench not in results:
            continue
        result = results[aim.bench]
        is_gpu = str(result.get("environment", {}).get("device", "cpu")).startswith("cuda")
        if aim.device == "cuda" and not is_gpu:
            continue
        found = result.get("ratios", {}).get(aim.name) or result.get("cases", {}).get(aim.name)
        verdicts.append(Verdict(aim, tuple(found["samples"]) if found else (), found["median"] if found else None))
    return verdicts


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """The one table, 80 columns wide."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("bench")
    table.add_column("to be reached", overflow="fold")
    for heading in ("median", "min .. max", "aim", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    words = {True: "yes", False: "NO", None: "not run"}
    for verdict in verdicts:
        samples, median = verdict.samples, verdict.median
        spread = f"{_short(min(samples))} .. {_short(max(samples))}" if samples else ""
        found = "" if median is None else _short(median)
        aim = verdict.aim
        table.add_row(aim.bench, aim.what, found, spread, _short(aim.least), words[verdict.is_reached])
    console.print(table)


def _short(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e4 else number(value)
