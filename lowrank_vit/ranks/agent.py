"""torchrun's agent on this machine: the process that has started this rank, and would start it again."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

_PLACE = ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def agent() -> psutil.Process | None:
    """Find it, be it behind programs that run the command in a child; None without torchrun or out of a container."""
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return None
    with suppress(psutil.Error):
        return launched().parent()
    return None


def launched(process: psutil.Process | None = None) -> psutil.Process:
    """The process that torchrun itself has started as this rank: this one, or the first of those that led to it.

    They have the place among the ranks in their environment that torchrun gave to this process; torchrun has not.
    """
    process = process or psutil.Process()
    with suppress(psutil.Error):
        while (parent := process.parent()) and _has_our_place(parent):
            process = parent
    return process


def _has_our_place(process: psutil.Process) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:  # another user's
        return False
    return all(environment.get(name) == os.environ.get(name, "") for name in _PLACE)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, be it that nobody has waited for it yet, or that another has its number."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
