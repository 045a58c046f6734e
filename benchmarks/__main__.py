"""Benchmarks of this project beside its peers: tables, and JSON and plots on request."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.config.command_line import run_subcommand

# A further bench is a module with `Options` and `run`, and a command here.


def prep_command(bench: tyro.conf.OmitArgPrefixes[prep.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    """Convert a folder of JPEGs: `data_prep` beside FFCV's own writer and beside copying the files.

    Takes about a minute a round on 2 cores, and 1 GB on the disk.
    """
    _bench(partial(prep.run, bench), output)


def loader_command(bench: tyro.conf.OmitArgPrefixes[loader.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    """Read training crops: our backends beside stock FFCV, a plain DALI pipeline and timm's loader.

    Takes about fifteen seconds a round on 2 cores.
    """
    _bench(partial(loader.run, bench, keep=output.write_json), output)


def augment_command(
    bench: tyro.conf.OmitArgPrefixes[augment.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    """Augment decoded crops with timm's published recipe, beside timm's own transforms.

    Takes about ten seconds a round on 2 cores.
    """
    _bench(partial(augment.run, bench), output)


def spectral_command(
    bench: tyro.conf.OmitArgPrefixes[spectral.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    """Singular values and vectors of a ViT's weights: exactness, and speed beside a plain SVD and before.

    Takes about twenty seconds a round on 2 cores.
    """
    _bench(partial(spectral.run, bench), output, print_accuracy)


def step_command(bench: tyro.conf.OmitArgPrefixes[step.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    """Training steps on synthetic images, eager and compiled, beside those of timm's train.py.

    Takes about ten seconds a round on 2 cores, and a minute to compile.
    """
    _bench(partial(step.run, bench), output)


def end_to_end_command(
    bench: tyro.conf.OmitArgPrefixes[end_to_end.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    """Train from a .beton with the full recipe: the phases of a step, its bottleneck, and the step without data.

    Takes about ten seconds a round on 2 cores.
    """
    _bench(partial(end_to_end.run, bench, keep=output.write_json), output)


def training_command(
    bench: tyro.conf.OmitArgPrefixes[figures.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    """One figure of a training run: its step beside timm's, with data, with the monitor, or its kernels.

    --json is written after each round.
    """
    _bench(partial(figures.run, bench, keep=output.write_json), output)


def limits_command(bench: tyro.conf.OmitArgPrefixes[limits.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    """What the machine can do at most: JPEG decoding, copying memory, reading cached files, matrix products.

    Takes about five seconds a round on 2 cores.
    """
    _bench(partial(limits.run, bench), output)


def growth_command(bench: tyro.conf.OmitArgPrefixes[growth.Options], output: tyro.conf.OmitArgPrefixes[Output]) -> None:
    """How speed and memory grow with workers, batch, image size, samples, files, classes, ranks and the model's width.

    Takes about four minutes a round on 2 cores, most of it for the processes whose memory is measured, and 1 GB on the
    disk. --json is written after each place; the same command goes on from a file that is not finished.
    """
    run = partial(growth.run, bench, keep=output.write_json, before=output.earlier())
    _bench(run, output, print_exponents, chart=growth_chart)


def all_command(
    bench: tyro.conf.OmitArgPrefixes[all_benches.Options], output: tyro.conf.OmitArgPrefixes[Output]
) -> None:
    """All of them, one after the other, and one table of the ratios that are to be reached.

    Takes less than 15 minutes on 2 idle cores with --short, 3.6 on a GPU. --json is written after each bench, so that
    an interruption keeps what is done. Exits with 1 if something of ours failed; a ratio that is missed is no failure.
    """
    output.check()
    before = all_benches.earlier(output.json) if bench.only else None
    result = all_benches.run(bench, note=_note(), save=output.write_json, before=before)
    all_benches.print_summary(result, Console())
    output.write(result, aims_chart)
    if result.is_broken:
        sys.exit(1)


def record_command(options: tyro.conf.OmitArgPrefixes[record.Options]) -> None:
    """Join the GPU tests' record and that of `all` into one JSON file and one page for docs/benchmarks."""
    print(f"written: {record.write(options)}")


def gpu_check_command(options: tyro.conf.OmitArgPrefixes[gpu_check.Options]) -> None:
    """The GPU tests, the benches in their short form, and the record of both: what `make gpu-check` does.

    Takes 6 minutes; the record names what was not reached in them. Exits with 1 if a test or something of ours in a
    bench failed; the record is written all the same.
    """
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
    output.write(result, chart)  # behind the figures, which a full disk must not cost
    if result.is_broken:
        sys.exit(1)


def with_memory(result: Result) -> Result:
    """With the sections peak_memory_gib and, where a GPU was used, peak_gpu_memory_gib: of this process, all cases."""
    peaks = {}
    with suppress(UserError):  # only Linux tells
        peaks["peak_memory_gib"] = peak_resident_bytes()
    if torch.cuda.is_initialized():
        peaks["peak_gpu_memory_gib"] = torch.cuda.max_memory_reserved()
    rounded = {name: round(value / 2**30, 2) for name, value in peaks.items()}
    return replace(result, extra={**result.extra, **rounded})


def _note() -> Callable[[str], object]:
    progress = Console(stderr=True, soft_wrap=True)
    return lambda text: progress.print(text, style="dim", markup=False, highlight=False)


_COMMANDS = {
    "prep": prep_command,
    "loader": loader_command,
    "augment": augment_command,
    "spectral": spectral_command,
    "step": step_command,
    "end-to-end": end_to_end_command,
    "training": training_command,
    "limits": limits_command,
    "growth": growth_command,
    "all": all_command,
    "record": record_command,
    "gpu-check": gpu_check_command,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own). Exits with 2 on a user's error, 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    exit_cleanly(lambda: run_command(argv))


def run_command(argv: list[str]) -> None:
    """The same for one who goes on afterwards. Raises `UserError`, and `SystemExit` where something of ours failed."""
    run_subcommand(_COMMANDS, argv, usage_name("benchmarks"), __doc__)


if __name__ == "__main__":
    main()
