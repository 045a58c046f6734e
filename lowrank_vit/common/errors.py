"""Errors meant for the person at the keyboard: one paragraph that names the thing and the next step."""

from __future__ import annotations

import difflib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable

from lowrank_vit.common.begin import INTERRUPTED
from lowrank_vit.common.terminal import (
    UNREAD,
    interruptible,
    is_unread,
    printable,
    uninterruptible,
    why_output_is_lost,
)


class UserError(ValueError):
    """Something the user can mend: a path, a flag, a file. Shown without a traceback by `exit_cleanly`."""


class BetonError(UserError):
    """A `.beton` file that is missing, foreign, unfinished, cut short or inconsistent."""

    sample_id: int | None = None
    """The id of the first wrong sample, if there is one."""


def in_short(error: BaseException) -> str:
    """The first sentence of a library's error, for quoting in our messages.

    It leaves out the place in the library's source, and the advice, which is meant for the library's own users.
    """
    first_line = str(error).strip().partition("\n")[0]
    return (
        re.split(r"[.!] (?=[A-Z])", re.sub(r"^\[[^]]*:\d+\] *", "", first_line))[0].rstrip(".") or type(error).__name__
    )


def did_you_mean(name: str, among: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known ones, each after `prefix`; empty if there are none.

    Case does not count; a name that begins or ends with this one is near, too.
    """
    plain = {other.casefold(): other for other in among if other}
    part = name.casefold()
    near = difflib.get_close_matches(part, plain, n=1, cutoff=0.8)
    if len(part) > 2:
        near += [other for other in plain if other.startswith(part)]
        near += [other for other in plain if other.endswith(f"-{part}")]
    near = list(dict.fromkeys(near)) or difflib.get_close_matches(part, plain, n=3)
    found = [prefix + plain[other] for other in near[:3]]
    return f" Did you mean {' or '.join(filter(None, (', '.join(found[:-1]), found[-1])))}?" if found else ""


_AGAIN_S = 600.0


class Failures:
    """Failures that do not end the run: the first is reported, and the first after each success; all are counted.

    A message is reported once in ten minutes at most: on a nearly full disk, small files succeed between large ones.
    """

    def __init__(self, what: str, say: Callable[[str], object]) -> None:
        """`what` describes them in the plural, such as "checkpoints could not be written"."""
        self._what, self._say, self._is_failing = what, say, False
        self._said_at = dict[str, float]()
        self.count = 0

    def note(self, message: str, count: int = 1) -> None:
        """Count `count` more; `message` gives the reason, and says that the run continues."""
        is_news, self._is_failing = not self._is_failing, True
        self.count += count
        now = time.monotonic()
        if is_news and now - self._said_at.get(message, -math.inf) >= _AGAIN_S:
            self._said_at[message] = now
            self._say(f"warning: {message}")

    def is_over(self) -> None:
        """Note a success."""
        self._is_failing = False

    def tell(self) -> None:
        """At the end of a run, say how many there were, if there were any."""
        if self.count:
            self._say(f"{self.count:,} {self._what}; the first was reported above")
        self.count = 0


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2.

    Ctrl-C becomes exit code 130. Notes added to the exception are shown. If the reader of its output is gone, a command
    that continues ends as usual, and one that raises `BrokenPipeError` ends with 141. A command whose only result is
    its output ends with 1 if that could not be written for another reason, such as a full disk.
    """
    try:
        try:
            interruptible()
            main()
        finally:
            uninterruptible()
    except UserError as error:
        print(f"error: {printable(error)}", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not is_unread():
            raise
        sys.exit(UNREAD)
    except KeyboardInterrupt as interrupt:
        print("interrupted", *_notes(interrupt), sep="\n", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as stop:  # a batch system's SIGTERM, or `sys.exit` of an argument parser
        print(*_notes(stop), sep="\n", end="\n" if _notes(stop) else "", file=sys.stderr)
        if not stop.code:
            _exit_if_output_is_lost()
        raise
    else:
        _exit_if_output_is_lost()


def _exit_if_output_is_lost() -> None:
    if why := why_output_is_lost():
        print(f"error: the output could not be written: {why}", file=sys.stderr)
        sys.exit(1)


def _notes(error: BaseException) -> list[str]:
    return [printable(note) for note in getattr(error, "__notes__", [])]
