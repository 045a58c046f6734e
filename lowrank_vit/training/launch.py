"""The run directory that the earlier attempts of one torchrun have worked in.

torchrun starts all ranks again after a failure, with the same command line. Each attempt leaves a mark in its run
directory: the names of its launch. A directory is this launch's if one of them is among those of now, so it is found
again when nodes leave or join, whichever node has rank 0, and never by another launch, be its --rdzv-id the same. The
names are a random one in the agents' store, which is lost with the node that holds it (and is another in each attempt
where that store is not shared), and the agents, torchrun's own processes, one a node, of which one has to stay.
"""

from __future__ import annotations

import glob
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowrank_vit.ranks.world import World
from lowrank_vit.run.directory import LAST

MARK = ".launch"
_PLACE = ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def names(world: World) -> list[str]:
    """What this attempt's launch is known by, of all nodes; empty without torchrun. Every rank calls it."""
    own = [agent(), world.launch] if os.environ.get("TORCHELASTIC_RUN_ID") else []
    return sorted({name for told in world.gather(own) for name in told if name})


def agent() -> str:
    """Find torchrun's process on this machine that has started this one; empty where a container hides it."""
    with suppress(OSError, ValueError, IndexError):
        return _process(_starter(os.getppid()))
    return ""


def _starter(pid: int) -> int:
    """The process itself or, of programs that run a command in a child, what has started the first of them.

    They have the place among the ranks in their environment that torchrun gave to this process; torchrun has not.
    """
    while pid > 0 and _has_our_place(pid):
        pid = int(_stat(pid)[1])
    return pid


def _has_our_place(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except PermissionError:
        return False
    place = (f"{name}={os.environ.get(name, '')}" for name in _PLACE)
    return all(os.fsencode(variable) in environment for variable in place)


def _stat(pid: int) -> list[str]:
    """State, parent and so on of a process, see proc(5); its name may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _process(pid: int) -> str:
    """A name of a process that no other process has, nor had, on any machine."""
    started = _stat(pid)[19]  # clock ticks
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{boot}/{pid}/{started}"


def mark(folder: Path, names: list[str]) -> str:
    """What to write to `MARK` in a folder that this attempt, of a launch of these names, works in."""
    earlier = _read(folder)
    found = earlier["found"] if _is_of(earlier, names) else _state_of(folder / LAST)
    names = sorted({*names, *(earlier["agents"] if _is_of(earlier, names) else ())})
    # Marks of earlier versions have agents alone.
    return json.dumps({"agents": names, "process": _process(os.getpid()), "found": found}) + "\n"


def earlier_folder(output: Path, experiment: str, resumed: Path | None, names: list[str]) -> Path | None:
    """The newest directory in which earlier attempts of this launch have worked; None in the first attempt.

    `resumed`: the file of --resume, whose directory it is then.
    """
    if resumed:
        folders = [resumed.parent]
    else:
        folders = [path.parent for path in output.glob(f"{glob.escape(experiment) if experiment else '*'}/{MARK}")]
    folders = [path for path in folders if not (path.is_symlink() and not resumed) and _is_of(_read(path), names)]
    return max(folders, key=lambda path: (path / MARK).stat().st_mtime, default=None)


def own_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint there, if this launch has written it: not one that was there when it began."""
    state = _state_of(folder / LAST)
    return folder / LAST if state and state != _read(folder)["found"] else None


def _is_of(noted: dict[str, Any], names: list[str]) -> bool:
    # Two runs of one process, one after the other, are no attempts of one run.
    return not set(names).isdisjoint(noted["agents"]) and noted["process"] != _process(os.getpid())


def _read(folder: Path) -> dict[str, Any]:
    try:
        noted = json.loads((folder / MARK).read_text(encoding="utf-8"))
        agents = [str(name) for name in noted["agents"]]
        return {"agents": agents, "process": noted["process"], "found": noted["found"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"agents": [], "process": "", "found": None}


def _state_of(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_mtime_ns]
