"""Refreshes while a model trains: the monitor, its worker, and what they store."""
