"""Where a run begins: anew, from --resume, or where an earlier attempt of the same launch has left off."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from lowrank_vit.model.weights import Checkpoint, read_checkpoint
from lowrank_vit.ranks.world import World
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.state import as_resumed
from lowrank_vit.training import launch
from lowrank_vit.training.setup import silent


@dataclass(frozen=True)
class Start:
    """What all ranks agree on before the parts are made."""

    config: Config
    """With --resume where an earlier attempt has left a checkpoint, and with what an older run means."""
    resumed: Checkpoint | None
    earlier: Path | None
    """The directory of an earlier attempt, to be used again."""
    agents: list[str]
    """torchrun's, of all nodes."""


def find_start(config: Config, world: World) -> Start:
    """Rank 0 looks for it and the others follow. Raises `UserError`."""
    run = config.run
    agents = sorted({agent for agent in world.gather(launch.agent()) if agent})
    earlier = None
    if world.is_first and agents:
        earlier = launch.earlier_folder(run.output, run.experiment, run.resume, agents)
    own = launch.own_checkpoint(earlier) if earlier else None
    resume, earlier = world.from_first((own or run.resume, earlier))
    if world.is_first and not resume and not earlier:
        RunDir.require_free(run.output, run.experiment)  # before data are converted for nothing
    config = replace(config, run=replace(run, resume=resume))
    resumed = _read_alike(resume, world) if resume else None
    if resumed:
        config = as_resumed(config, resumed, terminal.say if world.is_first else silent)
    return Start(config, resumed, earlier, agents)


def _read_alike(path: Path, world: World) -> Checkpoint:
    """The checkpoint, which must be the same file on every rank. Raises `UserError`."""
    advice = "It must be on a disk that all nodes see; give such an --output or --resume."
    resumed = read_checkpoint(path) if world.is_first else None
    expected = world.from_first(_size_and_updates(path, resumed) if resumed else None)
    if resumed:
        return resumed
    try:
        resumed = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"On {socket.gethostname()}: {error} Rank 0 has read that file. {advice}") from error
    found = _size_and_updates(path, resumed)
    if found != expected:
        raise UserError(
            f"{path} on {socket.gethostname()} is not the file that rank 0 has read: (bytes, updates) are {found}, "
            f"there {expected}. {advice}"
        )
    return resumed


def _size_and_updates(path: Path, checkpoint: Checkpoint) -> tuple[int, int]:
    return path.stat().st_size, checkpoint.content.get("step", {}).get("num_updates", -1)


def open_run_dir(start: Start, default_name: str) -> RunDir:
    """The directory that rank 0 writes to. Raises `UserError`."""
    run = start.config.run
    folder = start.resumed.path.parent if start.resumed else start.earlier
    run_dir = RunDir.reopen(folder) if folder else RunDir.create(run.output, run.experiment, default_name)
    if start.agents:
        run_dir.write_text(launch.MARK, launch.mark(run_dir.path, start.agents))
    if not start.resumed:
        run_dir.forget()
    return run_dir
