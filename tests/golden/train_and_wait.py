"""The training command of whatever tree is imported; each refresh of the spectra is over before the training goes on.

So none is left out for want of time, and none is under way when a checkpoint is written, which would then hold more.
`tests/golden/compare.py` starts it by its path, from a folder in which the tree is found first.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from typing import Any


def wait_for_each_refresh() -> None:
    """Have the monitor's `observe` return when the refresh that it has begun is over."""
    home = "lowrank_vit.spectral.watching"
    if importlib.util.find_spec(home) is None:  # so in earlier trees
        home = "lowrank_vit.spectral"
    monitor: Any = importlib.import_module(f"{home}.monitor").SpectralMonitor
    observe = monitor.observe

    def and_wait(self: Any, num_updates: int) -> None:
        observe(self, num_updates)
        self.wait()

    monitor.observe = and_wait


if __name__ == "__main__":
    del sys.path[0]  # this file's own folder
    wait_for_each_refresh()
    runpy.run_module("lowrank_vit.train", run_name="__main__", alter_sys=True)
