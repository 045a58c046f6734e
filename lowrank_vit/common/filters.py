"""Resampling filters by all their names: numbers in the plan, timm's and torch's words, Pillow's, DALI's."""

from __future__ import annotations

NEAREST, BILINEAR, BICUBIC = 0, 1, 2
"""The plan's numbers; rows of the tables below."""
FILTERS = {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
"""Numbers by timm's word, which is torch's and that of our flags."""
PIL_NAMES = ("NEAREST", "BILINEAR", "BICUBIC")
"""Members of `PIL.Image.Resampling`."""
DALI_NAMES = ("INTERP_NN", "INTERP_LINEAR", "INTERP_CUBIC")
"""Members of `nvidia.dali.types`; its linear and cubic filters are antialiased by default."""
