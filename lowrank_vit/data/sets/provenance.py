"""Whether a set still holds its images' own pixels: remarks on its conversion for a reader of scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from data_prep.formats.jpeg import JPEG_REASONS
from data_prep.formats.sidecars import doubt_line
from data_prep.writing.workers import counts_in_words
from lowrank_vit.data.sets.beton import Beton

_UNCHANGED = ("passthrough", "repaired", "baseline")
"""Reasons of JPEGs whose pixels are the file's own."""


def remarks(beton: Beton, img_size: int, crop_pct: float) -> list[str]:
    """A line for each way in which scores on this set differ from scores on the images that it was made from.

    There are none for a set without a manifest, or for pixels that were raw from the start.
    """
    if not beton.manifest:
        return []
    doubts = [f"{beton.path.name}: {line}" for line in [doubt_line(beton.reasons)] if line]
    return [*doubts, *_changes(beton, beton.manifest.options, img_size, crop_pct)]


def _changes(beton: Beton, options: Mapping[str, object], img_size: int, crop_pct: float) -> list[str]:
    if side := options.get("raw"):
        return [f"{beton.path.name}: all images were cut to squares of {side} pixels when they were converted (--raw)"]
    reasons = Counter(beton.reasons)
    changed = beton.num_jpeg - sum(reasons[name] for name in _UNCHANGED)
    if changed <= 0:
        return []
    how = f"at quality {options.get('quality')}"
    if options.get("lossless"):
        known = {name: n for name, n in reasons.items() if name in JPEG_REASONS}
        counts = counts_in_words({**known, **({"too large": rest} if (rest := changed - sum(known.values())) else {})})
        return [f"{beton.path.name}: {changed:,} of {beton.num_samples:,} images were encoded again, {how} ({counts})"]
    counts = counts_in_words({name: n for name, n in reasons.items() if name not in _UNCHANGED})
    lines = [
        f"{beton.path.name}: {changed:,} of {beton.num_samples:,} images are not the original pixels: they were "
        f"encoded again, {how} ({counts}). `python -m data_prep imagefolder` keeps them in validation sets (any with "
        "--lossless), and so does giving the folder of images itself"
    ]
    max_side, short_side = options.get("max_side"), int(img_size / crop_pct)
    too_small = 0
    for block in beton.blocks() if reasons["resized"] else ():
        sides = np.stack([block["heights"], block["widths"]])
        too_small += int(((sides.max(0) == max_side) & (sides.min(0) < short_side)).sum())
    if too_small:
        lines.append(
            f"{beton.path.name}: {too_small:,} of {beton.num_samples:,} images were made smaller when they were "
            f"converted (--max-side {max_side}) and are now enlarged: --img-size {img_size} needs a short side of "
            f"{short_side} pixels"
        )
    return lines
