"""`read_tables` returns consistent tables or raises `BetonError`, whatever the bytes are."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats import beton as layout
from data_prep.formats import tables as tables_module
from data_prep.formats.jpeg import encode_pixels
from data_prep.formats.tables import read_tables
from data_prep.sources.samples import Sample
from data_prep.writing.beton import write_beton
from lowrank_vit.common.errors import BetonError

NUM_SAMPLES = 12
TABLES_END = layout.METADATA_START + NUM_SAMPLES * layout.SAMPLE.itemsize
EXTREME = [0, 1, 2, 3, 7, 8, 24, 2106, 1 << 16, 1 << 21, 1 << 22, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of 12 raw images of 4 x 6 pixels, in 2 MiB pages."""
    path = tmp_path_factory.mktemp("format") / "small.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 6, 4, 3), np.uint8)
    samples = [Sample(i % 3, f"image {i}", pixels[i]) for i in range(NUM_SAMPLES)]
    write_beton(path, samples, encode_pixels, page_size=layout.MIN_PAGE_SIZE)
    return path


@contextmanager
def damaged(beton: Path, patches: list[tuple[int, bytes]], length: int | None = None) -> Generator[None]:
    """Overwrite bytes of `beton` in place, optionally change its length, and put everything back afterwards."""
    with beton.open("r+b") as file:
        before = []
        for offset, data in patches:
            file.seek(offset)
            before.append((offset, file.read(len(data))))
            file.seek(offset)
            file.write(data)
        original_length = beton.stat().st_size
        lost = b""
        if length is not None:
            file.seek(length)
            lost = file.read()
            file.truncate(length)
        file.flush()
        try:
            yield
        finally:
            if length is not None:
                file.seek(length)
                file.write(lost)
                file.truncate(original_length)
            for offset, data in reversed(before):
                file.seek(offset)
                file.write(data)


def reads_or_refuses(beton: Path) -> None:
    try:
        tables = read_tables(beton)
    except BetonError:
        return
    n = len(tables.labels)
    for column in (tables.modes, tables.heights, tables.widths, tables.pointers, tables.sizes):
        assert column.shape == (n,)
    assert tables.file_bytes == beton.stat().st_size
    assert (tables.pointers >= 0).all()
    assert (tables.sizes > 0).all()
    assert (tables.pointers + tables.sizes <= tables.file_bytes).all()
    assert (tables.labels >= 0).all()
    assert (tables.heights > 0).all()
    assert (tables.widths > 0).all()


def place(record: np.dtype, name: str) -> tuple[int, int]:
    """(offset, size) in bytes of a field of `record`."""
    fields: Any = record.fields
    return fields[name][1], fields[name][0].itemsize


def table_start(beton: Path) -> int:
    return beton.stat().st_size - NUM_SAMPLES * layout.ALLOCATION.itemsize


def test_a_valid_file_reads_as_it_was_written(beton: Path) -> None:
    tables = read_tables(beton)
    assert tables.page_size == layout.MIN_PAGE_SIZE
    assert tables.labels.tolist() == [i % 3 for i in range(NUM_SAMPLES)]
    assert (tables.modes == layout.MODE_RAW).all()
    assert set(tables.heights) == {6}
    assert set(tables.widths) == {4}
    assert np.array_equal(tables.pointers, layout.MIN_PAGE_SIZE + 72 * np.arange(NUM_SAMPLES))
    assert (tables.sizes == 72).all()


@settings(max_examples=800)
@given(st.data())
def test_random_bytes_in_the_tables(beton: Path, data: st.DataObject) -> None:
    tail = NUM_SAMPLES * layout.ALLOCATION.itemsize
    # Drawn from the header, the field descriptors, the metadata and the allocation table: pages have no structure.
    places = st.one_of(
        st.integers(0, layout.HEADER.itemsize - 1),
        st.integers(0, TABLES_END - 1),
        st.integers(layout.METADATA_START, TABLES_END - 1),
        st.integers(table_start(beton), table_start(beton) + tail - 1),
    )
    patches = data.draw(st.lists(st.tuples(places, st.binary(min_size=1, max_size=1)), min_size=1, max_size=6))
    with damaged(beton, patches):
        reads_or_refuses(beton)


@settings(max_examples=800)
@given(st.data())
def test_extreme_values_in_whole_fields(beton: Path, data: st.DataObject) -> None:
    start = table_start(beton)
    rows = range(NUM_SAMPLES)
    fields = [place(layout.HEADER, name) for name in layout.HEADER.names or ()]
    fields += [(layout.HEADER.itemsize + i * layout.FIELD.itemsize, 1) for i in range(2)]
    for offset, size in (place(layout.IMAGE, name) for name in layout.IMAGE.names or ()):
        fields += [(layout.METADATA_START + 24 * i + offset, size) for i in rows]
    fields += [(layout.METADATA_START + 24 * i + 16, 8) for i in rows]
    fields += [(start + 24 * i + offset, 8) for i in rows for offset in (0, 8, 16)]
    patches = []
    for offset, size in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4)):
        value = data.draw(st.one_of(st.sampled_from(EXTREME), st.integers(0, (1 << 64) - 1)))
        patches.append((offset, (value % (1 << 8 * size)).to_bytes(size, "little")))
    with damaged(beton, patches):
        reads_or_refuses(beton)


@settings(max_examples=300)
@given(st.data())
def test_cut_or_grown_files(beton: Path, data: st.DataObject) -> None:
    whole = beton.stat().st_size
    length = data.draw(st.one_of(st.integers(0, 4096), st.integers(whole - 4096, whole + 4096), st.integers(0, whole)))
    with damaged(beton, [], length):
        if length == whole:
            reads_or_refuses(beton)
        else:
            with pytest.raises(BetonError):
                read_tables(beton)


def header_patch(name: str, value: int) -> Callable[[int], list[tuple[int, bytes]]]:
    offset, size = place(layout.HEADER, name)
    return lambda start: [(offset, value.to_bytes(size, "little"))]


def row_patch(offset: int, value: int, size: int) -> Callable[[int], list[tuple[int, bytes]]]:
    return lambda start: [(layout.METADATA_START + offset, value.to_bytes(size, "little"))]


def second_sample_half_over_the_first(start: int) -> list[tuple[int, bytes]]:
    pointer = (layout.MIN_PAGE_SIZE + 36).to_bytes(8, "little")
    return [(layout.METADATA_START + 24 + 5, pointer), (start + 24 + 8, pointer)]


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (header_patch("version", 1), "its version field reads 1, expected 2"),
        (header_patch("num_fields", 3), "holds 3 fields"),
        (header_patch("alloc_table_ptr", 0), "unfinished"),
        (header_patch("page_size", 12345), "page size 12345"),
        (header_patch("num_samples", 0), "no samples"),
        (header_patch("num_samples", 1 << 60), "cut short or damaged"),
        (lambda start: [(layout.HEADER.itemsize, b"\x00")], "FFCV types"),
        (lambda start: [(layout.HEADER.itemsize + 9, b"\xff")], "fields named 'image' and 'label'"),
        (lambda start: [(layout.HEADER.itemsize + 1, b"label")], "fields named 'label' and 'label'"),
        (row_patch(0, 9, 1), "sample 0 has an unknown storage mode"),
        (row_patch(24 + 1, 0, 2), "sample 1 has no pixels"),
        (row_patch(24 + 1, 5, 2), "sample 1 is raw but its size"),
        (row_patch(48 + 16, (1 << 64) - 1, 8), "sample 2 has a negative label"),
        (row_patch(5, 1, 8), "sample 0 lies elsewhere"),
        (lambda start: [(start, (1 << 40).to_bytes(8, "little"))], "sample 0 is missing"),
        (lambda start: [(start + 16, ((1 << 64) - 1).to_bytes(8, "little"))], "sample 0 points outside"),
        (second_sample_half_over_the_first, "sample 1 overlaps another"),
    ],
)
def test_each_fault_is_named(beton: Path, patch: Callable[[int], list[tuple[int, bytes]]], message: str) -> None:
    with damaged(beton, patch(table_start(beton))), pytest.raises(BetonError, match=message):
        read_tables(beton)


def test_two_samples_may_share_their_bytes(beton: Path) -> None:
    pointer = layout.MIN_PAGE_SIZE.to_bytes(8, "little")
    with damaged(beton, [(layout.METADATA_START + 24 + 5, pointer), (table_start(beton) + 24 + 8, pointer)]):
        assert read_tables(beton).pointers[0] == read_tables(beton).pointers[1]


def outcome(beton: Path) -> str | list[list[int]]:
    try:
        tables = read_tables(beton)
    except BetonError as error:
        return str(error)
    return [getattr(tables, name).tolist() for name in tables_module.COLUMNS]


@pytest.mark.parametrize("block", [1, 5, 12])
def test_blocks_find_what_the_whole_tables_do(beton: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass by blocks against the check that sorts everything, on damaged and on odd, but sound, tables."""
    monkeypatch.setattr(tables_module, "_BLOCK", block)
    start, rng = table_start(beton), np.random.default_rng(block)
    sound = 0
    for _ in range(150):
        patches = []
        for _ in range(rng.integers(0, 3)):
            row, other = (int(n) for n in rng.integers(0, NUM_SAMPLES, 2))
            pointer = (layout.MIN_PAGE_SIZE + 72 * other + int(rng.choice([0, 0, 0, 36]))).to_bytes(8, "little")
            patches += [(layout.METADATA_START + 24 * row + 5, pointer), (start + 24 * row + 8, pointer)]
        if rng.random() < 0.3:
            field = int(rng.choice([start + 24 * int(rng.integers(12)) + int(rng.choice([0, 8, 16])), 2106 + 24 + 1]))
            patches.append((field, int(rng.choice([0, 1, 6, 71, 73, 1 << 40])).to_bytes(8, "little")[:8]))
        with damaged(beton, patches):
            by_blocks = outcome(beton)
            with monkeypatch.context() as patch:
                patch.setattr(tables_module, "_is_sound", lambda *args: False)
                assert outcome(beton) == by_blocks
        sound += not isinstance(by_blocks, str)
    assert 20 < sound < 130


def test_what_a_converter_writes_is_not_sorted(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(start: int) -> list[tuple[int, bytes]]:
        content = beton.read_bytes()
        rows = [content[start + 24 * n : start + 24 * (n + 1)] for n in range(NUM_SAMPLES)]
        return [(start + 24 * n, rows[-1 - n]) for n in range(NUM_SAMPLES)]

    expected = outcome(beton)
    with damaged(beton, shuffled(table_start(beton))):  # as FFCV's writer may leave it
        assert outcome(beton) == expected
        monkeypatch.setattr(tables_module, "_sort_and_check", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read_tables(beton)
    assert outcome(beton) == expected


def test_columns_are_filled_into_given_arrays(beton: Path) -> None:
    columns = tables_module.empty_columns(NUM_SAMPLES + 2)
    tables = read_tables(beton, {name: column[1:-1] for name, column in columns.items()})
    for name, dtype in tables_module.COLUMNS.items():
        assert columns[name].dtype == getattr(read_tables(beton), name).dtype == dtype
        assert np.array_equal(columns[name][1:-1], getattr(read_tables(beton), name))
        assert np.shares_memory(columns[name], getattr(tables, name))
    with pytest.raises(BetonError, match="was changed while it was read"):
        read_tables(beton, columns)


def test_more_samples_than_there_are_ids(tmp_path: Path) -> None:
    """A sparse file, which says so and is as long as it says."""
    path, count = tmp_path / "huge.beton", tables_module.MAX_SAMPLES + 1
    with path.open("wb") as file:
        start = layout.align_to_page(layout.METADATA_START + 24 * count, layout.MIN_PAGE_SIZE) + layout.MIN_PAGE_SIZE
        file.write(layout.head_bytes(count, layout.MIN_PAGE_SIZE, start))
        try:
            file.truncate(start + 24 * count)
        except OSError:
            pytest.skip("a file system without files of this size")
    with pytest.raises(BetonError, match=r"holds 4,294,967,297 samples, more than the 4,294,967,296 .* Divide the set"):
        read_tables(path)


def test_missing_file_directory_and_text(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match="does not exist"):
        read_tables(tmp_path / "none.beton")
    with pytest.raises(BetonError, match="is a directory"):
        read_tables(tmp_path)
    (tmp_path / "text.beton").write_text("hello, " * 1000)
    with pytest.raises(BetonError, match=r"not an FFCV \.beton file"):
        read_tables(tmp_path / "text.beton")
