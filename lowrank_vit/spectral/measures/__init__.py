"""Singular values and vectors to numbers with what they are compared to."""
