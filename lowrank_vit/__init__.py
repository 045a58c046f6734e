"""Train Vision Transformers at the speed of the data path and watch the spectra of their weights."""

import os

# OpenMP's threads spin while they wait for one another, which halts training on a CPU whose cores have anything else to
# do (measured: up to 20 times slower). libgomp itself spins only this often where it knows of more threads than cores;
# of other programs' threads it does not know. It reads this when torch is imported, so it stands here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
