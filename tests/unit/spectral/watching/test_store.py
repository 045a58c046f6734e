"""The store: whole files, in order, below its size limit, and readable while it grows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.measures.metrics import recorded_indices
from lowrank_vit.spectral.solving.extremes import Solved, Triplets
from lowrank_vit.spectral.watching import store
from lowrank_vit.spectral.watching.store import SpectraStore, list_spectra, list_vectors, read_spectra, read_vectors

K = 40


def solved(seed: int, k: int = K) -> Solved:
    rng = np.random.default_rng(seed)

    def end() -> Triplets:
        return Triplets(rng.random(2), rng.random((50, 2)), rng.random((k, 2)), rng.random(2))

    return Solved(np.sort(rng.random(k))[::-1], end(), end(), 0.0, "gram64")


def kept(folder: Path) -> tuple[list[int], list[int]]:
    """The updates that are stored, by the files' names: those of spectra and those of vectors."""
    spectra, vectors = ([int(p.stem.rpartition("_")[2]) for p in of(folder)] for of in (list_spectra, list_vectors))
    return spectra, vectors


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    content = {"spec/blocks.0.attn.qkv": solved(0), "spec_ema/head": solved(1)}
    SpectraStore(tmp_path, 1e9).save(20, content)
    assert read_vectors(tmp_path / "vectors_00000020.npz").update == 20
    spectra = read_spectra(tmp_path / "update_00000020.npz").spectra
    vectors = read_vectors(tmp_path / "vectors_00000020.npz").ends
    assert list(spectra) == list(vectors) == list(content)
    for key, one in content.items():
        np.testing.assert_array_equal(spectra[key], one.s)
        for found, expected in zip(vectors[key], (one.top, one.last), strict=True):
            for name in ("s", "u", "v", "certificate"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("topk", "interval"), [(3, 1), (1, 5), (3, 2), (2, 6), (9, 4)])
def test_the_block_of_the_recorded_vectors_is_kept_and_with_no_gaps_nothing_is_added(
    tmp_path: Path, topk: int, interval: int
) -> None:
    rng = np.random.default_rng(0)
    every = Triplets(rng.random(10), rng.random((12, 10)), rng.random((10, 10)), rng.random(10))
    indices = recorded_indices(10, topk, interval)
    one = Solved(every.s, every, every, 0.0, "gram64").recorded(indices)
    SpectraStore(tmp_path, 1e9).save(0, {"spec/m": one})
    with np.load(tmp_path / "vectors_00000000.npz") as arrays:
        stored = sum(arrays[name].shape[-1] for name in arrays.files if name.endswith(":u"))
    k, p = len(indices.top), indices.top[-1]
    assert stored == 2 * k + (p - k)
    (found, _, newest) = SpectraStore(tmp_path, 1e9).first_and_last(0)
    block = found["spec/m"].block
    assert (block is None) == (p == k)
    for name in ("s", "u", "v", "certificate") if block else ():
        np.testing.assert_array_equal(getattr(block, name), getattr(every, name)[..., :p])
        np.testing.assert_array_equal(getattr(newest["spec/m"].block, name), getattr(block, name))


def test_a_small_limit_thins_evenly_and_keeps_both_ends(tmp_path: Path) -> None:
    one = SpectraStore(tmp_path, 1e9)
    one.save(0, {"spec/m": solved(0)})
    of_spectra, of_vectors = ((tmp_path / f"{p}_00000000.npz").stat().st_size for p in ("update", "vectors"))
    limit = max(10 * of_spectra / 0.25, 6 * of_vectors / 0.75)
    grown = SpectraStore(tmp_path, limit)
    for update in range(10, 1010, 10):
        grown.save(update, {"spec/m": solved(update)})
        assert size(tmp_path) <= limit
        for updates in kept(tmp_path):
            assert updates[0] == 0
            assert updates[-1] == update
            distances = [b - a for a, b in itertools.pairwise(updates[:-1])]
            assert len(set(distances)) <= 1
    assert all(len(updates) >= 4 for updates in kept(tmp_path))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(1, 39), st.integers(0, 3))
def test_a_store_that_is_opened_again_goes_on_thinning_in_the_same_way(
    tmp_path_factory: pytest.TempPathFactory, count: int, break_at: int, jitter: int
) -> None:
    whole, broken = (tmp_path_factory.mktemp("s") for _ in range(2))
    one, other = SpectraStore(whole, 12_000), SpectraStore(broken, 12_000)
    for n in range(count):
        update = 10 * n + (n * 7) % (jitter + 1)
        if n == break_at:
            other = SpectraStore(broken, 12_000)
        found = {"spec/m": solved(n)}
        one.save(update, found)
        other.save(update, found)
        for updates in (*kept(whole), *kept(broken)):
            assert updates[0] == 0
            assert updates[-1] == update
    if not jitter:
        assert kept(broken) == kept(whole)


def test_a_limit_below_one_refresh_keeps_the_first_and_the_newest(tmp_path: Path) -> None:
    tiny = SpectraStore(tmp_path, 10)
    for update in range(5):
        tiny.save(update, {"spec/m": solved(update)})
    assert kept(tmp_path) == ([0, 4], [0, 4])


def test_first_and_last_up_to_an_update_and_forgetting_what_came_later(tmp_path: Path) -> None:
    one = SpectraStore(tmp_path, 1e9)
    assert one.first_and_last(99) == ({}, None, {})
    content = {update: solved(update) for update in (0, 5, 10)}
    for update, found in content.items():
        one.save(update, {"spec/m": found})
    first, update, last = one.first_and_last(7)
    assert update == 5
    np.testing.assert_array_equal(first["spec/m"].top.u, content[0].top.u)
    np.testing.assert_array_equal(last["spec/m"].last.v, content[5].last.v)
    np.testing.assert_array_equal(last["spec/m"].s, content[5].s)
    one.forget_after(7)
    assert kept(tmp_path) == ([0, 5], [0, 5])


def test_a_damaged_newest_file_is_passed_over(tmp_path: Path) -> None:
    one = SpectraStore(tmp_path, 1e9)
    for update in (0, 5, 10):
        one.save(update, {"spec/m": solved(update)})
    path = tmp_path / "vectors_00000010.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert one.first_and_last(10)[1] == 5
    with pytest.raises(UserError, match=r"vectors_00000010\.npz"):
        read_vectors(path)


def test_stores_sort_by_update_and_damaged_files_are_named(tmp_path: Path) -> None:
    for update in (100_000_000, 20, 3):
        store.write_spectra(tmp_path, update, {"spec/head": np.ones(2)})
    assert [store.read_spectra(path).update for path in store.list_spectra(tmp_path)] == [3, 20, 100_000_000]
    path = store.list_spectra(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"update_00000003\.npz"):
        store.read_spectra(path)
    assert store.list_spectra(tmp_path / "none") == []


def test_a_place_that_cannot_be_made_or_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose a writable output directory"):
        SpectraStore(tmp_path / "file" / "spectra", 1e9).begin()
    (tmp_path / "spectra" / "index.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"index\.json"):
        SpectraStore(tmp_path / "spectra", 1e9, {}).begin()
    gone = SpectraStore(tmp_path / "gone" / "spectra", 1e9)
    with pytest.raises(UserError, match="spectra of update 3"):  # with the run's own directory: not made anew
        gone.save(3, {"spec/m": solved(0)})


@pytest.mark.parametrize(
    "name", ["update_00000002.npz.partial", "index.json.partial", ".vectors_00000002.npz.0123abcd.part"]
)
def test_what_a_killed_process_has_left_is_removed_when_the_run_goes_on(tmp_path: Path, name: str) -> None:
    one = SpectraStore(tmp_path, 1e9)
    one.save(0, {"spec/m": solved(0)})
    (tmp_path / name).write_bytes(b"half")
    one.forget_after(0)
    assert not (tmp_path / name).exists()
    assert kept(tmp_path) == ([0], [0])


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    foreign = [
        tmp_path / name for name in ("update_best.npz", "vectors_1.npz", "weights_final.pth", "update_0000000x.npz")
    ]
    for path in foreign:
        path.write_text("")
    one = SpectraStore(tmp_path, 0)
    for update in range(3):
        one.save(update, {"spec/m": solved(update)})
    assert kept(tmp_path) == ([0, 2], [0, 2])
    one.forget_after(0)
    assert kept(tmp_path) == ([0], [0])
    assert one.kept(9) is None
    assert one.first_and_last(9)[1] == 0
    one.forget()
    assert sorted(tmp_path.iterdir()) == sorted(foreign)
