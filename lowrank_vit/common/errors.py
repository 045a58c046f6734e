"""Errors meant for the person at the keyboard: one paragraph that names the thing and the next step."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lowrank_vit.common.terminal import INTERRUPTED, UNREAD, interruptible, is_unread, printable, uninterruptible


class UserError(ValueError):
    """Something the user can mend: a path, a flag, a file. Shown without a traceback by `exit_cleanly`."""


class BetonError(UserError):
    """A `.beton` file that is missing, foreign, unfinished, cut short or inconsistent."""

    sample_id: int | None = None
    """The first sample that is wrong, where one is."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2.

    Ctrl-C becomes exit code 130. Notes added to the exception are shown. A command that goes on when the reader of its
    output is gone ends as it would have; one that raises `BrokenPipeError` then, with 141.
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
        raise


def _notes(error: BaseException) -> list[str]:
    return [printable(note) for note in getattr(error, "__notes__", [])]
