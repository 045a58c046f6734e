"""An open set whose columns and samples are maps of its files: copied, relabelled, and its files changed meanwhile."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_prep.formats.beton import METADATA_START, find_parts
from data_prep.formats.sidecars import manifest_path
from data_prep.formats.tables import COLUMNS
from lowrank_vit.common.errors import BetonError
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan


def test_many_files_need_few_descriptors(made, tmp_path):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
from lowrank_vit.data.sets.beton import Beton
beton = Beton({str(made / "many" / "train.beton")!r})
print(sum(len(beton.sample(i)) for i in range(1000)) == beton.stored_bytes)
beton.check_unchanged()
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"True\n"


def test_only_the_files_of_a_batch_are_looked_at(beton, monkeypatch):
    opened = Beton(beton)
    opened.sample(0)
    looked: list[int] = []
    monkeypatch.setattr(Beton, "_size_now", lambda self, part: looked.append(part) or int(self._index.file_sizes[part]))
    opened.check_unchanged(np.array([30, 999, 31]))
    assert looked == sorted({opened._part_of(i) for i in (30, 999)})


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_that_loses_bytes_is_noticed_also_under_another_name(beton, moved):
    opened = Beton(beton)
    last = opened.parts[-1]
    start, out = int(opened.pointers[999]), np.empty(opened.sizes[999], np.uint8)
    opened.sample(999)
    if moved:
        last = last.rename(last.with_suffix(".moved"))
        opened.check_unchanged()
    os.truncate(last, 5000)
    if len(opened.parts) > 1:
        opened.check_unchanged(np.array([0]))
    with pytest.raises(BetonError, match=rf"{opened.parts[-1].name} was cut from .* while it was open"):
        opened.check_unchanged(np.array([999]))
    with pytest.raises(BetonError, match="was cut from"):
        opened.read_into(start, out)


def test_a_file_that_was_shorter_when_it_was_mapped_is_noticed(beton):
    opened = Beton(beton)
    last = opened.parts[-1]
    content = last.read_bytes()
    last.write_bytes(content[:5000])
    assert len(opened.bytes)  # which maps it
    other = last.with_suffix(".other")
    other.write_bytes(content)
    other.replace(last)
    with pytest.raises(BetonError, match="was cut from"):
        opened.check_unchanged()


def test_removed_files_are_read_to_the_end(beton):
    opened, out = Beton(beton), np.empty(0, np.uint8)
    expected = opened.sample(999).tobytes()
    for part in opened.parts:
        part.unlink()
    opened.check_unchanged()
    out = np.empty(int(opened.sizes[999]), np.uint8)
    opened.read_into(int(opened.pointers[999]), out)
    assert out.tobytes() == opened.sample(999).tobytes() == expected


def test_labels_are_mapped_where_they_are_asked_for(beton):
    opened, labels = Beton(beton), Beton(beton).labels.copy()
    digests = opened.digests()
    opened.relabel(range(10), None)
    if len(opened.parts) > 1:
        assert np.shares_memory(opened.labels, opened._index.columns["labels"])
    assert opened.digests() == digests
    mapping = np.random.default_rng(1).permutation(10)
    opened.relabel(mapping.tolist(), [str(n) for n in range(10)])
    opened.relabel([*range(1, 10), 0], None)
    expected = (mapping[labels] + 1) % 10
    assert np.array_equal(opened.labels, expected)
    assert np.array_equal(opened.labels_of(np.array([999, 3])), expected[[999, 3]])
    assert opened.digests()[0] != digests[0]
    assert opened.digests()[1] == digests[1]


def test_whole_columns_are_arrays_like_any_other(beton):
    opened = Beton(beton)
    for name, dtype in {"heights": np.int32, "widths": np.int32, "labels": np.int64}.items():
        column = getattr(opened, name)
        assert column.dtype == dtype
        assert column.flags.aligned
        assert column.flags.c_contiguous
        assert not column.flags.writeable
        assert column is getattr(opened, name)
    ids = np.array([999, 3, 3])
    for side, column in zip(opened.sides_of(ids), (opened.heights, opened.widths), strict=True):
        assert side.tolist() == column[ids].tolist()


@pytest.mark.parametrize("by_list", [False, True])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_maps_the_files_itself(beton, copied, by_list):
    opened = Beton(find_parts(beton) or [beton]) if by_list else Beton(beton)
    opened.relabel(range(10, 0, -1), [str(n) for n in range(11)])
    assert len(pickle.dumps(opened)) < 10_000
    other = copied(opened)
    for name in COLUMNS:
        assert getattr(other, name).tolist() == getattr(opened, name).tolist()
    assert (other.path, other.parts, other.classes) == (opened.path, opened.parts, opened.classes)
    assert other.sample(999).tobytes() == opened.sample(999).tobytes()
    assert not other.pointers.flags.writeable


def test_a_copy_of_a_set_that_is_another_by_now(made, beton):
    kept = pickle.dumps(Beton(beton))
    manifest_path(Beton(beton).parts[0]).unlink()
    with pytest.raises(BetonError, match="is another set than the one that was copied"):
        pickle.loads(kept)


def test_a_plan_of_an_object_that_passes_on_names_is_of_its_own_images(beton):
    class Some:
        """Some images of a set; all else is the set's."""

        def __init__(self, all_images: Beton, ids: range) -> None:
            self._all, self.heights, self.widths = all_images, all_images.heights[ids], all_images.widths[ids]

        def __getattr__(self, name: str):
            return getattr(self._all, name)

    some = Some(Beton(beton), range(990, 997))
    plan = EvalPlan.of(some, img_size=8, batch_size=7)
    assert (plan.num_samples, plan.heights.tolist()) == (7, some.heights.tolist())


def test_a_file_that_is_its_own_index_and_was_written_to_is_noticed(beton):
    opened = Beton(beton)
    ids, others = np.array([30, 999, 31]), np.array([29, 998])
    opened.sample(0)
    opened.check_unchanged(ids)
    if len(opened.parts) > 1:
        return
    rows = METADATA_START + 24 * 999
    end = len(opened.bytes)
    for offset, patch in {
        5: (end - 1).to_bytes(8, "little"),
        6: b"\xff" * 7,
        1: bytes(2),
        16: (10).to_bytes(8, "little"),
        17: b"\xff" * 7,
        0: b"\1",
    }.items():
        with beton.open("r+b") as file:
            file.seek(rows + offset)
            before = file.read(len(patch))
            file.seek(rows + offset)
            file.write(patch)
            file.flush()
            with pytest.raises(BetonError, match="was written to while it was open"):
                opened.check_unchanged(ids)
            opened.check_unchanged(others)
            file.seek(rows + offset)
            file.write(before)
        opened.check_unchanged(ids)
