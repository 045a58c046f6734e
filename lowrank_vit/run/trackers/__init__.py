"""Trackers: W&B, TensorBoard, trackio and MLflow, which get a copy of a run's numbers."""
