"""`make gpu-check`: the GPU tests, every bench in its short form, and the record of both, within some minutes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks import record
from benchmarks.harness.measure import nothing
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores

TESTS, BENCHES = Path("output/gpu-check.json"), Path("output/gpu-bench.json")
LEAST_MINUTES = 4.0
"""For the benches, however long the tests took: a record without figures is none."""

Call = Callable[[Sequence[str], Mapping[str, str]], int]
"""Runs a command with variables of the environment added; returns its exit code."""


@dataclass(frozen=True)
class Options:
    """Options of the check."""

    minutes: Annotated[float, tyro.conf.arg(metavar="N")] = 8.0
    """For tests and benches together; the benches get what the tests leave, 4 at least."""
    without_gpu: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the record of a machine without a GPU: the tests are skipped, the benches run on the CPU (give --minutes
    15)."""
    jobs: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by the cores, 12 at most)")
    ] = None
    """Processes that run the tests; most of their time is the host's, compiling."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("docs/benchmarks")
    """Where the record goes."""


def run(options: Options, note: Callable[[str], object] = nothing, call: Call | None = None) -> tuple[Path, bool]:
    """The record's page, and whether tests and benches were without failures. Raises `UserError`."""
    if options.minutes <= 0:
        raise UserError(f"--minutes is {options.minutes:g}, expected some.")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, expected 1 or more.")
    if not options.without_gpu and not torch.cuda.is_available():
        raise UserError(
            "torch sees no CUDA device, so nothing can be checked. Run this where `nvidia-smi` lists a GPU, with a "
            "torch that is built for CUDA (make gpu-check PY=python3 takes another interpreter), or make the record of "
            'a machine without one: make gpu-check ARGS="--without-gpu --minutes 15".'
        )
    if not Path("tests/gpu").is_dir():
        raise UserError("The folder tests/gpu is not here. Run make gpu-check in a checkout of the project.")
    begun, do = time.monotonic(), call or _call
    for old in (TESTS, BENCHES):
        old.unlink(missing_ok=True)
    note("the tests")
    # Where a GPU is wanted, a test that finds none fails rather than being left out.
    wanted = {} if options.without_gpu else {"LRV_REQUIRE_GPU": "1"}
    jobs = options.jobs or min(12, available_cores())
    # Where pytest-benchmark is installed it warns beside xdist.
    parallel = ["-n", str(jobs), "--dist", "worksteal", "-p", "no:benchmark"]
    tests = do(["pytest", "tests/gpu", "-m", "gpu", *parallel, f"--gpu-record={TESTS}"], wanted)
    left = max(LEAST_MINUTES, options.minutes - (time.monotonic() - begun) / 60)
    note(f"the benches, in {left:.1f} minutes")
    device = "cpu" if options.without_gpu else "cuda"
    flags = ["--short", "--device", device, "--budget", f"{left:.2f}", "--json", str(BENCHES)]
    benches = do(["benchmarks", "all", *flags], {})
    page = record.write(record.Options(TESTS, BENCHES, options.out))
    return page, tests == benches == 0


def _call(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    return subprocess.run([sys.executable, "-m", *arguments], env={**os.environ, **variables}, check=False).returncode
