"""Regularisers of the loss that draw weights to low rank while they train: nuclear norm, stable rank, clipping."""
