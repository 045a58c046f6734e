"""Pictures and tables of a training that becomes low-rank, from the run's log."""
