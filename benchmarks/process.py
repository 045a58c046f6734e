"""One bench in a process of its own: heard while it runs, ended with all its children when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import IO

from lowrank_vit.common.errors import UserError

GRACE_S = 15.0
"""For a bench that was told to end, to remove its files."""


def start_bench(arguments: Sequence[str], path: Path, limit_s: float) -> None:
    """Run `bench ARGUMENTS --json path` to its end. Raises `UserError` if it fails or is not done in `limit_s`."""
    run_limited([sys.executable, "-m", "benchmarks", *arguments, "--json", str(path)], limit_s)


def run_limited(command: Sequence[str], limit_s: float) -> None:
    """Run `command`; its stderr is passed on, its stdout (tables that the JSON has too) is not.

    Raises `UserError` with the last line of stderr if it ends with another code than 0, or if it had to be ended after
    `limit_s`. Interrupted, it ends the process first.
    """
    # A session of its own, so that its children (loaders' workers, compilers) can be ended with it.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True, errors="replace"
    )
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=1)
    listener = Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
    listener.start()
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise UserError(f"ended after {limit_s:.0f} s, the time it was given.") from None
    finally:
        _end(process)
        listener.join(1.0)
    if code < 0:
        raise UserError(f"killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}.")
    if code != 0:
        raise UserError(f"ended with code {code}{': ' if last else '.'}{''.join(last)}")


def _pass_on(lines: IO[str], last: deque[str]) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(line)
            if line.strip():
                last.append(line.strip())


def _end(process: subprocess.Popen[str]) -> None:
    """Politely, then the whole session: also what a process that is done has left running."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
