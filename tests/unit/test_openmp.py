"""OpenMP's waiting is settled before torch reads it, and the user's own settings stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LIBGOMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_libgomp_spins_a_little(given, spin_count):
    """As libgomp itself tells when it is loaded: by torch, or alone, which takes no seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **given}
    alone = f"import lowrank_vit, ctypes; ctypes.CDLL({str(LIBGOMP)!r})"
    command = [sys.executable, "-c", alone if given else "import lowrank_vit.common.devices"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    counts = [line.partition("=")[2].strip(" '") for line in told.splitlines() if "GOMP_SPINCOUNT" in line]
    assert counts == [spin_count]
