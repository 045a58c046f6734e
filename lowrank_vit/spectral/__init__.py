"""The spectral room: singular values of the weight matrices, watched while a model trains or read from a checkpoint."""
