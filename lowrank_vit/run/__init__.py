"""The run directory, and everything that is written or shown during training."""
