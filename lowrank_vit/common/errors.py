"""Errors meant for the person at the keyboard: one paragraph that names the thing and the next step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lowrank_vit.common.terminal import printable


class UserError(ValueError):
    """Something the user can mend: a path, a flag, a file. Shown without a traceback by `exit_cleanly`."""


class BetonError(UserError):
    """A `.beton` file that is missing, foreign, unfinished, cut short or inconsistent."""

    sample_id: int | None = None
    """The first sample that is wrong, where one is."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2.

    Ctrl-C becomes exit code 130, a reader of the output that went away 141. Notes added to the exception are shown.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {printable(error)}", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it exits
        sys.exit(141)
    except KeyboardInterrupt as interrupt:
        print("interrupted", *_notes(interrupt), sep="\n", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:  # a batch system's SIGTERM, or `sys.exit` of an argument parser
        print(*_notes(stop), sep="\n", end="\n" if _notes(stop) else "", file=sys.stderr)
        raise


def _notes(error: BaseException) -> list[str]:
    return [printable(note) for note in getattr(error, "__notes__", [])]
