"""A separate process for Python work that would hold the interpreter's lock in a thread.

A thread that computes in Python, or comes back from one numpy call after another, makes every other thread wait for the
lock each time, so the training thread queues the device's operations late. Calls and results are pickled; their arrays
travel separately, through anonymous memory, in system calls for hundreds of arrays at a time, without the lock.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_TOLD, _DONE, _FAILED = "told", "done", "failed"
_ALIGNED = 64
"""Alignment of arrays in bytes: numpy uses other code for unaligned ones."""
_MOST_AT_ONCE = 512
"""Buffers of one system call; Linux takes up to 1,024."""
_PROGRAM = "import json, sys; sys.path = json.loads(sys.argv[1]); from lowrank_vit.common.aside import serve; serve()"
_PR_SET_PDEATHSIG = 1
_NOT_FOR_IT = (
    # A batch system signals all processes of a job; only the run itself has to save.
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    # A terminal may stop a background process that writes a warning; its caller would wait forever.
    *(signal.SIGTTOU, signal.SIGTSTP),
)
"""Signals that the process ignores."""


class NotStarted(RuntimeError):
    """The process cannot be started, or ended before its first call: nothing was computed."""


class Aside:
    """Calls functions in another process, which is started with the first call and again after it was lost.

    The process sees no GPU. It ends by `close`, and with the thread that started it, so also with this process, however
    that ends. Signals that are meant for the run, such as Ctrl-C, do not end it. One thread uses an object at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._talk: _Talk | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process; None if there is none."""
        return self._process.pid if self._process else None

    def call(self, function: Callable[..., T], *args: Any, hear: Callable[[Any], object] | None = None) -> T:
        """Return `function(*args)`, for a function of a module. With `hear` it gets a callback before `args`.

        Values that it passes to the callback reach `hear`, here, while it continues; if `hear` raises, the process is
        ended. Raises the function's exceptions, `NotStarted`, and `RuntimeError` if the process is lost.
        """
        if self._process is None or self._talk is None or self._process.poll() is not None:
            self.close()
            self._talk = self._start()
        talk = self._talk
        try:
            with self._told_if_lost():
                talk.send((function, args, hear is not None))
            while True:
                with self._told_if_lost():
                    kind, content = talk.receive()
                if kind == _DONE:
                    return content
                if kind == _FAILED:
                    break
                assert hear is not None
                hear(content)
        except BaseException:
            self.close()
            raise
        raise content

    @contextmanager
    def _told_if_lost(self) -> Generator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process that computes aside has ended (exit status {self.close()})") from error

    def _start(self) -> _Talk:
        """Start the process and wait until it can be asked. Raises `NotStarted`, with nothing left open."""
        try:
            with ExitStack() as opened:
                ours, theirs = (opened.enter_context(end) for end in Pipe())
                there, back = (_memory(name, opened) for name in ("aside-there", "aside-back"))
                # Imports take strings alone; -P: the working directory is searched only if it is among these entries.
                entries: list[Any] = [*sys.path]
                path = json.dumps([entry for entry in entries if isinstance(entry, str)])
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, path, *map(str, (theirs.fileno(), there, back))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), there, back),
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                    process_group=0,
                )
                theirs.close()
                talk = _Talk(ours, there, back)
                talk.receive()
                opened.pop_all()
                return talk
        except Exception as error:
            status = self.close()
            why = f"{type(error).__name__}: {error}" if status is None else f"it ended with exit status {status}"
            raise NotStarted(f"no process can be started that computes aside ({why})") from error

    def close(self) -> int | None:
        """End the process, whatever it does, and return its exit status; None where there was none."""
        process, talk = self._process, self._talk
        self._process = self._talk = None
        if talk:
            talk.close()
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)  # a process that has ended tells its status; an idle one ends now
        process.kill()
        return process.wait()


def _memory(name: str, opened: ExitStack) -> int:
    """The number of a new file in anonymous memory, which `opened` closes."""
    number = os.memfd_create(name)
    opened.callback(os.close, number)
    return number


class _Talk:
    """Objects sent to another process and back, their arrays in two pieces of anonymous memory.

    In each direction, only one object with arrays may be on its way at a time; others are not limited.
    """

    def __init__(self, pipe: Connection, there: int, back: int) -> None:
        self._pipe, self._there, self._back = pipe, there, back

    def send(self, content: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        padded = itertools.chain.from_iterable((one, memoryview(bytes(-one.nbytes % _ALIGNED))) for one in arrays)
        parts, offset = [part for part in padded if part.nbytes], 0
        while parts:
            written = os.pwritev(self._there, parts[:_MOST_AT_ONCE], offset)
            offset += written
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if written:
                parts[0] = parts[0][written:]
        self._pipe.send_bytes(np.array([one.nbytes for one in arrays], np.int64).tobytes())
        self._pipe.send_bytes(pickled)

    def receive(self) -> Any:
        sizes, pickled = np.frombuffer(self._pipe.recv_bytes(), np.int64), self._pipe.recv_bytes()
        starts = np.cumsum([0, *(sizes + -sizes % _ALIGNED)])
        whole = np.empty(int(starts[-1]), np.uint8)
        read = 0
        while read < whole.size:
            read += os.preadv(self._back, [whole.data[read:]], read)
        if read:
            os.ftruncate(self._back, 0)  # the memory is free again
        arrays = [whole[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]
        return pickle.loads(pickled, buffers=arrays)

    def close(self) -> None:
        self._pipe.close()
        os.close(self._there)
        os.close(self._back)


def signalled_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A function that a new process calls first, to get this signal when its parent's thread ends, however that ends.

    It can be a `preexec_fn`: libraries are loaded here, before the fork.
    """
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getpid() != parent and os.getppid() != parent:  # the parent has ended already
            os.kill(os.getpid(), number)

    return ask


def serve() -> None:
    """The main function of the other process: serve calls until the caller is gone. Arguments: three open files."""
    signalled_with_parent(signal.SIGKILL)()
    for number in _NOT_FOR_IT:
        signal.signal(number, signal.SIG_IGN)
    pipe, back, there = map(int, sys.argv[2:])
    talk = _Talk(Connection(pipe), there, back)
    talk.send((_DONE, None))  # from here on it can be asked
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                asked.put(talk.receive())
        os._exit(0)  # even out of a long computation

    threading.Thread(target=listen, daemon=True).start()
    while True:
        function, args, tells = asked.get()
        try:
            first = (lambda content: talk.send((_TOLD, content)),) if tells else ()
            talk.send((_DONE, function(*first, *args)))
        except Exception as error:
            talk.send((_FAILED, _picklable(error)))


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
