"""The speed of two commits, pair by pair: one process for each tree, of which only the one whose turn it is runs.

`make compare-speed A=main B=. [WHAT=loader]` runs rounds A B, B A, A B, ... of each case and prints the median of the
ratio B / A with its interval of 95 %. The exit code is 1 if an interval lies below 0.97. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import comb
from pathlib import Path
from statistics import median

from benchmarks.harness.sets import ensure_photos
from tests.golden import speed_worker
from tests.golden.compare import HOME, tree_of

NUM_PHOTOS, NUM_VALIDATED = 1000, 10
PAIRS, AS_FAST = 9, 0.97


class Worker:
    """A process that serves rounds of one case with the code of one tree; it is stopped between them."""

    def __init__(self, tree: Path, case: str, folder: Path) -> None:
        for name in ("photos", "jpeg", "raw"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(HOME / "sets" / name)
        self._log = folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, speed_worker.__file__, case], cwd=folder, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def round(self) -> float:
        """The figure of one round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"A worker ended with {self._process.wait()}; see {self._log}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Two of the ratios that hold the true median between them with a probability of 95 % or more.

    By order statistics (the sign test's interval), whatever the distribution; of fewer than six, the extremes.
    """
    n, ordered = len(ratios), sorted(ratios)
    outside = [2 * sum(comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = max((k for k, share in enumerate(outside, 1) if share <= 0.05), default=1)
    return ordered[k - 1], ordered[-k]


def main() -> None:
    """Measure the cases one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", metavar="A", help="a commit or a folder, the older")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"beginnings of {', '.join(speed_worker.CASES)}")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    trees = [tree_of(ref) for ref in (options.a, options.b)]
    _make_sets(trees[0])
    began, slower = time.monotonic(), list[str]()
    print(f"A is {trees[0]}, B is {trees[1]}; {options.pairs} pairs", flush=True)
    for case in speed_worker.CASES:
        if not options.only or case.startswith(tuple(options.only)):
            a, b = _rounds(trees, case, options.pairs)
            ratios = [y / x for x, y in zip(a, b, strict=True)]
            low, high = interval(ratios)
            if high < AS_FAST:
                slower.append(case)
            figures = f"{median(a):,.4g} and {median(b):,.4g} a second"
            print(f"{case}: B / A {median(ratios):.3f}, from {low:.3f} to {high:.3f}; {figures}", flush=True)
    print(f"slower: {', '.join(slower) or 'none'}, after {time.monotonic() - began:.0f} s")
    sys.exit(bool(slower))


def _rounds(trees: Sequence[Path], case: str, pairs: int) -> list[list[float]]:
    """The figures of A and of B, after a round of each that does not count."""
    shutil.rmtree(HOME / "speed", ignore_errors=True)
    figures: list[list[float]] = [[], []]
    with ExitStack() as stack:
        workers = list[Worker]()
        for tree, name in zip(trees, "ab", strict=True):
            workers.append(Worker(tree, case, HOME / "speed" / name))
            stack.callback(workers[-1].close)
            workers[-1].round()
        for n in range(pairs):
            for side in (0, 1) if n % 2 == 0 else (1, 0):
                figures[side].append(workers[side].round())
    return figures


def _make_sets(tree: Path) -> None:
    """Photographs, and their conversions by the older code, which both read."""
    sets = HOME / "sets"
    shutil.rmtree(sets, ignore_errors=True)
    for split, count in (("train", NUM_PHOTOS), ("val", NUM_VALIDATED)):
        source = ensure_photos(HOME / f"photos_{count}", count)
        (sets / "photos").mkdir(parents=True, exist_ok=True)
        (sets / "photos" / split).symlink_to(source)
        for name, flags in (("jpeg", []), ("raw", ["--raw", "128"])):
            (sets / name).mkdir(exist_ok=True)
            line = ["imagefolder", "--src", str(source), "--out", str(sets / name / f"{split}.beton"), *flags]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            subprocess.run(
                [sys.executable, "-m", "data_prep", *line], cwd=sets, env=environment, check=True, capture_output=True
            )


if __name__ == "__main__":
    main()
