"""Background threads that keep their errors for whoever waits for them: one that makes items, one that does jobs.

Also a counter of long work's progress, increased in any thread, by which slow work is told from stuck work.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_counter = itertools.count(1)
_newest = 0


class Ahead(Iterator[T]):
    """Items of a generator that runs in a thread of its own, ahead of the consumer.

    The generator runs, and is closed, in that thread alone: `close` ends it by a `GeneratorExit` at its `yield`. Its
    exceptions are raised in place of the item that was asked for.
    """

    def __init__(self, items: Generator[T, None, None], depth: int, name: str) -> None:
        """Start the thread; `depth` items may wait, one more is made meanwhile."""
        self._items = items
        self._made: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room, self._is_closed, self._is_over = threading.Semaphore(depth), False, False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return self._made.qsize()

    def __next__(self) -> T:
        if self._is_over:
            raise StopIteration
        item = self._made.get()
        if isinstance(item, _End):
            self._is_over = True
            self._thread.join()
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread, whatever it is about to make, and wait for its end. A second call does nothing."""
        self._is_closed = self._is_over = True
        self._room.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            try:
                for item in self._items:
                    self._room.acquire()
                    if self._is_closed:
                        break
                    self._made.put(item)
                    del item  # else its memory is held until the next one is made
            finally:
                self._items.close()
            self._made.put(_End(None))
        except BaseException as error:
            self._made.put(_End(error))


class _End:
    """The end of a thread's items, and its error if there is one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Jobs(Generic[T]):
    """A daemon thread that does jobs one by one, in the order in which they were put.

    An exception of a job is passed to `failed`, in the thread, and the next job follows. An exception of `failed`,
    `begin` or `end` ends the thread, and is raised by `wait` and `close`. A job is dropped before the thread counts as
    idle, so that its memory is free then.
    """

    def __init__(
        self,
        do: Callable[[T], object],
        failed: Callable[[T, Exception], object],
        name: str,
        *,
        begin: Callable[[], object] | None = None,
        end: Callable[[], object] | None = None,
    ) -> None:
        """Start the thread and wait until `begin` was called in it; `end` is called in it when all jobs are done."""
        self._do, self._failed, self._begin, self._end = do, failed, begin, end
        self._jobs: queue.Queue[T | None] = queue.Queue()
        self._has_begun, self._is_closed = threading.Event(), False
        self._error: BaseException | None = None
        self._is_dead = False
        # A daemon, so that a crash of the main thread never waits for it.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        self._has_begun.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a job is running or waiting."""
        return self._jobs.unfinished_tasks > 0 and not self._is_dead

    def put(self, job: T) -> None:
        """Queue a job, which may not be None, after those that were put before.

        After an error that has ended the thread it is dropped: `wait` and `close` raise that error.
        """
        if not self._is_dead:
            self._jobs.put(job)

    def wait(self) -> None:
        """Wait until all jobs are done."""
        with self._jobs.all_tasks_done:
            while self._jobs.unfinished_tasks and not self._is_dead:
                self._jobs.all_tasks_done.wait()
        self._raise()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until all jobs are done and the thread has ended, or `timeout_s`. A second call does nothing new."""
        if not self._is_closed:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join(timeout_s)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            try:
                self._call(self._begin)
            finally:
                self._has_begun.set()
            while (job := self._jobs.get()) is not None:
                try:
                    self._do_one(job)
                finally:
                    job = None
                    self._jobs.task_done()
            self._call(self._end)
        except BaseException as error:
            self._error = error
        finally:
            self._give_up()

    def _do_one(self, job: T) -> None:
        try:
            try:
                self._do(job)
            except Exception as error:
                self._failed(job, error)
        except BaseException as error:
            self._error = error  # before anybody who waits is woken
            raise

    def _give_up(self) -> None:
        """Wake all who wait for jobs that will not be done."""
        with self._jobs.all_tasks_done:
            self._is_dead = True
            self._jobs.all_tasks_done.notify_all()

    @staticmethod
    def _call(function: Callable[[], Any] | None) -> None:
        if function is not None:
            function()


def beat() -> None:
    """Note that a piece of long work was done: an image converted, a block copied or written. From any thread."""
    global _newest
    _newest = next(_counter)


def beats() -> int:
    """How many pieces this process has done."""
    return _newest
