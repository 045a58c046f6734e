"""The store: whole files, in order, below its size limit, and readable while it grows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.measures.metrics import recorded_indices
from lowrank_vit.spectral.solving.extremes import Solved, Triplets
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching.files import list_spectra, list_vectors, read_spectra, read_vectors
from lowrank_vit.spectral.watching.store import SpectraStore, Stored
from lowrank_vit.spectral.watching.stored import open_spectra

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
    found = SpectraStore(tmp_path, 1e9).stored(0)
    block = found.first["spec/m"].block
    assert (block is None) == (p == k)
    for name in ("s", "u", "v", "certificate") if block else ():
        np.testing.assert_array_equal(getattr(block, name), getattr(every, name)[..., :p])
        np.testing.assert_array_equal(getattr(found.last["spec/m"].block, name), getattr(block, name))


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


@settings(max_examples=30)
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
    assert one.stored(99) == Stored({}, {}, None, {}, None)
    content = {update: solved(update) for update in (0, 5, 10)}
    for update, found in content.items():
        one.save(update, {"spec/m": found})
    found = one.stored(7)
    assert found.last_update == found.whole_update == 5
    np.testing.assert_array_equal(found.first["spec/m"].top.u, content[0].top.u)
    for of in (found.last, found.whole):
        np.testing.assert_array_equal(of["spec/m"].last.v, content[5].last.v)
        np.testing.assert_array_equal(of["spec/m"].s, content[5].s)
    one.forget_after(7)
    assert kept(tmp_path) == ([0, 5], [0, 5])


def test_a_damaged_newest_file_is_passed_over(tmp_path: Path) -> None:
    one = SpectraStore(tmp_path, 1e9)
    for update in (0, 5, 10):
        one.save(update, {"spec/m": solved(update)})
    path = tmp_path / "vectors_00000010.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert one.stored(10).last_update == 5
    with pytest.raises(UserError, match=r"vectors_00000010\.npz"):
        read_vectors(path)


def test_stores_sort_by_update_and_damaged_files_are_named(tmp_path: Path) -> None:
    for update in (100_000_000, 20, 3):
        files.write_spectra(tmp_path, update, {"spec/head": np.ones(2)})
    assert [files.read_spectra(path).update for path in files.list_spectra(tmp_path)] == [3, 20, 100_000_000]
    path = files.list_spectra(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"update_00000003\.npz"):
        files.read_spectra(path)
    assert files.list_spectra(tmp_path / "none") == []


def test_a_place_that_cannot_be_made_or_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose a directory that can be written"):
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
    assert one.stored(9).last_update == 0
    one.forget()
    assert sorted(tmp_path.iterdir()) == sorted(foreign)


def first_alone(seed: int) -> Solved:
    """As a refresh of the first values alone has it, with the values between the recorded ones known, too."""
    one = solved(seed)
    s = np.where(np.arange(K) < 4, one.s, np.nan)
    block = Triplets(s[:3], np.ones((50, 3)), np.ones((K, 3)), np.zeros(3))
    return replace(one, s=s, last=one.last.pick([]), block=block, full=False)


def test_refreshes_of_the_first_values_alone_are_stored_beside_whole_ones_and_read_as_what_they_are(
    tmp_path: Path,
) -> None:
    one = SpectraStore(tmp_path, 1e9)
    for update in range(6):
        found = solved(update) if update % 3 == 0 else first_alone(update)
        one.save(update, {"spec/m": found}, full=update % 3 == 0)
    whole, part = (read_spectra(tmp_path / f"update_0000000{update}.npz") for update in (3, 4))
    assert (whole.full, part.full) == (True, False)
    np.testing.assert_array_equal(part.spectra["spec/m"], first_alone(4).s)
    vectors = read_vectors(tmp_path / "vectors_00000004.npz")
    assert (vectors.full, vectors.ends["spec/m"][1].s.size, vectors.blocks["spec/m"].s.size) == (False, 0, 3)
    found = one.stored(5)
    assert (found.last_update, found.whole_update) == (5, 3)
    assert (found.last["spec/m"].full, found.whole["spec/m"].full) == (False, True)
    np.testing.assert_array_equal(found.last["spec/m"].s, first_alone(5).s)
    np.testing.assert_array_equal(found.whole["spec/m"].last.u, solved(3).last.u)
    # Someone who asks for no update gets what has all values.
    spectra = open_spectra(tmp_path)
    assert (spectra.updates, spectra.full_updates) == ([0, 1, 2, 3, 4, 5], [0, 3])
    np.testing.assert_array_equal(spectra.values("m"), solved(3).s)
    assert np.isnan(spectra.values("m", 5)).sum() == K - 4
    assert [end.s.size for end in spectra.vectors("m")] == [2, 2]
    assert [end.s.size for end in spectra.vectors("m", 5)] == [2, 0]
    updates, values = spectra.series("m")
    assert updates.tolist() == spectra.updates
    assert np.isnan(values[:, -1]).tolist() == [False, True, True, False, True, True]
    # In a whole file nothing is new.
    with np.load(tmp_path / "update_00000003.npz") as arrays:
        assert arrays.files == ["update", "spec/m"]


@pytest.mark.parametrize("full_every", [2, 3, 5])
def test_the_newest_whole_spectra_stay_when_a_series_is_thinned_also_by_another_process(
    tmp_path: Path, full_every: int
) -> None:
    newest = 0
    for n in range(40):
        full = n % full_every == 0
        store = SpectraStore(tmp_path, 60_000)  # anew each time, as of runs that are resumed
        store.save(10 * n, {"spec/m": solved(n) if full else first_alone(n)}, full=full)
        newest = 10 * (n // full_every * full_every)
        for of in kept(tmp_path):
            assert {0, newest, 10 * n} <= set(of)
        assert size(tmp_path) <= 60_000 or len(kept(tmp_path)[1]) <= 3
        assert store.stored(10 * n).whole_update == newest
    for of in kept(tmp_path):  # on one grid, but for those that always stay
        grid = sorted(set(of) - {newest, 390})
        assert len(grid) >= 3
        assert len(set(np.diff(grid))) == 1


@pytest.mark.parametrize("full_every", [2, 3, 50])
def test_with_no_room_at_all_the_first_the_newest_and_the_newest_of_whole_spectra_stay(
    tmp_path: Path, full_every: int
) -> None:
    store = SpectraStore(tmp_path, 0)
    for n in range(8):
        full = n % full_every == 0
        store.save(n, {"spec/m": solved(n) if full else first_alone(n)}, full=full)
        for of in kept(tmp_path):
            assert sorted(of) == sorted({0, n // full_every * full_every, n})
