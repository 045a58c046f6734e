"""How a set gets into a device's memory: the same pixels by every way, large reads, progress, and nothing left over."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.common.errors import BetonError
from lowrank_vit.data.decode import resident_set
from lowrank_vit.data.decode.pil import decode
from lowrank_vit.data.decode.resident_set import NoRoom, ResidentSet
from lowrank_vit.data.sets.beton import Beton

CPU = torch.device("cpu")


@pytest.fixture(params=["straight", "staged"])
def way(request, on_cuda_path) -> Iterator[str]:
    """Straight to the memory, or staged as for a GPU."""
    with on_cuda_path() if request.param == "staged" else nullcontext():
        yield request.param


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Bytes of each read of a file."""
    sizes, read = [], Beton.read_into
    monkeypatch.setattr(Beton, "read_into", lambda self, at, out: (sizes.append(len(out)), read(self, at, out)))
    return sizes


@pytest.mark.parametrize("part_bytes", [1 << 26, 150_000, 1000])
@pytest.mark.parametrize("stored", ["jpeg", "raw", "mixed"])
def test_all_images_are_pillows_by_every_way(sets, stored, part_bytes, way, monkeypatch):
    """In one part, in several, and in parts smaller than an image; straight to the memory, or staged as for a GPU."""
    monkeypatch.setattr(resident_set, "_PART_BYTES", part_bytes)
    beton = Beton(sets[stored])
    room = ResidentSet(beton, CPU)
    assert len(room._pieces) == (2 if way == "staged" else 0)
    room.load(3)
    assert not room.damaged
    assert room.pixels.numel() == beton.decoded_bytes
    for i, start in enumerate(room.starts):
        expected = decode(beton, i).reshape(-1)
        assert np.array_equal(room.pixels[start : start + len(expected)].numpy(), expected)
    assert not room._pieces


class LateStream:
    """Of `torch.cuda.Stream` what is used; nothing that is asked of it is done before somebody waits for it."""

    def __init__(self) -> None:
        self.asked: deque[Callable[[], object]] = deque()
        self.most_asked = 0

    def ask(self, work: Callable[[], object]) -> None:
        self.asked.append(work)
        self.most_asked = max(self.most_asked, len(self.asked))

    def record_event(self) -> Any:
        passed: list[bool] = []
        self.ask(lambda: passed.append(True))

        def synchronize() -> None:
            while not passed:
                self.asked.popleft()()

        return SimpleNamespace(synchronize=synchronize)


class LatePixels:
    """A GPU's memory, to which copies come by a stream."""

    def __init__(self, pixels: torch.Tensor, stream: LateStream) -> None:
        self.pixels, self.stream = pixels, stream

    def __getitem__(self, where: slice) -> Any:
        def copy_(host: torch.Tensor, *, non_blocking: bool) -> None:
            assert non_blocking
            self.stream.ask(lambda: self.pixels[where].copy_(host))

        return SimpleNamespace(copy_=copy_)


@pytest.mark.parametrize("part_bytes", [150_000, 1000])
def test_a_pinned_piece_is_filled_again_only_when_its_copy_is_done(sets, part_bytes, monkeypatch, on_cuda_path):
    monkeypatch.setattr(resident_set, "_PART_BYTES", part_bytes)
    beton, stream = Beton(sets["jpeg"]), LateStream()
    monkeypatch.setattr(resident_set, "current_stream", lambda device: stream)
    with on_cuda_path():
        room = ResidentSet(beton, CPU)
        room.pixels, pixels = LatePixels(room.pixels, stream), room.pixels  # type: ignore[assignment]
        room.load(2)
    assert not stream.asked  # and all is there when it is loaded
    assert stream.most_asked == 4  # two copies at a time, each with what marks its end
    for i, start in enumerate(room.starts):
        expected = decode(beton, i).reshape(-1)
        assert np.array_equal(pixels[start : start + len(expected)].numpy(), expected)


def test_raw_samples_are_read_many_at_a_time(sets, reads, monkeypatch):
    beton, sample_bytes = Beton(sets["raw"]), 3 * 56 * 56
    ResidentSet(beton, CPU).load(2)
    assert reads == [24 * sample_bytes]
    reads.clear()
    monkeypatch.setattr(resident_set, "_READ_BYTES", 5 * sample_bytes)
    ResidentSet(beton, CPU).load(2)
    assert sorted(reads) == [4 * sample_bytes, *[5 * sample_bytes] * 4]


def test_samples_that_lie_apart_or_out_of_order_are_found(sets, tmp_path, monkeypatch):
    """As FFCV's writer leaves them, whose workers take pages in turn."""
    beton = Beton(sets["raw"])
    order = np.random.default_rng(1).permutation(24)
    expected = [decode(beton, int(i)).reshape(-1) for i in order]
    beton.pointers = beton.pointers[order]
    room = ResidentSet(beton, CPU)
    room.load(2)
    for start, pixels in zip(room.starts, expected, strict=True):
        assert np.array_equal(room.pixels[start : start + len(pixels)].numpy(), pixels)


@pytest.mark.usefixtures("way")
def test_progress_is_said_of_large_sets(sets, monkeypatch):
    beton, said = Beton(sets["jpeg"]), []
    ResidentSet(beton, CPU).load(2, said.append)
    assert not said
    monkeypatch.setattr(resident_set, "_SHOWN_BYTES", 1_000_000)
    ResidentSet(beton, CPU).load(2, said.append)
    first, last = said
    assert first == "loading jpeg.beton, 2.1 MB decoded, to cpu (once)"
    assert last.startswith("  loaded in ")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory"), OSError("read")])
def test_what_ends_loading_leaves_nothing(sets, error, monkeypatch):
    def broken(self, sample_id, pixels):
        raise error

    monkeypatch.setattr(ResidentSet, "_decode", broken)
    before, room = set(threading.enumerate()), ResidentSet(Beton(sets["jpeg"]), CPU)
    with pytest.raises(NoRoom if isinstance(error, torch.OutOfMemoryError) else type(error)):
        room.load(2)
    assert set(threading.enumerate()) <= before
    assert room.pixels.numel() == 0
    assert not room._pieces


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_a_file_that_is_cut_while_it_is_loaded_is_an_error(sets, tmp_path, stored, monkeypatch):
    path = tmp_path / "train.beton"
    path.write_bytes(sets[stored].read_bytes())
    beton = Beton(path)
    monkeypatch.setattr(resident_set, "_PART_BYTES", 100_000)
    room, read = ResidentSet(beton, CPU), Beton.read_into

    def cut_then_read(self, start, out):
        with path.open("r+b") as file:
            file.truncate(int(beton.pointers.max()) - 1)
        read(self, start, out)

    monkeypatch.setattr(Beton, "read_into", cut_then_read)
    if stored == "jpeg":
        with path.open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(BetonError, match=r"train.beton was cut from .* while it was open"):
        room.load(2)
    assert room.pixels.numel() == 0
