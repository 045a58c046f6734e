"""Layers factorised during a training: when, of which rank, and what becomes of the optimizer."""
