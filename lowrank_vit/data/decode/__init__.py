"""The decode backends: ffcv, dali and resident."""
