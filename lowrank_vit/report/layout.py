"""What the pictures of spectra share: which matrices stand where, and what stands above them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.read_run import Run
from lowrank_vit.report.style import INK, MUTED
from lowrank_vit.spectral.select import module_type

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar

MAX_TYPES = 6
"""Q, K, V apart and the three other types of a ViT."""


def by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    """Module names by type, in model order; of more than MAX_TYPES types those with the most modules."""
    types: dict[str, list[str]] = {}
    for name in modules:
        types.setdefault(module_type(name), []).append(name)
    # A picture with more columns could not be read; the report's table has every type.
    most = sorted(types, key=lambda kind: -len(types[kind]))[:MAX_TYPES]
    return {kind: names for kind, names in types.items() if kind in most}


def first_middle_last(names: list[str]) -> list[str]:
    """Three of them, or fewer where there are fewer."""
    return [names[i] for i in dict.fromkeys((0, len(names) // 2, len(names) - 1))]


def middle(names: list[str]) -> str:
    """The one half-way down."""
    return names[len(names) // 2]


def style_bar(bar: Colorbar, label: str) -> None:
    """A colour bar without a box, labelled in the usual ink."""
    bar.set_label(label, fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED)
    bar.outline.set_visible(False)


def moment(run: Run, update: int) -> str:
    """When something was measured: the update, or what the analysis was made of."""
    return run.moment or f"at update {update:,}"


def subtitle(run: Run, updates_T: np.ndarray) -> str:
    """The model and how many refreshes were made when."""
    model = f"{run.args['model']}  ·  " if run.args.get("model") else ""
    if len(updates_T) == 1:
        return model + moment(run, updates_T[0])
    return f"{model}{len(updates_T)} refreshes, updates {updates_T[0]:,} to {updates_T[-1]:,}"
