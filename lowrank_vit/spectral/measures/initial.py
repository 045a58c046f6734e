"""Find, report and redraw single outliers of fresh weights, which would dominate the matrix's spectrum.

timm's truncated normal is the inverse error function of a uniform number. Where that is -1 or 1 in float32, the entry
becomes its bound, -2 or 2: a hundred standard deviations of 0.02. This happens to about one entry in ten million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FAR = 10.0
"""How many standard deviations from the median an entry must be to count."""
_SAMPLE = 1 << 16
"""Number of entries from which median and deviation are estimated."""
_MIN_ENTRIES = 64
"""Fewer entries tell too little about the deviation."""
_MAX_SHARE = 1e-3
"""With a greater share far out the distribution has a heavy tail, and no entry is a single outlier."""
_SHOWN = 4


class FarEntry(NamedTuple):
    """An entry far from its matrix's median."""

    at: tuple[int, ...]
    """Its indices, from 0: row and column, or all four of a convolution's weight."""
    value: float
    deviations: float
    """Its distance from the median in standard deviations."""

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {"at": list(self.at), "value": self.value, "deviations": self.deviations}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> FarEntry:
        """The inverse of `content`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        at = tuple(int(i) for i in content["at"])
        return cls(at, float(content["value"]), float(content["deviations"]))


def far_entries(weight: Tensor) -> list[FarEntry]:
    """The single entries more than `FAR` standard deviations from the median, in order of their places.

    The deviation is robust: 1.4826 times the median distance from the median (exact for a normal distribution). The
    list is empty where the deviation is 0, where an entry is not finite, and with too few entries or too many far ones.
    Waits for the weight's device.
    """
    values = weight.detach()
    count = values.numel()
    if count < _MIN_ENTRIES or not values.is_floating_point():
        return []
    values = values.float() if values.element_size() < 4 else values
    middle, deviation = _bulk(values)
    if not deviation > 0 or not bool(values.isfinite().all()):
        return []
    places = ((values - middle).abs() > FAR * deviation).nonzero().cpu()
    if len(places) > max(8, _MAX_SHARE * count):
        return []
    found = [(tuple(place), float(values[tuple(place)])) for place in places.tolist()]
    return [FarEntry(at, value, abs(value - middle) / deviation) for at, value in found]


def far_entries_by_name(weights: Mapping[str, Tensor]) -> dict[str, list[FarEntry]]:
    """`far_entries` by name, of the matrices that have any."""
    return {name: found for name, weight in weights.items() if (found := far_entries(weight))}


def redraw_far_entries(model: nn.Module, seed: int) -> dict[str, list[FarEntry]]:
    """Redraw the far entries of fresh parameters in place; return the old ones by parameter.

    New entries are normal with the parameter's median and robust deviation, from a generator seeded with `seed`: the
    same weights and seed give the same entries. Vectors and scalars are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    found = far_entries_by_name({name: p for name, p in model.named_parameters() if p.ndim > 1})
    with torch.no_grad():
        for name, entries in found.items():
            parameter = model.get_parameter(name)
            middle, deviation = _bulk(parameter.float())
            for entry in entries:
                parameter[entry.at] = middle + deviation * float(torch.randn((), generator=generator))
    return found


def in_words(
    found: Mapping[str, Sequence[FarEntry]],
    one: str = "{name}[{at}] = {value:.4g} ({deviations:.0f} standard deviations)",
    more: str = " and {n} more",
) -> str:
    """The far entries in words, the farthest first: "head[1, 2] = -2 (100 standard deviations)".

    `one` formats an entry, `more` the number of entries that are not listed.
    """
    farthest = sorted(
        ((e, name) for name, entries in found.items() for e in entries), key=lambda pair: -pair[0].deviations
    )
    shown = [
        one.format(name=name, at=", ".join(map(str, e.at)), value=e.value, deviations=e.deviations)
        for e, name in farthest[:_SHOWN]
    ]
    left = len(farthest) - len(shown)
    return ", ".join(shown) + (more.format(n=left) if left else "")


def warning_of(found: Mapping[str, Sequence[FarEntry]]) -> str:
    """The warning about spectra of matrices with far entries."""
    return (
        f"single entries stand far out: {in_words(found)}. They alone may decide sigma_max, stable rank and cosines "
        "of these matrices"
    )


def _bulk(values: Tensor) -> tuple[float, float]:
    """Median and robust standard deviation of up to `_SAMPLE` entries."""
    flat = values.detach().reshape(-1)
    some = flat[:: flat.numel() // _SAMPLE | 1].double()  # an odd step does not stay in a few of the columns
    middle = some.median()
    return float(middle), 1.4826 * float((some - middle).abs().median())
