"""What `compress` has measured, as tables and pictures."""
