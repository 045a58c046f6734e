"""The first moment of a command: from here on Ctrl-C ends it without a traceback, whatever is being imported.

It imports only modules that Python has loaded anyway, or small ones, since Python itself handles an earlier Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys

SCRIPT = "lowrank-vit"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_PACKAGES = ("lowrank_vit", "data_prep", "benchmarks")
_SHOW_CURSOR = b"\x1b[?25h"


def begin() -> bool:
    """Make Ctrl-C end this process at once, if it was started as one of the commands; return whether it was.

    Call it while our first module is being imported.
    """
    is_command = _is_command()
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, end_at_once)
    return is_command


def _is_command() -> bool:
    # While `python -m` looks for its module, and imports the packages that it is in, argv[0] is "-m".
    module = _module(sys.orig_argv[1:]) if sys.argv[:1] == ["-m"] else ""
    return module.partition(".")[0] in _PACKAGES or "/".join(sys.argv[:1]).rpartition("/")[2] == SCRIPT


def _module(words: list[str]) -> str:
    """The module that Python's own options name: -m MODULE, -mMODULE, -um MODULE and -X dev -m MODULE among others."""
    left = iter(words)
    for word in left:
        if word.startswith("--"):
            next(left, "")  # --check-hash-based-pycs WHEN is the only one beside -m
            continue
        for n, letter in enumerate(word):
            behind = word[n + 1 :]
            if letter == "m":
                return behind or next(left, "")
            if letter in "WX":
                if not behind:
                    next(left, "")
                break
    return ""


def end_at_once(*_: object) -> None:
    """End this process as Ctrl-C does, without any clean-up; a handler of signals."""
    for descriptor, text in ((1, _SHOW_CURSOR * os.isatty(1)), (2, b"interrupted\n")):
        try:  # noqa: SIM105  # contextlib would take longer than all that is imported here
            os.write(descriptor, text)
        except OSError:
            pass
    os._exit(INTERRUPTED)
