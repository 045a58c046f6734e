"""Means of the numbers of single matrices: by type of module, by depth, and over all blocks.

A key is "<kind>/<name>", see `refresh`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from lowrank_vit.spectral.measures.circuits import BlockCircuits, circuit_metrics
from lowrank_vit.spectral.select import module_depth, module_type

CIRCUIT = "circuit"
"""The part between the kind and the block's name in the key of a block's circuits."""
# Metrics of one recorded index each: not averaged over layers.
_ONE_OF_MANY = re.compile(r"(^sv|_[uv])(_last)?\d+$")
# Metrics that are often infinite or far above the rest, so that a mean says nothing.
_MEDIANS = ("turn_bound",)


def aggregates(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the layers of a type and over the matrices of a depth: by "spec/type/attn.qkv", "spec/depth/3".

    Metrics of single recorded indices are left out. A mean is over the finite values, NaN where there are none. For
    "turn_bound" it is the median, infinite values included.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for key, metrics in values.items():
        kind, _, name = key.partition("/")
        groups.setdefault(f"{kind}/type/{module_type(name)}", []).append(metrics)
        if depth := module_depth(name):
            groups.setdefault(f"{kind}/depth/{depth}", []).append(metrics)
    return {group: _means(members) for group, members in groups.items()}


def circuit_values(circuits: Mapping[str, BlockCircuits]) -> dict[str, dict[str, float]]:
    """`circuits.circuit_metrics` by key, and their means over all blocks by "<kind>/type/circuit"."""
    values = {key: circuit_metrics(one) for key, one in circuits.items()}
    kinds = dict.fromkeys(key.partition("/")[0] for key in circuits)
    for kind in kinds:
        members = [one for key, one in values.items() if key.startswith(f"{kind}/{CIRCUIT}/")]
        values[f"{kind}/type/{CIRCUIT}"] = _means([*members])
    return values


def _means(members: list[Mapping[str, float]]) -> dict[str, float]:
    metrics = dict.fromkeys(m for member in members for m in member if not _ONE_OF_MANY.search(m))
    means: dict[str, float] = {}
    for metric in metrics:
        found = np.array([member[metric] for member in members if metric in member])
        used, mean = (~np.isnan(found), np.median) if metric in _MEDIANS else (np.isfinite(found), np.mean)
        means[metric] = float(mean(found[used])) if used.any() else float("nan")
    return means
