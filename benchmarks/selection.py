"""What the bench `all` runs on which device: each bench's flags, its short form, and how long it may take.

The short forms are sized so that a round of every case lasts long enough to be timed (about half a second on a GPU,
whose compiled steps are warmed up for 20 iterations first) while all of them fit `BUDGET_MINUTES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BUDGET_MINUTES: Mapping[str, float] = {"cpu": 15, "cuda": 8}
"""All benches in their short form, by device, unless --budget says otherwise."""
LONGEST_S = 3600
"""Of a bench in its full form."""


@dataclass(frozen=True)
class Entry:
    """One bench of the programme."""

    bench: str
    """The command."""
    short: tuple[str, ...] = ()
    """Flags of the short form."""
    flags: tuple[str, ...] = ()
    """Flags of both forms."""
    expected_s: int = 60
    """How long the short form takes."""
    has_device: bool = True
    is_short: bool = True
    """Whether it is in the short form at all."""

    @property
    def limit_s(self) -> int:
        """After which the short form is ended: a busy machine and compiling take long, a bench that hangs for ever."""
        return 60 + 3 * self.expected_s


CPU: Mapping[str, Entry] = {
    # 4,000 images: with fewer, the fixed cost of starting FFCV's writer would flatter us.
    "prep": Entry("prep", ("--count", "4000"), expected_s=180, has_device=False),
    "loader": Entry("loader", ("--count", "1200"), expected_s=75),
    "augment": Entry("augment", ("--batches", "4"), expected_s=30),
    # A third of the layers for the inline SVD, which takes most of the time and the same for each layer.
    "spectral": Entry("spectral", ("--inline-layers", "4"), expected_s=140),
    "step": Entry("step", expected_s=60),
    "end-to-end": Entry("end-to-end", ("--count", "1200", "--steps", "20"), expected_s=120),
    "limits": Entry("limits", ("--count", "600"), expected_s=20),
    # Without memory, which takes a process a sample.
    "growth": Entry(
        "growth",
        ("--sweeps", "workers", "batch", "size", "samples", "width", "--count", "256", "--widths", "192", "384"),
        expected_s=90,
    ),
}
"""In this order. `expected_s` is of 2 cores without a GPU, reckoned from the speeds of the cases: 12 minutes in all,
and two more when the photographs are made for the first time."""

CUDA: Mapping[str, Entry] = {
    # The same photographs as end-to-end: making 4,096 takes half a minute.
    "loader": Entry("loader", ("--count", "4096", "-b", "256"), expected_s=75),
    "augment": Entry("augment", ("--batches", "60", "-b", "1024"), expected_s=65),
    "end-to-end": Entry("end-to-end", ("--count", "4096", "--steps", "20"), expected_s=60),
    "end-to-end-base": Entry(
        "end-to-end", ("--count", "4096", "--steps", "20"), ("--model", "vit_base_patch16_224"), expected_s=60
    ),
    # An inline SVD of a ViT-B takes tens of seconds on a GPU, one layer of the model and its EMA two.
    "spectral": Entry(
        "spectral",
        ("--models", "base", "--inline-layers", "1", "--step-batches", "256", "--steps", "30"),
        expected_s=75,
    ),
    "step": Entry("step", ("--steps", "20"), expected_s=60),
    "limits": Entry("limits", ("--count", "600"), expected_s=25),
    "prep": Entry("prep", ("--count", "4096"), expected_s=50, has_device=False),
    "growth": Entry("growth", is_short=False),
}
"""What has figures to reach comes first, since the budget may end before the last; the short form has no growth.

`expected_s` is an estimate for one H100 with 16 cores, not a measurement: about 10 s for each process to start, 30 s
for each step that is compiled for the first time, 5 s a round. It sums to 8 minutes; with a warm compile cache to
about 5.
"""

PROGRAMMES: Mapping[str, Mapping[str, Entry]] = {"cpu": CPU, "cuda": CUDA}
"""By type of device; the names are those of results and aims."""
NAMES = tuple(dict.fromkeys([*CPU, *CUDA]))
