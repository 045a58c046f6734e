"""Which process of how many this is."""

from __future__ import annotations

import os

from data_prep.errors import UserError


def rank_and_world_size() -> tuple[int, int]:
    """`(rank, world size)` as torchrun sets them. Raises `UserError` for more than one process: still to come."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"Training on {world_size} processes is not there yet. Start one process: python -m lowrank_vit.train ..."
        )
    return int(os.environ.get("RANK", "0")), world_size
