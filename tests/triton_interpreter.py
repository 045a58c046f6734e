"""Runs a test module in a process whose Triton interprets kernels on the CPU.

Triton decides when it is imported whether it interprets, hence another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def interpreted(module: str) -> dict[str, Any]:
    """What `python -m MODULE` prints in its last line, as JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
