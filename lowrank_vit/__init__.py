"""Train Vision Transformers at the speed of the data path and watch the spectra of their weights.

The names of `__all__` are what a notebook or another training loop imports; each is loaded when it is first asked for.
"""

from lowrank_vit.common.begin import begin

_is_command = begin()  # before anything else is imported
# ruff: noqa: E402
# isort: split
import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_vit.augment.pipeline import Augment
    from lowrank_vit.data.choose import open_loader
    from lowrank_vit.data.sets.beton import Beton
    from lowrank_vit.plan.plans import EvalPlan, TrainPlan
    from lowrank_vit.spectral.watching.monitor import SpectralMonitor
    from lowrank_vit.spectral.watching.refresh import SpectralSettings
    from lowrank_vit.spectral.watching.stored import open_spectra

# OpenMP's threads spin while they wait for one another, which slows training down on a CPU whose cores have other work
# (measured: up to 20 times). libgomp itself spins only this often if it has more threads than cores, but it does not
# know other programs' threads. It reads this variable when torch is imported, so it is set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# A command's imports take seconds, in which the reader of its output may go away.
if _is_command:
    from lowrank_vit.common.terminal import begin_program

    begin_program()

__version__ = "0.1.0"
__all__ = [
    "Augment",
    "Beton",
    "EvalPlan",
    "SpectralMonitor",
    "SpectralSettings",
    "TrainPlan",
    "__version__",
    "open_loader",
    "open_spectra",
]

_PLACES = {
    "Augment": "augment.pipeline",
    "Beton": "data.sets.beton",
    "EvalPlan": "plan.plans",
    "SpectralMonitor": "spectral.watching.monitor",
    "SpectralSettings": "spectral.watching.refresh",
    "TrainPlan": "plan.plans",
    "open_loader": "data.choose",
    "open_spectra": "spectral.watching.stored",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
