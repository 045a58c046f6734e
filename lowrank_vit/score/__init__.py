"""Scores and predictions of a model."""
