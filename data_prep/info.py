"""Describe the content of a `.beton`: a table for the terminal, and a picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.filesize import decimal as size_in_words
from rich.table import Table
from rich.text import Text

from data_prep.formats.beton import MODE_RAW
from data_prep.formats.sidecars import Manifest, check_index, doubt_line, emptied_line, manifest_path, read_manifest
from data_prep.formats.tables import Tables, read_tables
from data_prep.writing.workers import counts_in_words
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole, writing
from lowrank_vit.common.terminal import one_line

SHEET_ROWS, SHEET_COLUMNS = 4, 8
THUMBNAIL = 96
"""Pixels a side on the contact sheet."""


def info_table(beton: Path) -> Table:
    """A two-column table on a `.beton`, and on its manifest if there is one. Raises `BetonError`."""
    tables, manifest = _read(beton)
    # Names from the file system may look like rich's markup, so they are given as plain `Text`.
    table = Table(title=Text(one_line(beton.name)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(tables, manifest):
        table.add_row(name, Text(one_line(value)))
    return table


def _read(beton: Path) -> tuple[Tables, Manifest | None]:
    tables = read_tables(beton)
    if not manifest_path(beton).exists():
        return tables, None
    manifest = read_manifest(beton)
    check_index(beton, tables.index_xxh3, manifest)
    return tables, manifest


def _facts(tables: Tables, manifest: Manifest | None) -> list[tuple[str, str]]:
    n = len(tables.labels)
    per_class = np.unique(tables.labels, return_counts=True)[1]
    raw = int((tables.modes == MODE_RAW).sum())
    pages = len(np.unique(tables.pointers // tables.page_size))
    facts = [
        (
            "samples",
            f"{n:,}" + (f" (part {manifest.shard[0]} of {manifest.shard[1]})" if manifest and manifest.shard else ""),
        ),
        ("classes", f"{len(manifest.classes) if manifest else len(per_class):,}"),
        ("images a class", _spread(per_class)),
        ("stored as", f"{n - raw:,} JPEG, {raw:,} raw"),
        ("width", _spread(tables.widths) + " pixels"),
        ("height", _spread(tables.heights) + " pixels"),
        ("bytes a sample", _spread(tables.sizes)),
        (
            "file",
            f"{size_in_words(tables.file_bytes)}, {int(tables.sizes.sum()) / tables.file_bytes:.1%} of it samples",
        ),
        ("pages", f"{pages:,} of {tables.page_size >> 20} MiB"),
    ]
    if manifest is None:
        return [*facts, ("manifest", "none: class names, origin and checksums are unknown")]
    some = ", ".join(manifest.classes[:6]) + (", ..." if len(manifest.classes) > 6 else "")
    facts += [
        ("class names", some),
        ("reasons", counts_in_words(manifest.reasons)),
        ("left out", ". ".join(filter(None, [f"{len(manifest.skipped):,} bad images", emptied_line(manifest)]))),
        (
            "repaired",
            ". ".join(filter(None, [f"{len(manifest.repaired):,} JPEGs, without loss", doubt_line(manifest.reasons)])),
        ),
        ("source", manifest.source),
        ("options", _pairs(manifest.options)),
        ("libraries", _pairs(manifest.libraries)),
        ("SHA-256", manifest.sha256),
        ("index", "verified" if manifest.index_xxh3 else "not verified; `python -m data_prep verify` does it once"),
    ]
    if manifest.superclasses:
        facts.insert(2, ("coarse classes", f"{len(manifest.superclasses.names):,}"))
    return facts


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None) or "none"


def _spread(values: np.ndarray) -> str:
    low, middle, high = (int(v) for v in np.percentile(values, [0, 50, 100]))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {middle:,}"


def plot_info(beton: Path, out: Path, seed: int = 0) -> None:
    """Draw histograms and a contact sheet of random samples to the PNG `out`. Raises `UserError`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if out.suffix.lower() != ".png":
        raise UserError(f"--plot {out} does not end in .png.")
    tables, manifest = _read(beton)
    per_class = np.unique(tables.labels, return_counts=True)[1]
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{one_line(beton.name)}: {len(tables.labels):,} samples", parse_math=False)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.2))  # type: ignore[misc]
    for axes, (title, values) in zip(
        top.subplots(1, 4),
        (
            ("width (pixels)", tables.widths),
            ("height (pixels)", tables.heights),
            ("size (kB)", tables.sizes / 1000),
            ("images a class", per_class),
        ),
        strict=True,
    ):
        _histogram(axes, title, values)
    ids = np.random.default_rng(seed).permutation(len(tables.labels))[: SHEET_ROWS * SHEET_COLUMNS]
    cells = bottom.subplots(SHEET_ROWS, SHEET_COLUMNS).ravel()
    for axes, sample_id in zip(cells, ids.tolist(), strict=False):
        label = int(tables.labels[sample_id])
        axes.imshow(_thumbnail(beton, tables, sample_id))
        classes = manifest.classes if manifest else ()
        name = one_line(classes[label]) if label < len(classes) else str(label)
        axes.set_title(_short(name), fontsize=7, parse_math=False)
    for axes in cells:
        axes.set_axis_off()
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn in its place
        figure.savefig(png, dpi=120, format="png")
    with writing(out, "Check its folder, or give another --plot."):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, png.getvalue())


def _histogram(axes: Any, title: str, values: np.ndarray) -> None:
    axes.set_title(title, fontsize=9)
    if (values == values[0]).all():
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"all {values[0]:,}", ha="center", transform=axes.transAxes)
        return
    axes.hist(values, bins=min(40, len(np.unique(values))), color="#3b6ea5")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _thumbnail(beton: Path, tables: Tables, sample_id: int) -> np.ndarray:
    with beton.open("rb") as file:
        file.seek(int(tables.pointers[sample_id]))
        data = file.read(int(tables.sizes[sample_id]))
    if tables.modes[sample_id] == MODE_RAW:
        shape = int(tables.heights[sample_id]), int(tables.widths[sample_id]), 3
        image = Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))
    else:
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
            raise UserError(
                f"{beton}: sample {sample_id} does not decode ({error or type(error).__name__}). "
                f"Try `python -m data_prep verify {beton}`."
            ) from error
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
