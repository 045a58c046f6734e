"""Layers of a training put in factors on the way: when, of which rank, and what becomes of the optimizer."""
