"""Offline converters: image folders and archives to FFCV `.beton` files with a manifest beside each."""

from typing import TYPE_CHECKING

# First, before anything heavy: it makes this process a command, where it is one.
import lowrank_vit.common  # noqa: F401  # pyright: ignore[reportUnusedImport]

if TYPE_CHECKING:
    from data_prep.convert_rows import convert_dataset

__all__ = ["convert_dataset"]


def __getattr__(name: str) -> object:
    if name == "convert_dataset":
        from data_prep.convert_rows import convert_dataset  # what it needs takes a while to load

        return convert_dataset
    raise AttributeError(f"module data_prep has no attribute {name}")
