"""Finding the run directory of earlier attempts of the same torchrun.

torchrun restarts all ranks after a failure, with the same command line. Each attempt leaves a mark in its run directory
with the names of its launch. A directory belongs to this launch if the two share a name. So it is found again when
nodes leave or join, whichever node has rank 0, and never by another launch, even with the same --rdzv-id. One name is
random, from the agents' store; it is lost with the node that holds the store, and changes with each attempt if the
store is not shared. The other names are those of the agents, torchrun's own processes, one per node; one agent has to
survive.
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
    """The names of this attempt's launch, from all nodes; empty without torchrun. All ranks must call it."""
    own = [_agent(), world.launch] if os.environ.get("TORCHELASTIC_RUN_ID") else []
    return world.from_first(sorted({name for told in world.gather_on_first(own) or () for name in told if name}))


def _agent() -> str:
    """The name of the torchrun process that started this one; empty if a container hides it."""
    process = agent()
    with suppress(OSError, IndexError):
        return _process(process.pid) if process else ""
    return ""


def _process(pid: int) -> str:
    """A name for a process that is unique over all machines and times."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    started = stat.rpartition(")")[2].split()[19]  # clock ticks, see proc(5); the name before may be anything
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()}/{boot}/{pid}/{started}"


def mark(folder: Path, names: list[str]) -> str:
    """The content of `MARK` for a folder in which this attempt of a launch with these names works."""
    earlier = _read(folder)
    is_ours = not set(names).isdisjoint(earlier["agents"])
    noted = {
        # Marks of earlier versions have only agents, and no command.
        "agents": sorted({*names, *(earlier["agents"] if is_ours else ())}),
        "process": _process(launched().pid),
        "command": _command(),
        "found": earlier["found"] if is_ours else _state_of(folder / LAST),
    }
    return json.dumps(noted) + "\n"


def earlier_folder(output: Path, experiment: str, resumed: Path | None, names: list[str]) -> Path | None:
    """The run directory of earlier attempts of this launch; None in the first attempt.

    Of several, the latest with this command line is chosen, otherwise the latest: a node that joined later may have
    others on its own disk. `resumed`: the file of --resume; then only its directory is considered.
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
    """The last checkpoint in a folder if this launch wrote it, not one that was there before."""
    state = _state_of(folder / LAST)
    return folder / LAST if state and state != _read(folder)["found"] else None


def _is_of_earlier_attempt(noted: dict[str, Any], names: list[str]) -> bool:
    # One process may train twice, one run after the other: these are not attempts of one run.
    return not set(names).isdisjoint(noted["agents"]) and noted["process"] != _process(launched().pid)


def _command() -> str:
    """A digest of the command line. It is the same in all attempts, and tells the runs of one launch apart."""
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
