"""Turns a run directory into pictures and one self-contained HTML page."""
