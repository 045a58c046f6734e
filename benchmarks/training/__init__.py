"""Benches of a training run: its step, the run with data, the monitor beside it, its kernels."""
