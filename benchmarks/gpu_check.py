"""`make gpu-check`: the GPU tests, the short form of the benches, and the record of both, within a few minutes.

A GPU may be available for a few minutes only, and may go away at any moment. So the most valuable figures come first,
each has a time limit, and files and page are rewritten after each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import all_benches, loader, record
from benchmarks.harness.measure import Result, nothing, reason_of
from benchmarks.harness.processes import end, start_bench
from benchmarks.harness.sets import converted, photographs
from benchmarks.prep import CACHE
from benchmarks.selection import PHOTOS, SELECTIONS
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.devices import why_no_cuda
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole
from lowrank_vit.common.numba_code import NOTE as COMPILING
from lowrank_vit.common.numba_code import must_compile
from lowrank_vit.common.resources import available_cores

MINUTES = {"cuda": 6.0, "cpu": 16.0}
"""Minutes for everything, by device."""
PROFILE_MINUTES = 1.0
"""Additional minutes with --profile."""
TESTS_SHARE = 2.5 / 6
"""The tests' share of the time that is left when their data sets are made."""
MOST_JOBS = 16
COMPILERS = 4
"""Compilers of torch.compile in each test process; a few, since few tests compile for long."""
PREPARE_LIMIT_S = 90.0
"""Time limit for opening the set and measuring the decoder's speed with it."""
COMPILE_LIMIT_S = 150.0
"""Time limit for each of the two benches that compile the CPU's functions."""
TOO_LONG = 124
"""Exit code of tests that were ended, like that of the program `timeout`."""
_TESTS = "tests"

Call = Callable[[Sequence[str], Mapping[str, str], float], int]
"""Runs a Python module with more environment variables, for at most so many seconds; returns its exit code."""


@dataclass(frozen=True)
class Options:
    """Options of the check."""

    minutes: Annotated[
        float | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 6; with --profile 7; without a GPU 16)")
    ] = None
    """Time for everything. The tests get 2.5 of every 6 minutes that are left once the sets are made. What did not run
    is listed."""
    only: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (
        None
    )
    """Run only these benches, in this order; names may be separated by commas, and "tests" stands for the tests. They
    are added to this machine's last record instead of beginning a new one."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also a table of the kernels that the step and a run spend their time in."""
    without_gpu: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the record of a machine without a GPU: the tests are skipped, the benches are those of a CPU."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Rehearse all of it in tiny sizes, also without a GPU. The figures mean nothing, and the page stays in output/."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each bench's own)")] = None
    """Measured rounds of each bench."""
    jobs: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core, 16 at most)")
    ] = None
    """Processes that run the tests; most of their time is the host's, compiling."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: docs/benchmarks)")] = None
    """Where the record goes."""

    @property
    def names(self) -> list[str]:
        """The names in --only."""
        return [name for part in self.only or () for name in part.split(",") if name]

    def check(self) -> None:
        """Raise `UserError` for wrong options."""
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes is {self.minutes:g}, expected more than 0.")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}, expected 1 or more.")
        if self.only is not None and not self.names:
            raise UserError('--only names nothing. Give "tests", or names of benches.')
        if self.tiny and self.without_gpu:
            raise UserError("--tiny and --without-gpu exclude each other: a rehearsal needs no GPU.")
        if not (self.without_gpu or self.tiny or torch.cuda.is_available()):
            why, advice = why_no_cuda() or (
                "",
                "Run this where `nvidia-smi` lists a GPU, with a torch that is built for CUDA (make gpu-check "
                "PY=python3 takes another interpreter)",
            )
            raise UserError(
                f"torch sees no CUDA device{why and f', since {why}'}, so nothing can be checked. "
                f"{advice.rstrip(',')}, make the record of a machine without one: make gpu-check "
                'ARGS="--without-gpu", or rehearse: ARGS="--tiny".'
            )
        if not Path("tests/gpu").is_dir():
            raise UserError("The folder tests/gpu is not here. Run make gpu-check in a checkout of the project.")

    def benches(self, device: str, budget: float) -> all_benches.Options:
        """The options of the benches, for so many minutes."""
        names = tuple(name for name in self.names if name != _TESTS)
        return all_benches.Options(
            short=not self.tiny,
            tiny=self.tiny,
            only=names or None,
            profile=self.profile,
            device="cuda" if device == "cuda" else "cpu",
            repeats=self.repeats,
            budget=budget,
        )


@dataclass(frozen=True)
class _Files:
    """The files of a check, to which the next one can add."""

    folder: Path

    @property
    def tests(self) -> Path:
        """Written by `pytest --gpu-record`."""
        return self.folder / "tests.json"

    @property
    def benches(self) -> Path:
        """The result of `all`."""
        return self.folder / "benches.json"

    @property
    def page(self) -> Path:
        """Contains the path of the page, which stays when more is added."""
        return self.folder / "page"

    def forget(self) -> None:
        """Remove the files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self.tests, self.benches, self.page):
            file.unlink(missing_ok=True)


def files_of(tiny: bool) -> _Files:
    """The files of checks, or of rehearsals."""
    return _Files(Path("output") / ("gpu-check-tiny" if tiny else "gpu-check"))


def run(
    options: Options,
    note: Callable[[str], object] = nothing,
    call: Call | None = None,
    start: all_benches.Start | None = None,
) -> tuple[Path, bool]:
    """Run the check; returns the record's page, and whether nothing has failed. Raises `UserError`.

    `call` runs the tests, and `start` a bench; by default in processes.
    """
    options.check()
    device = "cuda" if torch.cuda.is_available() and not options.without_gpu else "cpu"
    options.benches(device, 1).entries(device, others=(_TESTS,))  # report a wrong name now
    minutes = options.minutes or MINUTES["cpu" if options.tiny else device] + PROFILE_MINUTES * options.profile
    files, begun = files_of(options.tiny), time.monotonic()
    if not options.names or not _is_of_this_machine(files, note):
        files.forget()
    write = partial(_write_page, options, files)

    def left() -> float:
        """Minutes left; never 0, so that benches can report that the time is used up."""
        return max(0.01, minutes - (time.monotonic() - begun) / 60)

    has_tests, has_benches = (not options.names or _TESTS in options.names), set(options.names) != {_TESTS}
    if not options.without_gpu:
        with _twins_compiled(note, start or start_bench) if has_tests and not options.tiny else nullcontext():
            _make_sets(options, note, start or start_bench)
        note(f"the data sets are ready; {left():.1f} of {minutes:g} minutes are left")
    codes: list[int] = []
    if has_tests:
        limit_s = 60 * left() * (TESTS_SHARE if has_benches else 1)
        codes.append(_run_tests(options, files, limit_s, note, call or _call))
        write()
    if has_benches:
        note(f"the benches, in {left():.1f} minutes")
        before = all_benches.earlier(files.benches)

        def save(result: Result) -> None:
            write_whole(files.benches, result.to_json())
            write()

        result = all_benches.run(options.benches(device, left()), note=note, start=start, save=save, before=before)
        codes.append(int(result.is_broken))
    return write(), not any(codes)


def _is_of_this_machine(files: _Files, note: Callable[[str], object]) -> bool:
    """Whether there is a record of this machine to add to."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parts = [part for part in (all_benches.earlier(files.benches), _earlier_tests(files, note)) if part is not None]
    for part in parts:
        if (other := (part.get("environment") or {}).get("gpu")) not in (None, gpu):
            note(f"the last record is of another GPU ({other}), so a new one is started")
            return False
    return bool(parts)


def _earlier_tests(files: _Files, note: Callable[[str], object]) -> dict[str, Any] | None:
    """The tests of an earlier check; a file that cannot be read is removed, with a note."""
    try:
        return record.read_part(files.tests)
    except UserError as error:
        note(str(error))
        files.tests.unlink()
        return None


def _write_page(options: Options, files: _Files) -> Path:
    """Write the page with everything so far, at its record's path."""
    out = options.out or (files.folder if options.tiny else Path("docs/benchmarks"))
    known = Path(files.page.read_text(encoding="utf-8")) if files.page.exists() else None
    if known is not None and not (known.exists() and known.parent == out):  # removed since, or --out has changed
        known = None
    page = record.write(record.Options(files.tests, files.benches, out), known)
    write_whole(files.page, str(page))
    return page


def _make_sets(options: Options, note: Callable[[str], object], start: all_benches.Start) -> None:
    """Make photographs and sets, and measure the decoder's speeds, so that this takes no bench's time.

    Failures here are reported by the benches that need the result.
    """
    try:
        if options.tiny:
            converted(photographs(CACHE, 24, note), "", ImageOptions())
            return
        folder = photographs(CACHE, PHOTOS, note)
        for image in (ImageOptions(), ImageOptions(raw=loader.RAW_SIDE), ImageOptions(max_side=loader.MAX_SIDE)):
            converted(folder, loader.suffix_of(image), image)
        entry, benches = SELECTIONS["cuda"]["step"], options.benches("cuda", 1)
        flags = [*benches.flags(entry, "cuda"), "--figure", "prepare"]
        with tempfile.TemporaryDirectory() as made:
            start([entry.bench, *flags], Path(made) / "prepare.json", PREPARE_LIMIT_S)
    except Exception as error:
        note(f"data sets of the benches: {reason_of(error)}")


@contextmanager
def _twins_compiled(note: Callable[[str], object], start: all_benches.Start) -> Generator[None]:
    """During the context, let numba compile the CPU functions with which tests compare a GPU, in the background.

    numba caches them; otherwise every test process would compile all of them. Two tiny benches on the CPU call them.
    """

    def compile_all() -> None:
        tiny = all_benches.Options(tiny=True, repeats=1)
        for entry in (SELECTIONS["cuda"]["augment"], SELECTIONS["cuda"]["loader"]):
            try:
                with tempfile.TemporaryDirectory() as made:
                    flags = [*tiny.flags(entry, "cpu"), "--scratch", made]
                    start([entry.bench, *flags], Path(made) / "compiled.json", COMPILE_LIMIT_S)
            except Exception as error:
                note(f"compiling with numba: {reason_of(error)}")

    if not _must_compile():
        yield
        return
    note(COMPILING)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compile_all)
        yield


def _must_compile() -> bool:
    from lowrank_vit.augment.ops_cpu import apply_ops
    from lowrank_vit.data.decode.ffcv import decode_batch
    from lowrank_vit.data.decode.resize_cpu import resize_batch

    return must_compile(apply_ops, decode_batch, resize_batch)


def _run_tests(options: Options, files: _Files, limit_s: float, note: Callable[[str], object], call: Call) -> int:
    files.tests.unlink(missing_ok=True)
    jobs = options.jobs or min(MOST_JOBS, available_cores())
    note(f"the tests in {jobs} processes, at most {limit_s:.0f} s")
    # Each process has a pool of compilers, by default one per core.
    variables = {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILERS if jobs > 1 else available_cores())}
    if not (options.without_gpu or options.tiny):
        variables["LRV_REQUIRE_GPU"] = "1"  # a test that finds no GPU fails instead of being skipped
    # One at a time, the longest first, see `tests/gpu/conftest.py`; pytest-benchmark, if installed, warns beside xdist.
    parallel = ["-n", str(jobs), "--dist", "load", "--maxschedchunk", "1", "-p", "no:benchmark"]
    code = call(["pytest", "tests/gpu", "-m", "gpu", *parallel, f"--gpu-record={files.tests}"], variables, limit_s)
    if code == TOO_LONG:
        note(f"the tests were ended after {limit_s:.0f} s; the record names those that did not run")
    return code


def _call(arguments: Sequence[str], variables: Mapping[str, str], limit_s: float) -> int:
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True, text=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return TOO_LONG
    finally:
        end(process, 5.0)
