"""Time named cases side by side: whole rounds in which every case runs once, and ratios round by round.

Absolute figures drift with the machine's other work; a ratio of two runs next to each other drifts far less. The order
changes from round to round (A B C, C B A, B C A, ...), so that no case always inherits heat, caches and threads from
the same other case.

CPU seconds are measured too. Another process on the same cores makes a run last longer, but hardly adds CPU seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from statistics import median
from typing import Any, TypeVar

import psutil
from PIL import features

from lowrank_vit.common import resources
from lowrank_vit.common.errors import UserError

T = TypeVar("T")

DEFAULT_REPEATS = 5
MAX_REASON = 400
SECONDS = "s"
"""The unit of cases whose samples are times."""


def nothing(*args: object) -> None:
    """Do nothing: for cases without preparation, and calls without a listener."""


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    run: Callable[[], object]
    """The timed part; on an accelerator it waits for the device before it returns."""
    items: float
    """How many items `run` handles (GB may be fractional); a sample is items / seconds, or with the unit "s" seconds /
    items."""
    unit: str = "img/s"
    setting: str = ""
    """One sentence for the reader: the settings, and what the timed part contains."""
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing
    """Not timed: prepare before, then check and clean up after."""
    first: Callable[[], object] = nothing
    """Not timed, once before the first round: costs of the first use, such as compilation."""
    peer: bool = False
    """Whether it is another project's code: if it fails, the command does not."""

    @classmethod
    def of_peer(cls, make: Callable[[], Case]) -> Case:
        """A peer's case; if making it fails, a case that fails with that error in its turn."""
        try:
            return replace(make(), peer=True)
        except Exception as error:
            caught = error  # Python deletes `error` after this block

            def fail() -> None:
                raise caught

            return cls(fail, 1, peer=True)

    def sample(self, seconds: float) -> float:
        """The sample for a run of so many seconds, in the unit."""
        return seconds / self.items if self.unit == SECONDS else self.items / seconds


@dataclass(frozen=True)
class Samples:
    """The samples of a case or of a ratio, in the order of the rounds."""

    samples: tuple[float, ...]
    unit: str = ""
    """Empty for a ratio."""
    setting: str = ""
    cpu: tuple[float, ...] = ()
    """CPU seconds per item, round by round; for a ratio, the ratio by CPU seconds instead of time. Empty if they were
    not
    measured."""

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the two in the middle."""
        return median(self.samples)


@dataclass(frozen=True)
class Result:
    """A finished bench."""

    bench: str
    environment: Mapping[str, Any]
    cases: Mapping[str, Samples]
    ratios: Mapping[str, Samples]
    limits: tuple[str, ...] = ()
    """Sentences about what the figures do not show."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further sections of the JSON."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """The reason for each case that did not finish; it is in no other section."""
    peers: frozenset[str] = frozenset()
    """The names of peers' cases, including failed ones."""

    @property
    def is_broken(self) -> bool:
        """Whether something of ours failed."""
        return any(name not in self.peers for name in self.failed)

    def to_dict(self) -> dict[str, Any]:
        """bench, environment, cases, ratios, and then settings, peers, failed, limits and the extra sections."""
        return {
            "bench": self.bench,
            "environment": dict(self.environment),
            "cases": {name: {"unit": case.unit, **_figures(case)} for name, case in self.cases.items()},
            "ratios": {name: _figures(ratio) for name, ratio in self.ratios.items()},
            "settings": {name: case.setting for name, case in self.cases.items()},
            "peers": sorted(self.peers),
            "failed": dict(self.failed),
            "limits": list(self.limits),
            **self.extra,
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`. Raises `KeyError` or similar if it is not the JSON of a bench."""
        rest = dict(content)
        bench, surroundings, settings = rest.pop("bench"), rest.pop("environment"), rest.pop("settings")
        cases, ratios = (
            {
                name: Samples(
                    tuple(one["samples"]), one.get("unit", ""), settings.get(name, ""), tuple(one.get("cpu", ()))
                )
                for name, one in rest.pop(section).items()
            }
            for section in ("cases", "ratios")
        )
        peers, failed, limits = (rest.pop(key) for key in ("peers", "failed", "limits"))
        return cls(bench, surroundings, cases, ratios, tuple(limits), rest, failed, frozenset(peers))

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _figures(samples: Samples) -> dict[str, Any]:
    found = {"median": samples.median, "samples": list(samples.samples)}
    return found | ({"cpu": list(samples.cpu)} if samples.cpu else {})


def measure(
    bench: str,
    cases: Mapping[str, Case],
    ratios: Mapping[str, tuple[str, str]],
    *,
    environment: Mapping[str, Any],
    repeats: int = DEFAULT_REPEATS,
    warmup: int = 1,
    limits: tuple[str, ...] = (),
    note: Callable[[str], object] = nothing,
    keep: Callable[[Result], object] = nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Run `warmup` rounds that do not count and `repeats` that do; each round runs every case once, see `order_of`.

    `ratios` maps a name to two cases: the first's sample divided by the second's of the same round. `note` gets a line
    at the start of each round; `keep` gets the result so far after each round but the last; `clock` returns seconds.

    A case that fails is left out from then on and is in `failed` with the reason; the others continue, and only the
    ratios with it are lost. Raises `UserError` for `repeats` below 1. A `UserError` of one of our cases is raised too,
    since it is about options or data that the other cases share.
    """
    check_repeats(repeats)
    for name, pair in ratios.items():
        assert set(pair) <= set(cases), name
        assert all(cases[one].unit != SECONDS for one in pair), name
    samples: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for n in range(warmup + repeats):
        note(f"warm-up {n + 1} of {warmup}" if n < warmup else f"round {n - warmup + 1} of {repeats}")
        for name in order_of(list(cases), n):
            if name in failed:
                continue
            case = cases[name]
            try:
                if n == 0:
                    case.first()
                seconds, of_cpus = _time(case, clock)
            except Exception as error:
                if isinstance(error, UserError) and not case.peer:
                    raise
                failed[name] = reason_of(error)
                note(f"{name} failed: {failed[name]}")
                continue
            if n >= warmup:
                samples[name].append(case.sample(seconds))
                cpu[name].append(of_cpus / case.items)
        if warmup <= n < warmup + repeats - 1:
            keep(_result(bench, environment, cases, ratios, samples, cpu, failed, limits))
    return _result(bench, environment, cases, ratios, samples, cpu, failed, limits)


def _result(
    bench: str,
    environment: Mapping[str, Any],
    cases: Mapping[str, Case],
    ratios: Mapping[str, tuple[str, str]],
    samples: Mapping[str, Sequence[float]],
    cpu: Mapping[str, Sequence[float]],
    failed: Mapping[str, str],
    limits: tuple[str, ...],
) -> Result:
    """The result of the rounds so far; failed cases have no figures."""
    done = {name: case for name, case in cases.items() if name not in failed}
    rounds = min((len(samples[name]) for name in done), default=DEFAULT_REPEATS)
    if rounds < DEFAULT_REPEATS:
        limits = (f"Only {rounds} round{'s' * (rounds > 1)}: a smoke test, not a measurement.", *limits)
    return Result(
        bench,
        environment,
        {name: Samples(tuple(samples[name]), case.unit, case.setting, tuple(cpu[name])) for name, case in done.items()},
        {
            name: Samples(
                tuple(a / b for a, b in zip(samples[over], samples[under], strict=True)),
                cpu=tuple(b / a for a, b in zip(cpu[over], cpu[under], strict=True)) if all(cpu[over]) else (),
            )
            for name, (over, under) in ratios.items()
            if over in done and under in done
        },
        limits,
        failed=dict(failed),
        peers=frozenset(name for name, case in cases.items() if case.peer),
    )


def check_repeats(repeats: int) -> None:
    """Raises `UserError` for fewer than 1."""
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}, expected 1 or more ({DEFAULT_REPEATS} or more for a figure to keep).")


def order_of(names: Sequence[T], n: int) -> list[T]:
    """The order in round `n`: every second round is reversed, and every two rounds start one case further.

    Three cases run in all six orders in six rounds; two run A B, B A, B A, A B.
    """
    begin = n // 2 % max(len(names), 1)
    turned = [*names[begin:], *names[:begin]]
    return turned[::-1] if n % 2 else turned


def reason_of(error: BaseException) -> str:
    """An error as one line: the first one if it has several, after its type, unless it is a `UserError`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) if isinstance(error, UserError) else ": ".join([type(error).__name__, *lines[:1]])
    return text[:MAX_REASON]


def _time(case: Case, clock: Callable[[], float]) -> tuple[float, float]:
    """The seconds of a run, and the CPU seconds of this process and its children."""
    case.before()
    others, own, start = cpu_of_children(), time.process_time(), clock()
    case.run()
    seconds, own = clock() - start, time.process_time() - own
    others = max(0.0, cpu_of_children() - others)
    case.after()
    return seconds, own + others


def cpu_of_children() -> float:
    """CPU seconds so far of this process's children, both running and waited for.

    Running children are known to 10 ms. Not counted: processes that nobody waits for, services that work for the bench,
    the kernel's threads (which write pages to a disk), and a GPU.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            spent += sum(child.cpu_times()[:4])  # its own, and those of its children that it waited for
    return spent


NO_DEVICE = "cpu"


def environment(device: str = NO_DEVICE) -> dict[str, Any]:
    """The environment as in a run directory, for torch's `device`, with more values that matter for benchmarks.

    These are memory_gib, load_average_1min (before the bench; more than 0 says that others use the cores too),
    threads (torch's on the host), libjpeg_turbo (Pillow's own), opencv-python (FFCV's encoder), and of a GPU cudnn (its
    version) and power_limit_w ("unknown" where nvidia-smi does not tell).
    """
    import torch

    from lowrank_vit.run.directory import environment as of_a_run

    result = of_a_run(torch.device(device))
    result["memory_gib"] = round(resources.memory().total / 2**30, 1)
    result["load_average_1min"] = round(os.getloadavg()[0], 2)
    result["threads"] = torch.get_num_threads()
    if torch.device(device).type == "cuda":
        result["cudnn"] = version_in_words(torch.backends.cudnn.version())
        result["power_limit_w"] = power_limit_w()
    result["libjpeg_turbo"] = str(features.version("libjpeg_turbo"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["opencv-python"] = metadata.version("opencv-python")
    return result


def version_in_words(number: int | None) -> str:
    """CuDNN's version number with dots: 91900 is 9.19.0. "unknown" for None."""
    if number is None:
        return "unknown"
    of_major = 10_000 if number >= 90_000 else 1000  # since cuDNN 9
    return f"{number // of_major}.{number % of_major // 100}.{number % 100}"


def power_limit_w(command: Sequence[str] = ("nvidia-smi",)) -> float | str:
    """The first card's power limit in watts; "unknown" if `command` or the card does not tell."""
    query = [*command, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return float(told.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "unknown"
