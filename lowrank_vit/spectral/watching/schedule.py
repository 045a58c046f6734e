"""When a refresh is due, and whether it computes the whole spectra or their first values alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.ends import is_large_enough
from lowrank_vit.spectral.solving.extremes import Solver

FULL_EVERY, FULL_EVERY_ON_CUDA = 2, 40
"""`SpectralSettings.full_every` at which one refresh of whole spectra costs about as much as the others until the next
one together: 1 + seconds of a whole refresh / seconds of one of the first values, rounded down.

Measured on one CPU core, ViT-B's four shapes with EMA: a whole refresh takes 1.5 times as long where 32 directions
stand out, 1.1 times with initial weights. The figure for a GPU is an estimate, not yet run: batched `eigh` of ViT-B's
matrices with EMA takes 0.77 s on an H100, products and factors of the first values about 20 ms.
"""


def usual_full_every(device: torch.device, solver: Solver, m: int, shapes: Iterable[Sequence[int]]) -> int:
    """The default of `SpectralSettings.full_every`: `FULL_EVERY` (`_ON_CUDA`), or 1 where that saves nothing.

    Args:
        device: where the spectra are computed.
        solver: `SpectralSettings.solver`.
        m: triplets wanted from each end.
        shapes: shapes of the watched matrices, without those of rank m or less, which are always solved whole.
    """
    if solver == "svd" or not any(is_large_enough(min(shape), m) for shape in shapes):
        return 1
    return FULL_EVERY_ON_CUDA if cuda_path(device) else FULL_EVERY


@dataclass
class Schedule:
    """At which updates a refresh is due; the answers are the same on every rank, and in a resumed run."""

    every: int
    """Updates between refreshes."""
    full_every: int = 1
    """One refresh in so many computes the whole spectra: at update 0, `every` * `full_every`, and so on."""
    last_update: int | None = None
    """The training's last update, if known."""
    taken: int | None = None
    """The update of the last refresh taken, by this process or an earlier one."""

    def is_due(self, update: int) -> bool:
        """Whether a refresh is due after so many updates."""
        return update % self.every == 0

    def is_last(self, update: int) -> bool:
        """Whether no refresh is due after this one."""
        return self.last_update is not None and self.last_update < update + self.every

    def take(self, update: int) -> bool:
        """Take the refresh of an update; return whether it must compute the whole spectra.

        The first and the last do, and those at multiples; where one of these was skipped, the next one taken does.
        """
        length, before, self.taken = self.every * self.full_every, self.taken, update
        return before is None or self.is_last(update) or update // length > before // length
