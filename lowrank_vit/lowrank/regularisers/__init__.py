"""Regularisers that pull weights towards low rank during training: nuclear norm, stable rank, clipping."""
