"""Offline converters: image folders and archives to FFCV `.beton` files with a manifest beside each."""

from typing import TYPE_CHECKING

# First, before heavy imports: if this process is a command, it sets up how Ctrl-C and a closed output end it.
import lowrank_vit.common  # noqa: F401  # pyright: ignore[reportUnusedImport]

if TYPE_CHECKING:
    from data_prep.convert_rows import convert_dataset

__all__ = ["convert_dataset"]


def __getattr__(name: str) -> object:
    if name == "convert_dataset":
        from data_prep.convert_rows import convert_dataset  # on demand, because it is slow to load

        return convert_dataset
    raise AttributeError(f"module data_prep has no attribute {name}")
