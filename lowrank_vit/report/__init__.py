"""Makes pictures and one self-contained HTML page of a run directory."""
