"""The first moment of a command: from here on Ctrl-C ends it without a traceback, whatever is being imported.

It imports only what every Python has in memory, or next to it, since a Ctrl-C that comes earlier is Python's own.
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
    """Have Ctrl-C end this process at once, if it was started as one of the commands; whether it was.

    To be called while the first module of ours is being imported.
    """
    is_command = _is_command()
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, end_at_once)
    return is_command


def _is_command() -> bool:
    # While `python -m` looks for its module, and imports the packages that it is in, argv[0] is "-m".
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in words[:-1] else ""
    return module.partition(".")[0] in _PACKAGES or "/".join(sys.argv[:1]).rpartition("/")[2] == SCRIPT


def end_at_once(*_: object) -> None:
    """End this process as Ctrl-C does, without any clean-up; a handler of signals."""
    for descriptor, text in ((1, _SHOW_CURSOR * os.isatty(1)), (2, b"interrupted\n")):
        try:  # noqa: SIM105  # contextlib would take longer than all that is imported here
            os.write(descriptor, text)
        except OSError:
            pass
    os._exit(INTERRUPTED)
