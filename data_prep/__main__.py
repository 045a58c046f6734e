"""Convert images to FFCV .beton files, once, before training."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from data_prep.commands import (
    cifar100_command,
    digits_command,
    imagefolder_command,
    info_command,
    list_command,
    verify_command,
)
from data_prep.row_commands import hfds_command, torch_command, wds_command
from data_prep.writing.bad_images import BadImagesError
from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.config.command_line import run_subcommand

_COMMANDS = {
    "digits": digits_command,
    "cifar100": cifar100_command,
    "imagefolder": imagefolder_command,
    "list": list_command,
    "hfds": hfds_command,
    "wds": wds_command,
    "torch": torch_command,
    "verify": verify_command,
    "info": info_command,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own). Exits with 2 on a user's error, 130 on Ctrl-C."""
    with _exit_on_signals():
        exit_cleanly(partial(_run, argv))


def _run(argv: list[str] | None) -> None:
    try:
        run_subcommand(_COMMANDS, sys.argv[1:] if argv is None else argv, usage_name("data_prep"), __doc__)
    except BadImagesError as error:
        if error.can_skip:
            words = sys.argv[1:] if argv is None else argv
            words = [word for n, word in enumerate(words) if "--on-bad" not in (word, *words[max(n - 1, 0) : n])]
            words = [word for word in words if not word.startswith("--on-bad=")]
            line = shlex.join([*words, "--on-bad", "skip"])
            error.add_note(f"To leave them out: {usage_name('data_prep')} {line}")
        raise


@contextmanager
def _exit_on_signals() -> Generator[None]:
    # Batch systems stop a job with SIGTERM, a closing terminal sends SIGHUP: both take the same clean-up as Ctrl-C.
    # Under nohup SIGHUP stays ignored.
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    previous = {one: signal.signal(one, lambda number, _: sys.exit(128 + number)) for one in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
