"""Methods of truncation, one in each file: a function `weighting` of type `truncate.Method`."""

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
"""By the name on the command line."""
