"""Which images there are, and what their labels mean."""
