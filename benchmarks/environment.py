"""What a benchmark's figures need beside them: commit, machine, versions."""

from __future__ import annotations

import contextlib
import os
from importlib import metadata
from typing import Any

from PIL import features

from lowrank_vit.common import resources

NO_DEVICE = "cpu"


def environment(device: str = NO_DEVICE) -> dict[str, Any]:
    """The run directory's environment of torch's `device`, and what weighs on benchmarks alone.

    These are memory_gib, load_average_1min (before the bench; more than 0 says that others use the cores too),
    libjpeg_turbo (Pillow's own) and opencv-python (FFCV's encoder).
    """
    import torch

    from lowrank_vit.run.directory import environment as of_a_run

    result = of_a_run(torch.device(device))
    result["memory_gib"] = round(resources.memory().total / 2**30, 1)
    result["load_average_1min"] = round(os.getloadavg()[0], 2)
    result["libjpeg_turbo"] = str(features.version("libjpeg_turbo"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["opencv-python"] = metadata.version("opencv-python")
    return result
