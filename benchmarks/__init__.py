"""Benchmarks: this project beside its peers, measured in one run. Each bench is a module, see `__main__.py`."""

# First, before anything heavy: it sets up the process if it is a command.
import lowrank_vit.common  # noqa: F401  # pyright: ignore[reportUnusedImport]
