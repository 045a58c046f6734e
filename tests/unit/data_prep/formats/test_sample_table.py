"""The table of samples: one name is found as the whole list has it, in tables of this version and of earlier ones."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest

from data_prep.formats import sample_table
from data_prep.formats.sample_table import SampleTable, read_sample_name, read_sample_table, sample_table_path
from lowrank_vit.common.errors import BetonError

NAMES = [f"{'dir' * (n % 7)}/{n}\udcff.jpg" * (n % 3) for n in range(1000)]
"""Some are empty, none of one length."""


def earlier(table: SampleTable) -> bytes:
    """As it was written before names had an offset column."""
    buffer = io.BytesIO()
    columns = {"checksums": table.checksums, "reasons": table.reasons, "reason_names": np.array(table.reason_names)}
    np.savez_compressed(buffer, **columns, names=np.frombuffer(table.names_blob, np.uint8))  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """A file that is large enough for a table of so many names."""
    path = tmp_path / "a.beton"
    path.write_bytes(bytes(48 * len(NAMES)))
    return path


@pytest.mark.parametrize("chunk", [7, 1 << 15])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("to_bytes", [SampleTable.to_bytes, earlier])
def test_a_name_is_found_without_the_others(beton, count, chunk, to_bytes, monkeypatch):
    monkeypatch.setattr(sample_table, "_CHUNK_BYTES", chunk)
    names = NAMES[:count]
    table = SampleTable.of(np.arange(count, dtype=np.uint64), np.zeros(count, np.uint8), names)
    sample_table_path(beton).write_bytes(to_bytes(table))
    read = read_sample_table(beton)
    assert read.names == names
    assert np.array_equal(read.checksums, table.checksums)
    ids = sorted({0, 1, 254, 255, 256, 257, 511, 512, count // 2, count - 1} & set(range(count)))
    assert [read_sample_name(beton, i) for i in ids] == [names[i] for i in ids]
    for beyond in (count, count + 300):
        with pytest.raises(BetonError, match=r"a\.beton\.samples cannot be read"):
            read_sample_name(beton, beyond)


def test_of_a_table_with_an_offset_column_little_is_read(beton, monkeypatch):
    count = len(NAMES)
    table = SampleTable.of(np.zeros(count, np.uint64), np.zeros(count, np.uint8), [f"{n:0900d}" for n in range(count)])
    sample_table_path(beton).write_bytes(table.to_bytes())
    read: list[int] = []
    real = sample_table._name_from
    monkeypatch.setattr(
        sample_table, "_name_from", lambda column, start, skipped: read.append(skipped) or real(column, start, skipped)
    )
    assert int(read_sample_name(beton, 999)) == 999
    assert read == [999 % 256]


def test_a_damaged_table_names_nothing(beton):
    count = len(NAMES)
    table = SampleTable.of(np.zeros(count, np.uint64), np.zeros(count, np.uint8), NAMES)
    intact, rng = table.to_bytes(), np.random.default_rng(0)
    path = sample_table_path(beton)
    with pytest.raises(BetonError, match="is missing"):
        read_sample_name(beton, 5)
    for n in range(300):
        content = bytearray(intact)
        for at in rng.integers(0, len(content), 30):
            content[at] = int(rng.integers(256))
        path.write_bytes(content[: int(rng.integers(len(content)))] if n % 3 == 0 else content)
        try:
            assert isinstance(read_sample_name(beton, int(rng.integers(count))), str)
        except BetonError:
            continue


def test_a_table_that_unpacks_to_too_much_is_not_unpacked(beton):
    """A few kB of zeros that are packed well must not take all memory, whichever way a name is asked for."""
    table = SampleTable.of(np.zeros(1, np.uint64), np.zeros(1, np.uint8), ["a"])
    intact, path = table.to_bytes(), sample_table_path(beton)
    with ZipFile(io.BytesIO(intact)) as archive, ZipFile(path, "w", ZIP_DEFLATED) as large:
        for member in archive.infolist():
            content = archive.read(member)
            if member.filename == "name_starts.npy":
                content = io.BytesIO()
                np.save(content, np.zeros(1 << 20, np.uint64))
                content = content.getvalue()
            large.writestr(member, content)
    for read in (read_sample_table, lambda beton: read_sample_name(beton, 0)):
        with pytest.raises(BetonError, match="unpacks to more than"):
            read(beton)
