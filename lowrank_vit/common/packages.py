"""Packages that only some work needs: imported where they are needed, named with the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from lowrank_vit.common.begin import SCRIPT
from lowrank_vit.common.errors import UserError, in_short

NOT_INSTALLED = "is not installed"
_DISTRIBUTIONS = {
    "cv2": "opencv-python",
    "nvidia.dali": "nvidia-dali-cuda130",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
"""Names under which packages are installed, if they are imported under another."""


def needs(module: str, *, extra: str, to: str, instead: str = "") -> Any:
    """Import a module that not every installation has.

    Raises `UserError` if it is not installed, or if it cannot be imported, with the cause.

    Args:
        module: the module, with dots if it is inside a package: "pyarrow.parquet".
        extra: the extra of this project that brings it; empty for a package that none brings.
        to: what it is needed for, as the beginning of a sentence: "--lora", "Reading Hugging Face data sets".
        instead: what to do without it, as its end: "take csv".

    Example:
        >>> needs("absent", extra="lora", to="--lora")
        Traceback (most recent call last):
        lowrank_vit.common.errors.UserError: --lora needs the package absent, which is not installed: `pip install
        'lowrank-vit[lora]'`.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a package raises while it is imported
        why, remedy = _why(module, error), install_line(extra, module)
        if why != NOT_INSTALLED:
            remedy = f"mend that, or install it anew (`pip uninstall {distribution(module)}`, then {remedy})"
        alternative = f", or {instead}" if instead else ""
        raise UserError(
            f"{to} needs the package {distribution(module)}, which {why}: {remedy}{alternative}."
        ) from error


def why_missing(module: str) -> str:
    """Import a module and say why that fails, as a predicate ("is not installed"); empty if it does not."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return _why(module, error)
    return ""


def install_line(extra: str, module: str = "") -> str:
    """The command that installs an extra; without one, the package of a module. In backquotes, to be pasted."""
    return f"`pip install '{SCRIPT}[{extra}]'`" if extra else f"`pip install {distribution(module)}`"


def distribution(module: str) -> str:
    """The name under which the package of a module is installed."""
    return _DISTRIBUTIONS.get(root := _root(module), root)


def _root(module: str) -> str:
    """The top module of a module's package: nvidia.dali for nvidia.dali.fn."""
    shared = [name for name in _DISTRIBUTIONS if f"{module}.".startswith(f"{name}.")]
    return shared[0] if shared else module.partition(".")[0]


def _why(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{_root(module)}.".startswith(f"{error.name}."):
        return NOT_INSTALLED
    return f"is installed but cannot be imported ({in_short(error)})"
