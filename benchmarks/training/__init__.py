"""Benches of a training run: its step, the run with data, the spectral monitor, and its kernels."""
