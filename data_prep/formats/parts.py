"""Names of the parts of a set that was converted in shards: train-02-of-16.beton."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from lowrank_vit.common.errors import BetonError, UserError


def part_path(out: Path, index: int, count: int) -> Path:
    """Where part `index` (from 1) of `count` of `out` lies."""
    return out.with_name(f"{out.stem}-{index:0{len(str(count))}d}-of-{count}{out.suffix}")


def find_parts(out: Path) -> list[Path]:
    """The parts of `out` that lie beside it, in order; an empty list if there is none.

    Raises `BetonError` if some are missing, or if parts of two divisions lie there.
    """
    pattern = re.compile(re.escape(out.stem) + r"-([0-9]+)-of-([0-9]+)" + re.escape(out.suffix))
    names = [path.name for path in out.parent.iterdir()] if out.parent.is_dir() else []
    present = {(int(m[2]), int(m[1])) for name in names if (m := pattern.fullmatch(name))}
    if not present:
        return []
    counts = sorted({count for count, _ in present})
    if len(counts) > 1:
        raise BetonError(
            f"{out.parent} holds parts of {out.name} from divisions into {' and '.join(map(str, counts))}. "
            "Remove those of all divisions but one."
        )
    count = counts[0]
    # A name may promise any number of parts, so what is counted is what is there.
    num_missing = count - sum(1 <= i <= count for _, i in present)
    if num_missing or len(present) > count:
        lacking = (part_path(out, i, count).name for i in range(1, count + 1) if (count, i) not in present)
        shown = ", ".join(islice(lacking, 5)) + (", ..." if num_missing > 5 else "")
        if not num_missing:
            raise BetonError(f"{out.parent} holds parts of {out.name} that are numbered beyond {count}. Remove them.")
        raise BetonError(
            f"{out.parent} lacks {num_missing:,} of the {count:,} parts of {out.name}: {shown}. "
            f"Write each with `python -m data_prep imagefolder ... --out {out} --shard i/{count}`."
        )
    return [part_path(out, i, count) for i in range(1, count + 1)]


def file_or_parts(beton: Path) -> list[Path]:
    """`beton` itself, or its parts where it is not there and they are. Raises `BetonError`, see `find_parts`."""
    return [beton] if beton.exists() else find_parts(beton) or [beton]


def parse_shard(text: str) -> tuple[int, int]:
    """Read the command line's "2/16" as (2, 16). Raises `UserError`."""
    match = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", text)
    if not match:
        raise UserError(f"--shard is {text}, expected i/n, for example 2/16 for the second of 16 parts.")
    return int(match[1]), int(match[2])
