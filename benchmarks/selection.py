"""The benches that `all` runs on a CPU and on a GPU: their order, sizes and time limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

BUDGET_MINUTES: Mapping[str, float] = {"cpu": 15, "cuda": 3.6}
"""Minutes for all benches in their short form, by device, unless --budget is given."""
LONGEST_S = 3600
"""Time limit of a bench in its full form."""


@dataclass(frozen=True)
class Entry:
    """One bench of the selection."""

    bench: str
    """The command."""
    short: tuple[str, ...] = ()
    """Flags of the short form."""
    flags: tuple[str, ...] = ()
    """Flags of both forms."""
    expected_s: int = 60
    """Expected seconds of the short form."""
    has_device: bool = True
    is_short: bool = True
    """Whether the short form includes it."""
    is_profile: bool = False
    """Whether the short form includes it only with --profile."""
    tiny: tuple[str, ...] | None = None
    """Flags of the rehearsal; None: the rehearsal leaves it out."""
    shares: bool = False
    """Whether its short form runs in the shared process."""
    longest_s: int | None = None
    """Time limit of the short form, if it is known better than from `expected_s`."""

    @property
    def limit_s(self) -> int:
        """Time limit of the short form in seconds; generous, for busy machines and compilation, but it ends a hang."""
        return self.longest_s or 60 + 3 * self.expected_s


SCALE = ("sets", "files", "classes", "ranks", "shards")
"""Axes of the bench `growth` that need simulated sets; they take too long for the short form."""
CPU: Mapping[str, Entry] = {
    # 4,000 images: with fewer, the fixed cost of starting FFCV's writer would flatter us.
    "prep": Entry("prep", ("--count", "4000"), expected_s=180, has_device=False),
    "loader": Entry("loader", ("--count", "1200"), expected_s=75),
    "augment": Entry("augment", ("--batches", "4"), expected_s=30),
    "spectral": Entry("spectral", expected_s=140),
    "step": Entry("step", expected_s=150),
    "end-to-end": Entry("end-to-end", ("--count", "1200", "--steps", "20"), expected_s=120),
    "limits": Entry("limits", ("--count", "600"), expected_s=20),
    # Without memory, which needs a process for each sample.
    "growth": Entry(
        "growth",
        ("--sweeps", "workers", "batch", "size", "samples", "width", "--count", "256", "--widths", "192", "384"),
        flags=("--sweeps", "workers", "batch", "size", "samples", "memory", "width"),
        expected_s=90,
    ),
    "scale": Entry("growth", flags=("--sweeps", *SCALE), has_device=False, is_short=False),
}
"""In this order. `expected_s` is for 2 cores without a GPU, estimated from the cases' speeds: 12 minutes in all, and
two
more when the photographs are made for the first time."""

_TINY = (
    *("--model", "test_vit", "--img-size", "32", "-b", "4", "--steps", "10", "--count", "24"),
    *("--workers", "1", "--loader", "ffcv"),
)
"""A run of timm's smallest model, which the rehearsal uses instead of ViT-S and ViT-B."""


def _of_run(figure: str, model: str, expected_s: int, longest_s: int, *more: str, is_profile: bool = False) -> Entry:
    """A figure of the bench `training`; all figures of a model have the same options, so they share its run."""
    run = ("--count", str(PHOTOS), "--steps", str(STEPS), "--model", f"vit_{model}_patch16_224")
    return Entry(
        "training",
        short=(*run, *more),
        flags=("--figure", figure),
        expected_s=expected_s,
        longest_s=longest_s,
        is_profile=is_profile,
        tiny=(*_TINY, *(("--augment-batch", "8", "--augment-batches", "2") if figure == "augment" else ())),
        shares=True,
    )


def _of_step(*flags: str, expected_s: int) -> Entry:
    """Our compiled ViT-S step beside variants of it, if requested."""
    return Entry("step", flags=("--ours-only", *flags), expected_s=expected_s, is_short=False)


PHOTOS = 1024
"""Photographs of the short form on a GPU."""
STEPS = 20
"""Steps of a round with data."""
_TIMES = "8"

CUDA: Mapping[str, Entry] = {
    # Each model's first figure makes the run and compiles both steps: 23 to 30 s each on an H100, and the limit allows
    # twice that. With --only any figure may be the first, so the others have time to compile, too.
    "step": _of_run("step", "small", 70, 120),
    "end-to-end": _of_run("end-to-end", "small", 20, 90),
    "monitor": _of_run("monitor", "small", 15, 90, "--step-steps", "30"),
    "step-base": _of_run("step", "base", 63, 120, "--step-steps", "10"),
    "end-to-end-base": _of_run("end-to-end", "base", 20, 90, "--without-decoder"),
    # The best mode, form and batch size: only ours, in the full form or by --only, since each compiles anew.
    "reduce-overhead": _of_step("--modes", "reduce-overhead", expected_s=80),
    "batch-512": _of_step("-b", "512", expected_s=50),
    # The step on the default stream, after the batches that are prepared for it.
    "end-to-end-unwatched": replace(
        _of_run("end-to-end", "small", 70, 120), flags=("--figure", "end-to-end", "--no-spec-monitor"), is_short=False
    ),
    "parts": _of_step("--parts", expected_s=150),
    "max-autotune": _of_step("--modes", "max-autotune", expected_s=200),
    "loader": Entry(
        "loader",
        (
            *("--count", str(PHOTOS), "--times", _TIMES, "-b", "256"),
            *("--cases", "dali_gpu", "resident", "resident_256px", "dali_gpu_400px", "gpu_decode_limit", "copy_limit"),
            "dali_gpu_repeated_colours",
        ),
        expected_s=17,
        longest_s=60,
        tiny=(
            *("--count", "24", "-b", "4", "--img-size", "32", "--workers", "1", "--times", "2"),
            *("--cases", "ffcv", "resident", "copy_limit"),
        ),
        shares=True,
    ),
    "augment": _of_run("augment", "small", 10, 90),
    # Both steps are those of the figure `step`, if it was measured in the same process.
    "kernels": _of_run("kernels", "small", 20, 100, is_profile=True),
    "kernels-base": _of_run("kernels", "base", 25, 120, is_profile=True),
    # An inline SVD of a ViT-B takes tens of seconds on a GPU, one layer of the model and its EMA two.
    "spectral": Entry(
        "spectral", (*("--models", "base", "--inline-layers", "1"), "--step-batches", "256"), is_short=False
    ),
    "limits": Entry("limits", is_short=False),
    "prep": Entry("prep", has_device=False, is_short=False),
    "growth": Entry(
        "growth", flags=("--sweeps", "workers", "batch", "size", "samples", "memory", "width"), is_short=False
    ),
}
"""The most valuable first, ViT-S before ViT-B, since the time may end before the last.

`expected_s` is an estimate for one H100 with 16 cores from the times in docs/benchmarks/h100.md, not a measurement.
"""

SELECTIONS: Mapping[str, Mapping[str, Entry]] = {"cpu": CPU, "cuda": CUDA}
"""By type of device; results and aims use the same names."""
NAMES = tuple(dict.fromkeys([*CPU, *CUDA]))
