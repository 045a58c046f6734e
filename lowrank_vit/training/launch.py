"""The run directory that the earlier attempts of one torchrun have worked in.

torchrun starts all ranks again after a failure, with the same command line. Each attempt leaves a mark in its run
directory: the agents (torchrun's own processes, one a node) that have started it. A directory is this launch's if one
of them is among those of now. So it is found again when nodes leave or join, whichever node has rank 0, and never by
another launch, be its --rdzv-id the same.
"""

from __future__ import annotations

import glob
import json
import os
import socket
from pathlib import Path
from typing import Any

from lowrank_vit.run.directory import LAST

MARK = ".launch"


def agent() -> str:
    """The process that has started this one, where that is torchrun's agent; else empty."""
    return _process(os.getppid()) if os.environ.get("TORCHELASTIC_RUN_ID") else ""


def _process(pid: int) -> str:
    """A name of a process that no other process has, nor had, on any machine."""
    started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]  # clock ticks
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{boot}/{pid}/{started}"


def mark(folder: Path, agents: list[str]) -> str:
    """What to write to `MARK` in a folder that this attempt works in; `agents` are those of all nodes."""
    earlier = _read(folder)
    found = earlier["found"] if _is_of(earlier, agents) else _state_of(folder / LAST)
    agents = sorted({*agents, *(earlier["agents"] if _is_of(earlier, agents) else ())})
    return json.dumps({"agents": agents, "process": _process(os.getpid()), "found": found}) + "\n"


def earlier_folder(output: Path, experiment: str, resumed: Path | None, agents: list[str]) -> Path | None:
    """The newest directory in which earlier attempts of this launch have worked; None in the first attempt.

    `resumed`: the file of --resume, whose directory it is then.
    """
    if resumed:
        folders = [resumed.parent]
    else:
        folders = [path.parent for path in output.glob(f"{glob.escape(experiment) if experiment else '*'}/{MARK}")]
    folders = [path for path in folders if not (path.is_symlink() and not resumed) and _is_of(_read(path), agents)]
    return max(folders, key=lambda path: (path / MARK).stat().st_mtime, default=None)


def own_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint there, if this launch has written it: not one that was there when it began."""
    state = _state_of(folder / LAST)
    return folder / LAST if state and state != _read(folder)["found"] else None


def _is_of(noted: dict[str, Any], agents: list[str]) -> bool:
    # Two runs of one process, one after the other, are no attempts of one run.
    return not set(agents).isdisjoint(noted["agents"]) and noted["process"] != _process(os.getpid())


def _read(folder: Path) -> dict[str, Any]:
    try:
        noted = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return {name: noted[name] for name in ("agents", "process", "found")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"agents": [], "process": "", "found": None}


def _state_of(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_mtime_ns]
