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
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from lowrank_vit.ranks.agent import agent, launched
from lowrank_vit.ranks.world import World
from lowrank_vit.run.directory import LAST

MARK = ".launch"


def names(world: World) -> list[str]:
    """What this attempt's launch is known by, of all nodes; empty without torchrun. Every rank calls it."""
    own = [_agent(), world.launch] if os.environ.get("TORCHELASTIC_RUN_ID") else []
    return world.from_first(sorted({name for told in world.gather_on_first(own) or () for name in told if name}))


def _agent() -> str:
    """The name of torchrun's process on this machine that has started this one; empty where a container hides it."""
    process = agent()
    with suppress(OSError, IndexError):
        return _process(process.pid) if process else ""
    return ""


def _process(pid: int) -> str:
    """A name of a process that no other process has, nor had, on any machine."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    started = stat.rpartition(")")[2].split()[19]  # clock ticks, see proc(5); the name before it may hold anything
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{boot}/{pid}/{started}"


def mark(folder: Path, names: list[str]) -> str:
    """What to write to `MARK` in a folder that this attempt, of a launch of these names, works in."""
    earlier = _read(folder)
    is_ours = not set(names).isdisjoint(earlier["agents"])
    noted = {
        # Marks of earlier versions have agents alone, and no command.
        "agents": sorted({*names, *(earlier["agents"] if is_ours else ())}),
        "process": _process(launched().pid),
        "command": _command(),
        "found": earlier["found"] if is_ours else _state_of(folder / LAST),
    }
    return json.dumps(noted) + "\n"


def earlier_folder(output: Path, experiment: str, resumed: Path | None, names: list[str]) -> Path | None:
    """The directory in which earlier attempts of this launch have worked; None in the first attempt.

    Of several the newest of this command line, else the newest: a node that came later may have others of its own disk.
    `resumed`: the file of --resume, whose directory it is then.
    """
    if resumed:
        folders = [resumed.parent]
    else:
        folders = [path.parent for path in output.glob(f"{glob.escape(experiment) if experiment else '*'}/{MARK}")]
    marks = {path: _read(path) for path in folders if not (path.is_symlink() and not resumed)}
    ours = [path for path, noted in marks.items() if _is_of_earlier_attempt(noted, names)]
    return max(
        ours,
        key=lambda path: (marks[path]["command"] == _command(), (path / MARK).stat().st_mtime),
        default=None,
    )


def own_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint there, if this launch has written it: not one that was there when it began."""
    state = _state_of(folder / LAST)
    return folder / LAST if state and state != _read(folder)["found"] else None


def _is_of_earlier_attempt(noted: dict[str, Any], names: list[str]) -> bool:
    # What torchrun has started once may train twice, one after the other: those are no attempts of one run.
    return not set(names).isdisjoint(noted["agents"]) and noted["process"] != _process(launched().pid)


def _command() -> str:
    """A digest of the command line, which is the same in all attempts: it tells the runs of one launch apart."""
    return xxhash.xxh3_64_hexdigest("\0".join(sys.argv[1:]).encode(errors="surrogateescape"))


def _read(folder: Path) -> dict[str, Any]:
    try:
        noted = json.loads((folder / MARK).read_text(encoding="utf-8"))
        agents = [str(name) for name in noted["agents"]]
        more = {"process": noted["process"], "command": noted.get("command", ""), "found": noted["found"]}
        return {"agents": agents, **more}
    except (OSError, ValueError, KeyError, TypeError):
        return {"agents": [], "process": "", "command": "", "found": None}


def _state_of(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_mtime_ns]
