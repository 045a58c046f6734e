"""The benches as functions of their options. Importing this loads torch and timm: `__main__` does so for a bench."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
import tyro
from rich.console import Console

from benchmarks import all_benches, augment, gpu_check, growth, limits, loader, prep, record, spectral, step
from benchmarks.harness.aims import aims_chart
from benchmarks.harness.measure import Result, nothing
from benchmarks.harness.peak_memory import peak_resident_bytes
from benchmarks.harness.show import Output, print_result
from benchmarks.scale.chart import growth_chart
from benchmarks.scale.exponents import print_exponents
from benchmarks.spectra.accuracy import print_accuracy
from benchmarks.training import end_to_end, figures
from lowrank_vit.common.errors import UserError


def _prep(bench: tyro.conf.OmitArgPrefixes[prep.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(prep.run, bench), output)


def _loader(bench: tyro.conf.OmitArgPrefixes[loader.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(loader.run, bench, keep=output.write_json), output)


def _augment(bench: tyro.conf.OmitArgPrefixes[augment.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(augment.run, bench), output)


def _spectral(bench: tyro.conf.OmitArgPrefixes[spectral.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(spectral.run, bench), output, print_accuracy)


def _step(bench: tyro.conf.OmitArgPrefixes[step.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(step.run, bench), output)


def _end_to_end(
    bench: tyro.conf.OmitArgPrefixes[end_to_end.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    _bench(partial(end_to_end.run, bench, keep=output.write_json), output)


def _training(bench: tyro.conf.OmitArgPrefixes[figures.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(figures.run, bench, keep=output.write_json), output)


def _limits(bench: tyro.conf.OmitArgPrefixes[limits.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    _bench(partial(limits.run, bench), output)


def _growth(bench: tyro.conf.OmitArgPrefixes[growth.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    run = partial(growth.run, bench, keep=output.write_json, before=output.earlier())
    _bench(run, output, print_exponents, chart=growth_chart)


def _all(bench: tyro.conf.OmitArgPrefixes[all_benches.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    output.check()
    before = all_benches.earlier(output.json) if bench.only else None
    result = all_benches.run(bench, note=_note(), save=output.write_json, before=before)
    all_benches.print_summary(result, Console())
    output.write(result, aims_chart)
    if result.is_broken:
        sys.exit(1)


def _record(options: tyro.conf.OmitArgPrefixes[record.Options]) -> None:
    print(f"written: {record.write(options)}")


def _gpu_check(options: tyro.conf.OmitArgPrefixes[gpu_check.Options]) -> None:
    page, is_clean = gpu_check.run(options, note=_note())
    print(f"written: {page}")
    if not is_clean:
        sys.exit(1)


def _bench(
    run: Callable[..., Result],
    output: Output,
    print_more: Callable[[Result, Console], object] = nothing,
    chart: Callable[[Result], bytes] | None = None,
) -> None:
    output.check()
    result = with_memory(run(note=_note()))
    print_more(result, Console())
    print_result(result, Console())
    output.write(result, chart)  # after printing, so that a full disk does not lose the figures
    if result.is_broken:
        sys.exit(1)


def with_memory(result: Result) -> Result:
    """The result with peak_memory_gib and, if a GPU was used, peak_gpu_memory_gib, of this process over all cases."""
    peaks = {}
    with suppress(UserError):  # only on Linux
        peaks["peak_memory_gib"] = peak_resident_bytes()
    if torch.cuda.is_initialized():
        peaks["peak_gpu_memory_gib"] = torch.cuda.max_memory_reserved()
    rounded = {name: round(value / 2**30, 2) for name, value in peaks.items()}
    return replace(result, extra={**result.extra, **rounded})


def _note() -> Callable[[str], object]:
    progress = Console(stderr=True, soft_wrap=True)
    return lambda text: progress.print(text, style="dim", markup=False, highlight=False)


_COMMANDS: dict[str, Callable[..., None]] = {
    "prep": _prep,
    "loader": _loader,
    "augment": _augment,
    "spectral": _spectral,
    "step": _step,
    "end-to-end": _end_to_end,
    "training": _training,
    "limits": _limits,
    "growth": _growth,
    "all": _all,
    "record": _record,
    "gpu-check": _gpu_check,
}


def described(descriptions: Mapping[str, str]) -> dict[str, Callable[..., None]]:
    """The functions by command, with `descriptions` as their docstrings, which are the text of their help."""
    for name, text in descriptions.items():
        _COMMANDS[name].__doc__ = text
    return {name: _COMMANDS[name] for name in descriptions}
