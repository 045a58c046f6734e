"""Benchmarks: this project beside its peers, measured in one run. One module a bench, see `__main__.py`."""
