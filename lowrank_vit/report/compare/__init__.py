"""Pages of several runs: the differences between them, compared with the spread over seeds."""
