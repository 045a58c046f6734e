"""Pages of several runs: what differs between them, and what their seeds alone make of it."""
