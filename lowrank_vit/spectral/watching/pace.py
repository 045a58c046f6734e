"""How long refreshes take: an estimate before the first of many or large matrices, and a correction if it was off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from time import perf_counter as now_s

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.pieces import some_of
from lowrank_vit.spectral.solving.solve import MatrixStack
from lowrank_vit.spectral.watching.refresh import DIRECTION, FOR_HEADS, MODEL, Memory, SpectralSettings, refresh

LONG = 1e10
"""From so many operations on a whole refresh is timed and reported; ViT-S with EMA has 3e10, some seconds of a core."""
_MOVED = 1e-3
"""Relative change of the timed matrix between its two refreshes."""
_OFF = 2.0
"""The first refresh's time is reported if it is so many times longer or shorter than the estimate."""


def operations(shapes: Iterable[tuple[int, int]]) -> float:
    """Operations of whole spectra: Gram matrices L K^2, tridiagonal forms 4/3 K^3; L is the long side, K the short."""
    return sum(max(shape) * min(shape) ** 2 + 4 / 3 * min(shape) ** 3 for shape in shapes)


def operations_of(stacks: Iterable[MatrixStack]) -> float:
    """`operations` of all matrices of stacks."""
    shapes = ((one.matrices_NRC.shape[1], one.matrices_NRC.shape[2], len(one.names)) for one in stacks)
    return sum(count * operations([(rows, cols)]) for rows, cols, count in shapes)


def foretold_s(groups: Iterable[tuple[MatrixStack, int]], settings: SpectralSettings) -> float:
    """Estimated seconds of a whole refresh after the first: one matrix of each shape is timed and multiplied.

    For matrices on a GPU, which are solved together, it is an upper bound.

    Args:
        groups: pairs of a stack, of which the first matrix is timed, and the number of such matrices.
        settings: those of the refreshes.
    """
    took_s: dict[tuple[int, int], float] = {}
    total_s = 0.0
    for stack, count in groups:
        shape = (stack.matrices_NRC.shape[1], stack.matrices_NRC.shape[2])
        if shape not in took_s:
            one, memory, of_one = some_of(stack, [0]), Memory(), replace(settings, cpu_threads=1)
            # The first pass only gives the second one a refresh to compare with, and fills caches (chance values).
            for factor in (1 + _MOVED, 1.0):
                moved = {MODEL: [replace(one, matrices_NRC=one.matrices_NRC * factor)]}
                start = now_s()
                refresh(0, moved, of_one, memory, log=lambda line: None)
                took_s[shape] = now_s() - start
        threads = 1 if cuda_path(stack.matrices_NRC) else settings.cpu_threads
        total_s += took_s[shape] * count / threads
    return total_s


class Pace:
    """Reports the time of a monitor's refreshes, each line once; nothing if all are short."""

    def __init__(self, every: int, settings: SpectralSettings, say: Callable[[str], object] | None) -> None:
        """`say`: None on all ranks but the first."""
        self._every, self._settings, self._say = every, settings, say
        self._foretold_s: float | None = None
        self._has_begun = self._is_known = self._has_skipped = False

    def begin(self, stacks: Mapping[str, list[MatrixStack]]) -> None:
        """A refresh of these copies begins: before the first, report how long a whole refresh will take."""
        has_begun, self._has_begun = self._has_begun, True
        own = [one for kind, of in stacks.items() if kind != DIRECTION and not kind.endswith(FOR_HEADS) for one in of]
        if has_begun or self._say is None or operations_of(own) < LONG:
            return
        self._foretold_s = foretold_s(((one, len(one.names)) for one in own), self._settings)
        self._say(
            f"spectra: a whole refresh of {sum(len(one.names) for one in own):,} matrices takes about "
            f"{in_seconds(self._foretold_s)}, every {_updates(self._every)}; training goes on in the meantime"
        )

    def end(self, seconds: float) -> None:
        """A whole refresh took this long: report the first one's time if the estimate was off."""
        foretold_s, is_known, self._is_known = self._foretold_s, self._is_known, True
        if foretold_s is None or self._say is None or is_known:
            return
        self._foretold_s = seconds
        if not foretold_s / _OFF <= seconds <= foretold_s * _OFF:
            self._say(f"spectra: the first refresh took {in_seconds(seconds)}, not {in_seconds(foretold_s)}")

    def skip(self, update: int, interval_s: float) -> None:
        """The refresh of an update is skipped, `interval_s` after the one before was due: report what would help."""
        if self._foretold_s is None or self._say is None or self._has_skipped:
            return
        self._has_skipped = True
        taken_s = max(self._foretold_s, interval_s)
        enough = self._every * max(2, math.ceil(taken_s / max(interval_s, 1e-3)))
        self._say(
            f"spectra: the refresh of update {update:,} is skipped, since the one before is still running: it takes "
            f"about {in_seconds(taken_s)}, and the last {_updates(self._every)} took {in_seconds(interval_s)}. "
            f"--spec-every {enough:,} leaves none out; fewer --spec-targets or more --spec-cpu-threads make it shorter"
        )


def _updates(count: int) -> str:
    return "update" if count == 1 else f"{count:,} updates"


def in_seconds(seconds: float) -> str:
    """A duration with two digits, in seconds, minutes or hours."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
