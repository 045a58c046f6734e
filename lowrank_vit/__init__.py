"""Train Vision Transformers at the speed of the data path and watch the spectra of their weights."""

__version__ = "0.1.0"
