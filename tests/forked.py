"""Processes forked from one that has imported the training, in place of ones that import it (6 s of a core each)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
_IMPORTED = ["lowrank_vit.training.trainer", "lowrank_vit.validate", "lowrank_vit.inference", "torch.distributed.run"]
NOTHING: Mapping[str, str] = MappingProxyType({})
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


class Forked:
    """What `subprocess.Popen` is for a command, for a function that is called in a forked process."""

    def __init__(self, call: Callable[..., object], *given: object, environment: Mapping[str, str] = NOTHING):
        """Start it, with its output and errors in pipes of text. What is called and given can be pickled."""
        with pytest.MonkeyPatch.context() as patch:  # the process that all are forked from begins with the first
            for name, value in _ENVIRONMENT.items():
                patch.setenv(name, value)
            pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
            written = [end for _, end in pipes]
            self._process = _CONTEXT.Process(target=_call, args=(*written, dict(environment), call, given))
            self._process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end, _ in pipes)
        for end in sum(pipes, ()):
            end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; a signal's number, negative, if that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """End it by SIGKILL, and wait for that; what it wrote is not read."""
        self._process.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it and its children wrote, once all have closed their output; and it has ended by then."""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            both = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                out, err = (one.result(timeout) for one in both)
            finally:
                if not all(one.done() for one in both):
                    self._process.kill()
        self._process.join(timeout)
        return out, err


def _call(out: Connection, err: Connection, environment: dict[str, str], call: Callable[..., object], given) -> None:
    for end, number in ((out, 1), (err, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.environ.update(environment)
    sys.path[0:0] = [str(ROOT)]
    call(*given)


def torchrun(*arguments: str) -> None:
    """`torchrun --standalone`, whose ranks are forked from it."""
    from torch.distributed.run import main

    main(["--standalone", "--start-method=fork", *arguments])
