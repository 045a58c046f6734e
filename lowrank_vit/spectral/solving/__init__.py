"""Matrices to certified singular values and vectors."""
