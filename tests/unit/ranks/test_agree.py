"""The ranks tell one another what they are about to do, and the one that differs is named. Ranks are threads here."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks import agree as agreeing
from lowrank_vit.ranks import waiting
from lowrank_vit.ranks.agree import OfRank, agree, differences, gather, gatherer, once
from lowrank_vit.ranks.world import World

LIMIT = timedelta(seconds=60)


@pytest.fixture(autouse=True)
def nobody_else_waits(monkeypatch):
    monkeypatch.setattr(agreeing, "_SPEAKER_FIRST_S", 0.0)


def on_ranks(size: int, call: Callable[[World], Any], stores: list[Any] | None = None) -> list[Any]:
    """What the call gives, or the error that it ends in, on each of the ranks, which have told their hosts."""
    store = HashStore()
    worlds = [World(rank, rank, size, stores[rank] if stores else store) for rank in range(size)]
    for world in worlds:
        world.store.set(f"host/{world.rank}", f"node{world.rank // 2}")
    with ThreadPoolExecutor(size) as pool:
        calls = [pool.submit(call, world) for world in worlds]
        return [done.exception(100) or done.result() for done in calls]


def record(**values: str) -> dict[str, tuple[str, str]]:
    return {name: (value, value) for name, value in values.items()}


def verdicts(*records: dict[str, tuple[str, str]]) -> list[OfRank | None]:
    return on_ranks(len(records), lambda world: agree(world, "run", lambda: records[world.rank], "its start", LIMIT))


def test_what_is_the_same_everywhere_is_agreed_on():
    assert verdicts(*[record(lr="1", opt="sgd")] * 3) == [None] * 3


@pytest.mark.parametrize(
    ("odd", "size", "reference"),
    [([1], 2, 0), ([0], 2, 0), ([0], 3, 1), ([2], 5, 0), ([2, 3], 4, 0)],  # of as many on either side rank 0's count
)
def test_the_rank_that_differs_from_most_is_named_on_all(odd, size, reference):
    errors = verdicts(*[record(lr="2" if rank in odd else "1", opt="sgd") for rank in range(size)])
    named = odd[0] if odd != [0] or size > 2 else 1
    values = "lr is 2, there 1" if named in odd else "lr is 1, there 2"
    assert {error and (error.rank, str(error)) for error in errors} == {(named, str(errors[0]))}
    assert f"would start another run than rank {reference} on " in str(errors[0])
    assert f"{values}. " in str(errors[0])
    assert "opt" not in str(errors[0])
    assert (" So would rank 3." in str(errors[0])) == (odd == [2, 3])


def test_ranks_that_differ_in_different_things_are_all_named():
    (error, *_) = verdicts(record(lr="1", b="8"), record(lr="2", b="8"), record(lr="1", b="8"), record(lr="1", b="4"))
    assert error is not None
    assert error.rank == 1
    assert re.search(r"lr is 2, there 1\. Rank 3 on .* would start yet another: b is 4, there 8\.", str(error))


def test_differences_in_words():
    ours = {**record(a="1", gone="x"), "other images in the set": ("12ab", "/here"), "other labels": ("0", "set")}
    theirs = {**record(a="2", new="y"), "other images in the set": ("34cd", "/there"), "other labels": ("1", "set")}
    assert differences(ours, theirs) == (
        "a is 1, there 2; gone is x, there not known; other images in the set (/here, there /there); "
        "other labels (set); new is not known, there y"
    )
    many = {f"option {n}": (str(n), str(n)) for n in range(20)}
    assert differences(many, {}).endswith("option 7 is 7, there not known; and 12 more")
    assert differences(many, many) == ""


def test_values_are_gathered_by_rank_again_and_again():
    def both(world: World) -> list[list[str]]:
        of_all_ranks = gatherer(world, "loader", "choosing")
        return [of_all_ranks(f"{call} of {world.rank}") for call in "ab"]

    assert on_ranks(3, both) == [[[f"{call} of {rank}" for rank in range(3)] for call in "ab"]] * 3
    assert both(World()) == [["a of 0"], ["b of 0"]]


def test_of_ranks_at_one_place_the_first_does_it_for_all():
    """Again and again, also where one fails: the others then say the same, notes included, as its error."""
    calls = list[tuple[int, str]]()

    def all_three(world: World) -> list[Any]:
        one_of = once(world, "sets", "finding")
        place = "shared" if world.rank in (1, 2, 4) else f"node{world.rank}"

        def do(what: str) -> list[Any]:
            calls.append((world.rank, what))
            if what == "fails" and world.rank in (0, 1):
                error = UserError(f"{what} for {world.rank}")
                error.add_note("a note")
                raise error
            return [what, world.rank, "\udcff"]

        given = [one_of(place, lambda: do("first")), one_of("one", lambda: do("second"))]
        try:
            return [*given, one_of(place, lambda: do("fails"))]
        except UserError as error:
            return [*given, (str(error), error.__notes__, error.rank if isinstance(error, OfRank) else None)]

    found = on_ranks(5, all_three)
    at = [0, 1, 1, 3, 1]
    assert [one[:2] for one in found] == [[["first", n, "\udcff"], ["second", 0, "\udcff"]] for n in at]
    failed = [("fails for 0", ["a note"], None), *[("fails for 1", ["a note"], n) for n in (None, 1, 1)]]
    assert [found[rank][2] for rank in (0, 1, 2, 4)] == failed
    assert found[3][2] == ["fails", 3, "\udcff"]
    assert sorted(calls) == sorted([*[(n, w) for n in (0, 1, 3) for w in ("first", "fails")], (0, "second")])
    calls.clear()
    assert all_three(World())[:2] == [["first", 0, "\udcff"], ["second", 0, "\udcff"]]


def test_afterwards_the_one_that_did_it_is_as_far_as_those_that_waited():
    """Else it would count as the one that all others wait for, whoever is stuck later."""

    def place(world: World) -> int:
        one_of = once(world, "sets", "finding")
        for shared in ("one", f"node{world.rank // 2}", f"rank {world.rank}"):
            one_of(shared, lambda: None)
        return world.progress.place

    assert len(set(on_ranks(4, place))) == 1


def test_a_rank_that_does_not_come_is_named_with_its_host(monkeypatch, capsys):
    """While it is waited for, by the first of those that wait, and when the time is over."""
    monkeypatch.setattr(waiting, "_FIRST_LINE_S", 0.05)
    monkeypatch.setattr(waiting, "_NEXT_LINE_S", 0.1)
    for late in (2, 0):

        def call(world: World, late: int = late) -> Any:
            return None if world.rank == late else gather(world, "data", 1, "opening the data", timedelta(seconds=1))

        errors = on_ranks(4, call)
        told = rf"^rank {late} on node{late // 2} did not finish opening the data within 0:00:01"
        assert all(re.search(told, str(error)) for rank, error in enumerate(errors) if rank != late)
        lines = set(capsys.readouterr().out.splitlines())
        assert lines == {f"waiting for rank {late} on node{late // 2} to finish opening the data"}


def test_64_ranks_agree_over_one_store():
    """Each has a client of its own, and a record as long as a run's. docs/design/ranks.md has the time it takes."""
    server = TCPStore("127.0.0.1", 0, 64, is_master=True, wait_for_workers=False)
    clients = [TCPStore("127.0.0.1", server.port, 64, is_master=False, wait_for_workers=False) for _ in range(64)]
    said = {f"--option-{n}": (f"{n}", f"{n}") for n in range(150)}

    def call(world: World) -> None:
        agree(world, "run", lambda: said, "its start", LIMIT)
        agree(world, "data", lambda: said | record(lr=str(world.rank // 63)), "opening the data", LIMIT)

    errors = on_ranks(64, call, [PrefixStore("attempt", client) for client in clients])
    assert {error.rank for error in errors} == {63}
    assert "rank 63: on" not in str(errors[0])
    assert "lr is 1, there 0" in str(errors[0])
