"""Model, optimizer, training step, evaluation, checkpoints and the loop that joins them."""
