"""A process of one's own for work in Python that a thread could do, but not without the interpreter's lock.

A thread that computes in Python, or comes back from one numpy call after another, makes every other thread wait for the
lock each time, so the training thread asks the device for its operations late. What is sent to the process and back is
pickled; arrays travel beside that, through anonymous memory and in one call without the lock, whatever their number.
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
"""Where arrays begin, in bytes: numpy takes other ways for those that lie unaligned."""
_MOST_AT_ONCE = 512
"""Buffers of one system call; Linux takes up to 1,024."""
_PROGRAM = "import json, sys; sys.path = json.loads(sys.argv[1]); from lowrank_vit.common.aside import serve; serve()"
_PR_SET_PDEATHSIG = 1
_NOT_FOR_IT = (
    # A batch system tells all processes of a job; the run is to save.
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    # A terminal may stop a process in the background that writes a warning; who waits for it would wait for ever.
    *(signal.SIGTTOU, signal.SIGTSTP),
)
"""Signals that the process ignores."""


class NotStarted(RuntimeError):
    """There is no process aside, since it cannot be started or ended before it was asked: nothing was computed."""


class Aside:
    """Calls functions in another process, which is started with the first call and again after it was lost.

    It sees no GPU. It ends by `close`, and with the thread that has started it, thus with this process however that
    ends. Signals that are meant for the run, Ctrl-C among them, do not end it. One thread uses an object at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._talk: _Talk | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return self._process.pid if self._process else None

    def call(self, function: Callable[..., T], *args: Any, hear: Callable[[Any], object] | None = None) -> T:
        """Return `function(*args)`, a function of a module. With `hear` it is given another one before `args`.

        What it passes to that comes to `hear`, here, while it goes on; where `hear` raises, the process is ended.
        Raises what the function raises, `NotStarted`, and `RuntimeError` where the process is lost.
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
                # Imports take strings alone; -P: nothing is looked for where the run was started, unless it is here.
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
            return process.wait(0.2)  # one that has ended by itself tells how; one that waits ends now
        process.kill()
        return process.wait()


def _memory(name: str, opened: ExitStack) -> int:
    """The number of a new file in anonymous memory, which `opened` closes."""
    number = os.memfd_create(name)
    opened.callback(os.close, number)
    return number


class _Talk:
    """Objects sent to another process and back, their arrays in two pieces of anonymous memory.

    One with arrays is sent in each direction at a time; others may be on their way.
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
    """What a process calls at its beginning to get this signal when its parent's thread ends, however that ends.

    It can be a `preexec_fn`: what it needs is loaded here, before the fork.
    """
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getpid() != parent and os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), number)

    return ask


def serve() -> None:
    """The other process: do what is asked for until nobody is there to ask; its arguments are three open files."""
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
