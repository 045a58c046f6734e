"""The ranks compare their records through torch's store, before collectives that would hang or mix up data.

A rank may arrive minutes later than another, so nothing here is a collective: rank 0 reads what the others have
written, decides, and writes the outcome.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks.waiting import saying, until
from lowrank_vit.ranks.world import World

T = TypeVar("T")
R = TypeVar("R")

Record = Mapping[str, Sequence[str]]
"""A rank's record: by name, a text that is compared, and one that is shown in a message.

A third text, if any, tells what to do if the texts differ.
"""


class OfRank(UserError):
    """An error that belongs to `rank`, whichever rank raises it."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


_SHOWN = 8
_SPEAKER_FIRST_S = 3.0
"""Wait of the ranks that do not report the error; by then the rank that does has ended them all."""


def gather(world: World, topic: str, value: T, doing: str, limit: timedelta | None = None) -> list[T]:
    """Every rank's value, in order of the ranks, on every rank; values must be JSON. Each rank calls it once per topic.

    After 20 seconds, and then once a minute, a line tells which ranks are still `doing` the previous work. Raises
    `UserError` if they do not arrive within the limit.
    """
    return _decide(world, topic, value, lambda values: values, doing, limit)


def gatherer(world: World, topic: str, doing: str) -> Callable[[Any], list[Any]]:
    """`gather` as a function of the value alone; all ranks must make the same calls in the same order."""
    calls = itertools.count()
    return lambda value: gather(world, f"{topic}/{next(calls)}", value, doing)


def once(world: World, topic: str, doing: str) -> Callable[[str, Callable[[], Any]], Any]:
    """A function of a place and of work to do there: one rank of those that name the same place does it for all.

    All of them get its value, which must be JSON; its `UserError` is raised on all with the same text. All ranks must
    make the same calls in the same order. While the others wait, a line tells for whom, as in `gather`.
    """
    calls = itertools.count()

    def one_of_a_place(place: str, do: Callable[[], Any]) -> Any:
        if world.size == 1 or world.store is None:
            return do()
        call = f"{topic}/{next(calls)}"
        first_in = _decide(world, call, place, _first_in, doing, None)
        doer = first_in[place]
        if doer != world.rank:
            speaks = next(rank for rank in range(world.size) if rank not in first_in.values()) == world.rank
            return _done_by(world, doer, f"{call}/done/{doer}", doing, speaks=speaks)
        try:
            told = {"value": do()}
        except UserError as error:
            notes = getattr(error, "__notes__", [])
            world.store.set(f"{call}/done/{doer}", json.dumps({"error": str(error), "notes": notes}))
            raise
        with world.progress.waiting(is_said=True):  # it is then at the same point as the ranks that waited for it
            world.store.set(f"{call}/done/{doer}", json.dumps(told))
        return told["value"]

    return one_of_a_place


def _first_in(places: list[str]) -> dict[str, int]:
    """The lowest rank of each place."""
    return {place: rank for rank, place in reversed(list(enumerate(places)))}


def _done_by(world: World, rank: int, key: str, doing: str, *, speaks: bool) -> Any:
    """Wait for another rank's value. Raises `OfRank` with the text of its error."""
    line = f"waiting for {_named(world, [rank])} to finish {doing}" if speaks else ""
    with world.progress.waiting(is_said=True), saying(lambda: line):
        if not until(lambda: world.store.check([key]), world.start_limit, world.size):
            raise _late(world, [rank], doing, world.start_limit)
    told = json.loads(world.store.get(key))
    if "error" not in told:
        return told["value"]
    until(lambda: False, timedelta(seconds=_SPEAKER_FIRST_S))
    error = OfRank(told["error"], rank)
    for note in told["notes"]:
        error.add_note(note)
    raise error


def agree(world: World, topic: str, record: Callable[[], Record], doing: str, limit: timedelta | None = None) -> None:
    """Raise `UserError` on all ranks if one has another record than most, or than rank 0; the rank is named.

    A single process makes no record.
    """
    if world.size == 1:
        return
    told = {"host": socket.gethostname(), "record": {name: list(texts) for name, texts in record().items()}}
    verdict = _decide(world, topic, told, _verdict, doing, limit)
    if verdict is None:
        return
    speaker, text = verdict
    if world.rank != speaker:
        until(lambda: False, timedelta(seconds=_SPEAKER_FIRST_S))
    raise OfRank(text, speaker)


def _decide(
    world: World, topic: str, value: T, decision: Callable[[list[T]], R], doing: str, limit: timedelta | None
) -> R:
    """The result, on every rank, of `decision` on rank 0 for the values of all ranks."""
    if world.size == 1 or world.store is None:
        return decision([value])
    store, outcome, limit = world.store, f"{topic}/outcome", limit or world.start_limit
    keys = [f"{topic}/{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], json.dumps(value))

    def missing() -> list[int]:
        return [int(key.rpartition("/")[2]) for key in _missing(store, keys)]

    def line() -> str:
        # The first of the waiting ranks prints the line.
        if any(store.check([key]) for key in keys[: world.rank]) or not (late := missing()):
            return ""
        return f"waiting for {_named(world, late)} to finish {doing}"

    wanted = keys if world.is_first else [outcome]
    with world.progress.waiting(is_said=True), saying(line):
        if not until(lambda: store.check(wanted), limit, world.size):
            raise _late(world, missing() or [0], doing, limit)
    if world.is_first:
        values = [json.loads(text) for text in store.multi_get(keys)]
        store.set(outcome, json.dumps(decision(values)))
    return json.loads(store.get(outcome))


def _late(world: World, ranks: Sequence[int], doing: str, limit: timedelta) -> OfRank:
    return OfRank(
        f"{_named(world, ranks)} did not finish {doing} within {limit}. See what holds it up there; a slow disk or a "
        "dead mount is the usual reason.",
        ranks[0],
    )


def _missing(store: Any, keys: list[str]) -> list[str]:
    """Those that are not there; it asks seldom where these are few."""
    if store.check(keys):
        return []
    half = len(keys) // 2
    return _missing(store, keys[:half]) + _missing(store, keys[half:]) if half else keys


def _named(world: World, ranks: Sequence[int]) -> str:
    """Ranks with their hosts, in words."""
    shown = [f"rank {rank} on {world.host(rank)}" for rank in ranks[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _verdict(told: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first rank with another record than most, and what is to be said of it and of the others; None for none.

    Where as many have one record as another, rank 0's counts, or the one of the lowest rank.
    """
    records = [{name: texts[0] for name, texts in one["record"].items()} for one in told]
    kinds = [json.dumps(record, sort_keys=True) for record in records]
    usual = max(Counter(kinds).items(), key=lambda kind: (kind[1], -kinds.index(kind[0])))[0]
    others = [rank for rank, kind in enumerate(kinds) if kind != usual]
    if not others:
        return None
    reference, speaker = kinds.index(usual), others[0]
    ours, theirs = told[speaker], told[reference]
    found = differences(ours["record"], theirs["record"])
    text = f"on {ours['host']} it would start another run than rank {reference} on {theirs['host']}: {found}."
    if alike := [rank for rank in others[1:] if kinds[rank] == kinds[speaker]]:
        text += f" So would {_listed(alike)}."
    for rank in [rank for rank in others if kinds[rank] != kinds[speaker]][:2]:
        found = differences(told[rank]["record"], theirs["record"])
        text += f" Rank {rank} on {told[rank]['host']} would start yet another: {found}."
    texts = [(texts, theirs["record"].get(name)) for name, texts in ours["record"].items()]
    advice = [own[2] for own, other in texts if len(own) > 2 and (other is None or own[0] != other[0])]
    advice = [*advice, "Start all ranks with one command line, one version of the code, and the same data."]
    return speaker, " ".join([text, *advice])


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN]))}{more}"


def differences(ours: Record, theirs: Record) -> str:
    """The differences of two records as a text: each by name, with both values."""
    found = list[str]()
    for name in dict.fromkeys([*ours, *theirs]):
        own, other = ours.get(name), theirs.get(name)
        if own is None or other is None:
            found.append(f"{name} is {own[1] if own else 'not known'}, there {other[1] if other else 'not known'}")
        elif own[0] != other[0]:
            shown = own[1] if own[1] == other[1] else f"{own[1]}, there {other[1]}"
            is_shown = own[0] == own[1]
            found.append(f"{name} is {shown}" if is_shown else f"{name} ({shown})")
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
