"""The measurements of `compress` as tables and pictures."""
