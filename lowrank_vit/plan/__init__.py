"""Everything random about the data, drawn ahead of time."""
