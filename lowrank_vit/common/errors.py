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
    """The first sample that is wrong, where one is."""


def in_short(error: BaseException) -> str:
    """The first sentence of a library's error, which a message of ours may quote.

    Without the place in the library's source, and without its advice, which is meant for its own users.
    """
    first_line = str(error).strip().partition("\n")[0]
    return (
        re.split(r"[.!] (?=[A-Z])", re.sub(r"^\[[^]]*:\d+\] *", "", first_line))[0].rstrip(".") or type(error).__name__
    )


def did_you_mean(name: str, among: Iterable[str], prefix: str = "") -> str:
    """The end of a message about a name that is not among those that there are: the nearest ones, or nothing.

    Case does not count; a name that begins or ends with this one is near, too. They are shown behind `prefix`.
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
    """Failures of one kind, which end nothing: the first is said, and the first after each success; all are counted.

    The same words are said once in ten minutes: on a disk that is nearly full small files succeed between large ones.
    """

    def __init__(self, what: str, say: Callable[[str], object]) -> None:
        """`what` says in the plural what became of them, such as "checkpoints could not be written"."""
        self._what, self._say, self._is_failing = what, say, False
        self._said_at = dict[str, float]()
        self.count = 0

    def note(self, message: str, count: int = 1) -> None:
        """One more, or so many; `message` says why, and that nothing ends of it."""
        is_news, self._is_failing = not self._is_failing, True
        self.count += count
        now = time.monotonic()
        if is_news and now - self._said_at.get(message, -math.inf) >= _AGAIN_S:
            self._said_at[message] = now
            self._say(f"warning: {message}")

    def is_over(self) -> None:
        """It can be written again."""
        self._is_failing = False

    def tell(self) -> None:
        """Say how many there were, if there were any; the end of a run."""
        if self.count:
            self._say(f"{self.count:,} {self._what}, the first as was said")
        self.count = 0


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2.

    Ctrl-C becomes exit code 130. Notes added to the exception are shown. A command that goes on when the reader of its
    output is gone ends as it would have; one that raises `BrokenPipeError` then, with 141. One that makes nothing but
    its output ends with 1 where that could not be written for another reason, such as a full disk.
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
