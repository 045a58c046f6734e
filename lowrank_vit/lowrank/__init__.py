"""Low rank: how many directions each layer needs, and models that have only those."""
