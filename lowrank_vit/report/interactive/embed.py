"""The contents of the interactive page of a run, an analysis or a compression: data and library, as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from lowrank_vit.report.compression.read import Compression
from lowrank_vit.report.interactive import figures
from lowrank_vit.report.interactive.matrices import matrices
from lowrank_vit.report.interactive.packing import Packer, embedded_json, embedded_library
from lowrank_vit.report.read import Run
from lowrank_vit.report.style import browser_look
from lowrank_vit.report.switching.read import Switching
from lowrank_vit.spectral.select import module_type

DATA_AT_MOST = 2_900_000
"""Characters of data in a page; with the library's 700,000 and the pictures the page stays below 6 MB."""
PICTURES_AT_MOST = 2_000_000
"""Characters of pictures in a page. The PNG files beside it are not reduced."""


def embedded(
    run: Run | None, switching: Switching | None = None, compression: Compression | None = None
) -> tuple[dict[str, str], list[str]]:
    """The texts to embed in the page by name, and notes on data that it leaves out."""
    share = 1.0
    while True:
        texts, notes = _embedded(run, switching, compression, share)
        if sum(map(len, texts.values())) <= DATA_AT_MOST or share < 0.02:
            return {"library": embedded_library(), **texts}, notes
        share /= 2


def _embedded(
    run: Run | None, switching: Switching | None, compression: Compression | None, share: float
) -> tuple[dict[str, str], list[str]]:
    pack, notes = Packer(), list[str]()
    made = []
    content = None
    kinds: list[str] = []
    if run:
        content = matrices(run, pack, notes, share)
        made += [figures.training_figure(run, pack, notes)]
        rest = [
            figures.switching_figure(switching, run, pack) if switching else None,
            figures.vectors_figure(run, pack),
            figures.flows_figure(run, pack),
            figures.circuits_figure(run, pack),
        ]
        made += [one | {"place": "end"} for one in rest if one]
        kinds = [*map(module_type, [*(content["names"] if content else ()), *(switching.layers if switching else ())])]
    if compression:
        made.append(figures.compression_figure(compression, pack))
    data = {
        "figures": [one for one in made if one],
        "matrices": content,
        "looks": {kind: browser_look(kind) for kind in kinds},
        "tables": _tables(run, pack) if run else {},
        "exports": run is not None and run.moment is None and content is not None,
    }
    return {"json": embedded_json(data), "numbers": pack.embedded()}, notes


def _tables(run: Run, pack: Packer) -> dict[str, dict[str, Any]]:
    """The columns of `report --export` that no figure holds, by table; long ones have evenly spaced rows."""
    found: dict[str, dict[str, Any]] = {}
    for name, columns in (("epochs", run.epochs), ("train", run.train), ("flows", run.flows)):
        rows = len(columns.get("update", ()))
        at = np.unique(np.linspace(0, rows - 1, min(rows, figures.POINTS)).round().astype(int))
        if rows:
            found[name] = {
                column: of[at] if name == "epochs" or column in ("update", "epoch") else pack(of[at])
                for column, of in columns.items()
            }
    return found


def embedded_pictures(pictures: Mapping[str, bytes]) -> dict[str, str]:
    """PNGs in base64; if all together are too large, with fewer colours and then smaller."""
    encoded = {caption: _text(png) for caption, png in pictures.items()}
    scale = 1.0
    while sum(map(len, encoded.values())) > PICTURES_AT_MOST and scale > 0.1:
        encoded = {caption: _text(_smaller(png, scale)) for caption, png in pictures.items()}
        scale *= 0.75
    return encoded


def _text(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def _smaller(png: bytes, scale: float) -> bytes:
    from PIL import Image

    with Image.open(BytesIO(png), formats=("PNG",)) as image:
        size = [max(1, round(scale * side)) for side in image.size]
        small = image.convert("RGB").resize((size[0], size[1])).quantize(96)
    buffer = BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
