"""Benches in processes, separate or shared, with a time limit that holds whatever a bench does."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import IO

from benchmarks.harness.measure import reason_of
from lowrank_vit.common.errors import UserError

GRACE_S = 15.0
"""Time for a bench that was told to end to remove its files."""
SHORT_GRACE_S = 2.0
"""The same if time is short; all measurements are on the disk already."""


def start_bench(arguments: Sequence[str], path: Path, limit_s: float) -> None:
    """Run `bench ARGUMENTS --json path` to its end. Raises `UserError` if it fails or is not done in `limit_s`."""
    run_limited([sys.executable, "-m", "benchmarks", *arguments, "--json", str(path)], limit_s)


def run_limited(command: Sequence[str], limit_s: float) -> None:
    """Run `command`; its stderr is passed on, but not its stdout (tables that the JSON has too).

    Raises `UserError` with the last line of stderr if the exit code is not 0, or if it had to be ended after `limit_s`.
    On Ctrl-C it ends the process first.
    """
    process, told = _started(command, subprocess.DEVNULL, subprocess.DEVNULL)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise UserError(_too_long(limit_s)) from None
    finally:
        end(process, GRACE_S)
        told.join()
    if code != 0:
        raise UserError(_why_ended(code, told.last))


class SharedProcess:
    """One process for several benches, one after the other, so that a model is compiled once for all of them.

    If a bench fails, the process stays. If it takes too long, ends the process or loses its GPU, the process is ended,
    even if it hangs outside of Python, and the next bench gets a new one.
    """

    def __init__(self, command: Sequence[str] | None = None, grace_s: float = SHORT_GRACE_S) -> None:
        """`command`: starts a process that calls `serve` (default: with the benches' own commands)."""
        self._command = command or [sys.executable, "-m", "benchmarks.shared"]
        self._grace_s = grace_s
        self._process: subprocess.Popen[str] | None = None

    def start_bench(self, arguments: Sequence[str], path: Path, limit_s: float) -> None:
        """As the function of that name, in the shared process."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process, self._told = _started(self._command, subprocess.PIPE, subprocess.PIPE)
            self._answers: queue.Queue[str] = queue.Queue()
            Thread(target=_collect, args=(self._process.stdout, self._answers), daemon=True).start()
        process, is_done = self._process, False
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has just ended, as its answer tells
                process.stdin.write(
                    json.dumps({"arguments": [*arguments, "--json", str(path)], "limit": limit_s}) + "\n"
                )
                process.stdin.flush()
            answer = json.loads(self._answers.get(timeout=limit_s) or "null")
            is_done = answer is not None and not answer["lost_gpu"]
        except queue.Empty:
            raise UserError(_too_long(limit_s)) from None
        finally:
            if not is_done:
                self._end()
        if answer is None:
            raise UserError(_why_ended(process.returncode, self._told.last))
        if reason := answer["failed"]:
            raise UserError(reason)

    def close(self) -> None:
        """Let the process close what it keeps open, and end it if that takes too long."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            self._end()

    def _end(self) -> None:
        """End the process at once, with all its children."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            end(self._process, self._grace_s)
            self._told.join()
            self._process = None

    def __enter__(self) -> SharedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(run: Callable[[list[str]], object]) -> None:
    """The loop of the shared process: run each bench named on standard input, and answer when it has ended.

    `run` takes a bench's arguments. If it hangs, the stack of every thread is printed when its time is over. If the GPU
    does not work any more, the loop ends.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tables that the JSON has too
    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["limit"], exit=False)
        failed = ""
        try:
            run(request["arguments"])
        except SystemExit as stop:
            failed = "" if stop.code in (None, 0) else _why_ended(stop.code, [])
        except Exception as error:
            traceback.print_exc()
            failed = reason_of(error)
        faulthandler.cancel_dump_traceback_later()
        is_lost = _has_lost_gpu()
        print(json.dumps({"failed": failed, "lost_gpu": is_lost}), file=answers, flush=True)
        if is_lost:
            return


def _has_lost_gpu() -> bool:
    """Whether all GPU calls of the process fail, as they do after an illegal memory access, for example."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class _Told:
    """Passes on the lines of a process, and keeps the last one."""

    def __init__(self, lines: IO[str]) -> None:
        self.last: deque[str] = deque(maxlen=1)
        self._thread = Thread(target=self._pass_on, args=(lines,), daemon=True)
        self._thread.start()

    def _pass_on(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                sys.stderr.write(line)
                if line.strip():
                    self.last.append(line.strip())

    def join(self) -> None:
        """Wait a moment for the remaining lines."""
        self._thread.join(1.0)


def _started(command: Sequence[str], stdin: int, stdout: int) -> tuple[subprocess.Popen[str], _Told]:
    # In its own session, so that its children (loaders' workers, compilers) can be ended with it.
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None
    return process, _Told(process.stderr)


def _collect(lines: IO[str], answers: queue.Queue[str]) -> None:
    with lines:
        for line in lines:
            answers.put(line)
    answers.put("")  # it has ended


def _too_long(limit_s: float) -> str:
    return f"ended after {limit_s:.0f} s, the time it was given."


def _why_ended(code: object, last: Sequence[str]) -> str:
    if isinstance(code, int) and code < 0:
        return f"killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}."
    return f"ended with code {code}{': ' if last else '.'}{''.join(last)}"


def end(process: subprocess.Popen[str], grace_s: float) -> None:
    """End a process, first politely, then with its whole session, which includes children of a finished process."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
