"""Low rank: how many singular directions each layer needs, and models that keep only those."""
