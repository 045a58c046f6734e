"""Writing a .beton: workers, parts, resuming, finishing."""
