"""The hand-over between streams, with streams that do their work when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from lowrank_vit.common.devices import KeptAlive, Mark, current_stream, each_in_turn, in_turn, on_stream, side_stream
from lowrank_vit.config.flags import parse
from lowrank_vit.data.loader import _OwnStream
from lowrank_vit.ranks.world import World
from lowrank_vit.training.step import stream_of_step

CPU = torch.device("cpu")


class Event:
    """Of `torch.cuda.Event` what is used."""

    def __init__(self) -> None:
        self.is_passed, self.waited_on_host = False, 0

    def query(self) -> bool:
        return self.is_passed

    def synchronize(self) -> None:
        self.waited_on_host += 1


class Stream:
    """Of `torch.cuda.Stream` what is used: work in order, which stops at an event that has not passed."""

    def __init__(self) -> None:
        self._asked: deque[Callable[[], bool]] = deque()

    def ask(self, work: Callable[[], object]) -> None:
        self._asked.append(lambda: (work(), True)[1])

    def record_event(self) -> Event:
        event = Event()
        self.ask(lambda: setattr(event, "is_passed", True))
        return event

    def wait_event(self, event: Event) -> None:
        self._asked.append(event.query)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def run(self) -> None:
        while self._asked and self._asked[0]():
            self._asked.popleft()


class Memory:
    """A tensor on a device."""

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.content, self.readers = torch.device(device), "", list[Any]()

    def record_stream(self, stream: Any) -> None:
        self.readers.append(stream)


def test_a_stream_reads_what_another_has_made_by_then():
    maker: Any = Stream()
    reader: Any = Stream()
    batch: Any = Memory()
    seen: list[str] = []
    maker.ask(lambda: setattr(batch, "content", "first"))
    made = Mark.of(maker)
    maker.ask(lambda: setattr(batch, "content", "second"))
    made.hand_over(reader, batch)
    reader.ask(lambda: seen.append(batch.content))
    assert batch.readers == [reader]
    reader.run()
    assert seen == []
    assert not made.is_reached()
    maker._asked = deque(list(maker._asked)[:2])
    maker.run()
    assert made.is_reached()
    reader.run()
    assert seen == ["first"]


def test_work_in_turn_begins_behind_what_is_around_it_which_goes_on_behind_it(monkeypatch):
    around: Any = Stream()
    own: Any = Stream()
    around.device = own.device = torch.device("cuda")
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: around)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    around.ask(lambda: done.append("before"))
    with in_turn(own):
        own.ask(lambda: done.append("in turn"))
    around.ask(lambda: done.append("behind"))
    own.run()
    assert done == []
    for stream in (around, own, around):
        stream.run()
    assert done == ["before", "in turn", "behind"]
    with in_turn(None):
        assert float(torch.ones(1)) == 1


class OneCurrent:
    """Of `torch.cuda` which stream is current, which a thread's contexts change and put back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = self.another()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)

    def another(self) -> Any:
        stream: Any = Stream()
        stream.device = torch.device("cuda")
        return stream

    @contextmanager
    def _entered(self, stream: Any) -> Generator[None]:
        around, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = around


def test_what_is_taken_one_by_one_leaves_its_stream_to_itself(monkeypatch):
    """Two at once, each on its own, however they end."""
    current, closed_on = OneCurrent(monkeypatch), list[Any]()
    default, streams = current.stream, [current.another() for _ in range(3)]

    def items() -> Generator[Any]:
        try:
            for _ in range(3):
                yield current.stream
            raise KeyError
        finally:
            closed_on.append(current.stream)

    first, second, failing = (each_in_turn(stream, items()) for stream in streams)
    for taken, stream in ((first, 0), (second, 1), (first, 0), (second, 1)):
        assert next(taken) is streams[stream]
        assert current.stream is default
    first.close()
    second.close()
    with pytest.raises(KeyError):
        assert list(failing) == []
    assert closed_on == streams
    assert current.stream is default
    assert list(each_in_turn(None, (n for n in range(3)))) == [0, 1, 2]


def test_the_step_comes_before_the_spectra_and_its_batches_come_with_it(on_cuda_path):
    watched, unwatched = (parse(["--device", "cpu", flag]) for flag in ("--spec-monitor", "--no-spec-monitor"))
    assert stream_of_step(watched, World()) is None
    with on_cuda_path():
        assert stream_of_step(unwatched, World()) is None
        step: Any = stream_of_step(watched, World())
        batches: Any = _OwnStream(CPU)._stream
        spectra: Any = side_stream(CPU)
        assert step.priority == batches.priority < spectra.priority == 0


def test_memory_of_the_host_has_no_streams():
    made, on_host, stream = Mark.of(Stream()), Memory("cpu"), Stream()  # type: ignore[arg-type]
    made.hand_over(stream, on_host)  # type: ignore[arg-type]
    assert on_host.readers == []


def test_without_cuda_all_is_done_at_once():
    assert side_stream(CPU) is None
    assert current_stream(CPU) is None
    mark = Mark.of(current_stream(CPU))
    mark.hand_over(side_stream(CPU), torch.zeros(1))
    mark.wait_on_host()
    assert mark.is_reached()
    with on_stream(None):
        assert float(torch.ones(1)) == 1


def marks(count: int) -> tuple[list[Mark], list[Event]]:
    events: Any = [Event() for _ in range(count)]
    return [Mark(event) for event in events], events


@pytest.mark.parametrize("at_least", [0, 1])
def test_objects_live_until_their_mark_is_reached(at_least):
    kept, (until, events) = KeptAlive(), marks(4)
    for n in range(3):
        kept.keep(n, until[n], at_least=at_least)
    assert [objects for _, objects in kept._kept] == [0, 1, 2]
    events[1].is_passed = True  # streams may differ: what is behind one that is not reached stays
    events[3].is_passed = True
    kept.keep(3, until[3], at_least=at_least)
    assert len(kept._kept) == 4
    events[0].is_passed = events[2].is_passed = True
    kept.keep(4, Mark(None), at_least=at_least)
    assert [objects for _, objects in kept._kept] == [4][:at_least]


def test_closing_waits_for_all():
    kept, (until, events) = KeptAlive(), marks(3)
    for mark in until:
        kept.keep(object(), mark)
    kept.close()
    assert [event.waited_on_host for event in events] == [1, 1, 1]
    kept.close()
    assert [event.waited_on_host for event in events] == [1, 1, 1]
