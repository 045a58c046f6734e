"""Offline converters: image folders and archives to FFCV `.beton` files with a manifest beside each."""

# First, before anything heavy: it makes this process a command, where it is one.
import lowrank_vit.common  # noqa: F401  # pyright: ignore[reportUnusedImport]
