"""What a run's log holds of its training becoming low-rank, as pictures and tables."""
