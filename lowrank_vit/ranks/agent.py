"""torchrun's agent on this machine: the process that started this rank, and would restart it."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

_PLACE = ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def agent() -> psutil.Process | None:
    """The agent, also if other programs are between; None without torchrun, or if a container hides it."""
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return None
    with suppress(psutil.Error):
        return launched().parent()
    return None


def launched(process: psutil.Process | None = None) -> psutil.Process:
    """The process that torchrun itself started as this rank: this one, or an ancestor.

    Such ancestors have this rank's variables of torchrun in their environment; torchrun itself does not.
    """
    process = process or psutil.Process()
    with suppress(psutil.Error):
        while (parent := process.parent()) and _has_our_place(parent):
            process = parent
    return process


def _has_our_place(process: psutil.Process) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:  # another user's process
        return False
    return all(environment.get(name) == os.environ.get(name, "") for name in _PLACE)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, also if it is a zombie or its number was reused."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
