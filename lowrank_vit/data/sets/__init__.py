"""Which files the flags mean: folders, archives, copies on a local disk, and the index of a .beton."""
