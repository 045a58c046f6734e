"""A run's numbers as tables for other programs: CSV or Parquet files."""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import whole_file, writing
from lowrank_vit.common.packages import needs
from lowrank_vit.report.events import Columns, read_flows, read_train
from lowrank_vit.report.read import read_summary
from lowrank_vit.spectral.watching.scalars import ScalarHistory, columns_of
from lowrank_vit.spectral.watching.stored import Spectra, store_dir_of

Format = Literal["csv", "parquet"]


_AT_ONCE = 4_000_000
"""Numbers held (32 MB) before they are written as a row group; each group costs metadata for each column."""


def format_of(text: str) -> Format:
    """The format of that name. Raises `UserError` for another."""
    if text not in ("csv", "parquet"):
        raise UserError(f"--export takes csv or parquet, and a folder, not `{text}`.")
    return text


def export_run(path: Path, form: Format, out: Path) -> list[Path]:
    """Write the tables of a run, finished or not, into the folder `out`, which is made; empty tables are left out.

    `epochs` is `summary.csv`; `train` and `flows` are the log's lines of these kinds, by update. `scalars` has a row
    for each refresh and matrix or mean, see `columns_of`; `singular_values` has a row for each refresh and matrix, with
    the columns "s1", "s2" and so on. A cell without a number is empty, in Parquet null.

    Returns:
        The files written.

    Raises:
        UserError: `path` holds nothing of a run, `out` cannot be written, or pyarrow is missing.
    """
    stored, notes = Spectra(store_dir_of(path)), list[str]()
    log = path / "metrics.jsonl"
    chunks: dict[str, Iterable[Columns]] = {
        "epochs": [read_summary(path / "summary.csv", notes)],
        "train": [read_train(log, notes)],
        "flows": [read_flows(log, every=True)],
        "scalars": _Scalars(stored.history),
        "singular_values": _SingularValues(stored),
    }
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, but tables are written into a folder. Give --export {form} a folder.")
    write = _csv_file if form == "csv" else _parquet_file(form)
    written: list[Path] = []
    for name, of_table in chunks.items():
        columns = dict.fromkeys(column for chunk in of_table for column in chunk)
        if not columns:
            continue
        target = out / f"{name}.{form}"
        with writing(target, "Choose another folder."):
            out.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as file, write(file, list(columns)) as rows:
                for chunk in of_table:
                    rows(chunk)
        written.append(target)
    if not written:
        raise UserError(
            f"{path} holds no numbers of a run. Give the directory that `python -m lowrank_vit.train` wrote."
        )
    return written


class _Scalars:
    """The scalars of each refresh; two passes read them twice, so that only one is in memory at a time."""

    def __init__(self, history: ScalarHistory) -> None:
        self._history = history

    def __iter__(self) -> Iterator[Columns]:
        for update in self._history.updates:
            try:
                yield columns_of([self._history.read(update)])
            except UserError:  # damaged, or thinned out in the meantime
                continue


class _SingularValues:
    def __init__(self, stored: Spectra) -> None:
        self._stored = stored

    def __iter__(self) -> Iterator[Columns]:
        for update in self._stored.updates:
            try:
                spectra = self._stored.refresh(update).spectra
            except UserError:
                continue
            most = max((s.size for s in spectra.values()), default=0)
            values_NK = np.full((len(spectra), most), np.nan)
            for row, s in zip(values_NK, spectra.values(), strict=True):
                row[: s.size] = s
            kinds = [key.partition("/") for key in spectra]
            yield {
                "update": np.full(len(spectra), update),
                "ema": np.array([kind == "spec_ema" for kind, _, _ in kinds], bool),
                "name": np.array([name for *_, name in kinds], str),
                **{f"s{k + 1}": values_NK[:, k] for k in range(most)},
            }


class _Write(Protocol):
    def __call__(self, chunk: Columns) -> object: ...


def _row_writer(file: TextIO, columns: list[str]) -> _Write:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(columns)

    def write(chunk: Columns) -> None:
        length = len(next(iter(chunk.values()), ()))
        cells = [_cells(chunk[name]) if name in chunk else [""] * length for name in columns]
        rows.writerows(zip(*cells, strict=True))

    return write


def _cells(values: np.ndarray) -> list[Any]:
    """Python's own values, which `csv` writes with as many digits as are needed; empty for NaN."""
    return ["" if value != value else value for value in values.tolist()]


@contextmanager
def _csv_file(file: io.BufferedWriter, columns: list[str]) -> Generator[_Write]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    yield _row_writer(text, columns)
    text.flush()
    text.detach()


def _parquet_file(form: Format) -> Any:
    parquet = needs("pyarrow.parquet", extra="tables", to=f"--export {form}", instead="use csv")
    arrow = needs("pyarrow", extra="tables", to=f"--export {form}", instead="use csv")

    @contextmanager
    def opened(file: io.BufferedWriter, columns: list[str]) -> Generator[_Write]:
        plain = {"update": arrow.int64(), "epoch": arrow.int64(), "ema": arrow.bool_(), "name": arrow.string()}
        kinds = {name: plain.get(name, arrow.float64()) for name in columns}
        schema = arrow.schema(list(kinds.items()))
        held: list[Any] = []
        with parquet.ParquetWriter(file, schema) as writer:

            def flush() -> None:
                if held:
                    writer.write_table(arrow.concat_tables(held).combine_chunks())
                    held.clear()

            def write(chunk: Columns) -> None:
                length = len(next(iter(chunk.values()), ()))
                arrays = [_arrow(arrow, chunk.get(name), length, kind) for name, kind in kinds.items()]
                held.append(arrow.Table.from_arrays(arrays, schema=schema))
                if sum(table.num_rows for table in held) * len(kinds) >= _AT_ONCE:
                    flush()

            yield write
            flush()

    return opened


def _arrow(arrow: Any, values: np.ndarray | None, length: int, kind: Any) -> Any:
    if values is None:
        return arrow.nulls(length, kind)
    return arrow.array(values.tolist() if values.dtype.kind == "U" else values, from_pandas=True).cast(kind)
