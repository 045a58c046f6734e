"""What grows with the data and the world: costs of one rank on simulated sets, each in a process of its own."""
