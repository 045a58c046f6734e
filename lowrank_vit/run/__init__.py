"""The run directory, and all that is written or shown while training."""
