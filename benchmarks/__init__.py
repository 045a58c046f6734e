"""Benchmarks: this project beside its peers, measured in one run. One module a bench, see `__main__.py`."""

# First, before anything heavy: it makes this process a command, where it is one.
import lowrank_vit.common  # noqa: F401  # pyright: ignore[reportUnusedImport]
