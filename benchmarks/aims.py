"""The ratios and speeds that the benches are to reach, in one place, and the table that holds results against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.show import number


@dataclass(frozen=True)
class Aim:
    """At least `least` for a ratio or a case of a bench, at the median."""

    bench: str
    name: str
    least: float
    what: str
    """For the table, a few words."""
    device: Literal["any", "cpu", "cuda"] = "any"
    """Where it is meant."""

    def is_for(self, device: str) -> bool:
        """Whether it is meant for that type of device."""
        return self.device in ("any", device)


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
    Aim("spectral", "gram64_vs_inline_svd", 3.0, "float64 spectra / inline float32 SVD", "cpu"),
    Aim("spectral", "gram64_vs_inline_svd", 50.0, "float64 spectra / inline float32 SVD", "cuda"),
    Aim("spectral", "with_monitor_vs_without", 0.99, "steps with the monitor / without", "cuda"),
    Aim("end-to-end", "end_to_end", 10_000, "training a ViT-S, img/s", "cuda"),
    Aim("end-to-end", "end_to_end_vs_synthetic", 0.97, "training a ViT-S / its synthetic step", "cuda"),
    Aim("end-to-end-base", "end_to_end", 3_000, "training a ViT-B, img/s", "cuda"),
    Aim("end-to-end-base", "end_to_end_vs_synthetic", 0.97, "training a ViT-B / its synthetic step", "cuda"),
)
"""As `docs/benchmarks/README.md` states them. Where none stands for a bench, its ratios are reported all the same.

A bench's name is that of `programme`. That the monitor costs at most 1 % of a step is 0.99 of its speed.
"""


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


def judge(results: Mapping[str, Mapping[str, Any]], device: str, aims: Sequence[Aim] = AIMS) -> list[Verdict]:
    """Hold the JSON of benches, by bench, against the aims of these benches that are meant for the type of device.

    A bench that gave nothing stands in `results` with an empty mapping, so that its aims are not forgotten.
    """
    verdicts = []
    for aim in aims:
        if aim.bench not in results or not aim.is_for(device):
            continue
        result = results[aim.bench]
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
        spread = f"{short_number(min(samples))} .. {short_number(max(samples))}" if samples else ""
        found = "" if median is None else short_number(median)
        aim = verdict.aim
        table.add_row(aim.bench, aim.what, found, spread, short_number(aim.least), words[verdict.is_reached])
    console.print(table)


def short_number(value: float) -> str:
    """Three digits: 3.20M, 12.5k, 0.987."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e4 else number(value)
