"""Methods of truncation, one a file, each a `weighting` of the shape `truncate.Method`."""

from __future__ import annotations

from lowrank_vit.lowrank.methods import asvd, fwsvd, kfac, svd, svdllm
from lowrank_vit.lowrank.truncate import Method

METHODS: dict[str, Method] = {
    "svd": svd.weighting,
    "asvd": asvd.weighting,
    "fwsvd": fwsvd.weighting,
    "svdllm": svdllm.weighting,
    "kfac": kfac.weighting,
}
"""By the name that the command line has for them."""
