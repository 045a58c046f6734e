"""The training loop, from configuration to the last update."""
