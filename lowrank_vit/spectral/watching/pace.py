"""How long refreshes take: told before the first of many or large matrices, and again where it turns out otherwise."""

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
"""Operations of a whole refresh from which on it is timed and told; ViT-S with EMA has 3e10, some seconds of a core."""
_MOVED = 1e-3
"""By that share a matrix that is timed differs from what it is compared with."""
_OFF = 2.0
"""The first refresh is told where it took so many times longer, or shorter, than was foretold."""


def operations(shapes: Iterable[tuple[int, int]]) -> float:
    """Of whole spectra: Gram matrices L K^2 and tridiagonal forms 4/3 K^3, L the long side, K the short one."""
    return sum(max(shape) * min(shape) ** 2 + 4 / 3 * min(shape) ** 3 for shape in shapes)


def operations_of(stacks: Iterable[MatrixStack]) -> float:
    """`operations` of all matrices of stacks."""
    shapes = ((one.matrices_NRC.shape[1], one.matrices_NRC.shape[2], len(one.names)) for one in stacks)
    return sum(count * operations([(rows, cols)]) for rows, cols, count in shapes)


def foretold_s(groups: Iterable[tuple[MatrixStack, int]], settings: SpectralSettings) -> float:
    """About how long a whole refresh takes that has one before it: what a matrix of each shape does, added up.

    Of matrices on a GPU, which are solved together, it is what they take at most.

    Args:
        groups: a stack whose first matrix stands for so many.
        settings: those of the refreshes.
    """
    took_s: dict[tuple[int, int], float] = {}
    total_s = 0.0
    for stack, count in groups:
        shape = (stack.matrices_NRC.shape[1], stack.matrices_NRC.shape[2])
        if shape not in took_s:
            one, memory, of_one = some_of(stack, [0]), Memory(), replace(settings, cpu_threads=1)
            # The first time is another's before it. More is made then, too, which is kept: chance values, libraries.
            for factor in (1 + _MOVED, 1.0):
                moved = {MODEL: [replace(one, matrices_NRC=one.matrices_NRC * factor)]}
                start = now_s()
                refresh(0, moved, of_one, memory, log=lambda line: None)
                took_s[shape] = now_s() - start
        threads = 1 if cuda_path(stack.matrices_NRC) else settings.cpu_threads
        total_s += took_s[shape] * count / threads
    return total_s


class Pace:
    """What is said of a monitor's refreshes, each line once; nothing where all are short, or another rank says it."""

    def __init__(self, every: int, settings: SpectralSettings, say: Callable[[str], object] | None) -> None:
        """`say`: None for another rank."""
        self._every, self._settings, self._say = every, settings, say
        self._foretold_s: float | None = None
        self._has_begun = self._is_known = self._has_skipped = False

    def begin(self, stacks: Mapping[str, list[MatrixStack]]) -> None:
        """The first refresh begins, of these copies: say how long it and the others will take."""
        has_begun, self._has_begun = self._has_begun, True
        own = [one for kind, of in stacks.items() if kind != DIRECTION and not kind.endswith(FOR_HEADS) for one in of]
        if has_begun or self._say is None or operations_of(own) < LONG:
            return
        self._foretold_s = foretold_s(((one, len(one.names)) for one in own), self._settings)
        self._say(
            f"spectra: a whole refresh of {sum(len(one.names) for one in own):,} matrices takes about "
            f"{in_seconds(self._foretold_s)}, every {self._every:,} updates; training goes on meanwhile"
        )

    def end(self, seconds: float) -> None:
        """A whole refresh took so long: say so of the first, if it is not what was foretold."""
        foretold_s, is_known, self._is_known = self._foretold_s, self._is_known, True
        if foretold_s is None or self._say is None or is_known:
            return
        self._foretold_s = seconds
        if not foretold_s / _OFF <= seconds <= foretold_s * _OFF:
            self._say(f"spectra: the first refresh took {in_seconds(seconds)}, not {in_seconds(foretold_s)}")

    def skip(self, update: int, interval_s: float) -> None:
        """The refresh of an update is left out, so long after the one before was due: say what would help."""
        if self._foretold_s is None or self._say is None or self._has_skipped:
            return
        self._has_skipped = True
        taken_s = max(self._foretold_s, interval_s)
        enough = self._every * max(2, math.ceil(taken_s / max(interval_s, 1e-3)))
        self._say(
            f"spectra: the refresh of update {update:,} is skipped, since the one before is still running: it takes "
            f"about {in_seconds(taken_s)}, and {self._every:,} updates took {in_seconds(interval_s)}. --spec-every "
            f"{enough:,} leaves none out; fewer --spec-targets or more --spec-cpu-threads make it shorter"
        )


def in_seconds(seconds: float) -> str:
    """Two digits, in seconds, minutes or hours."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
