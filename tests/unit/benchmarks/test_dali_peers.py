"""DALI as a peer: its rounds leave nothing under way, and its graphs are what they say on either device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import loader_peers
from benchmarks.harness.sets import ensure_photos


class _Recorder:
    """Stands for `fn`: notes each operator's name, first input and arguments."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def __getattr__(self, module: str) -> Any:
        def call(name: str) -> Any:
            return lambda *inputs, **more: self.calls.update({name: more}) or name

        if module in ("decoders", "random"):
            names = ("image", "image_random_crop", "coin_flip")
            return SimpleNamespace(**{name: call(f"{module}.{name}") for name in names})
        return call(module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_photos(tmp_path_factory.mktemp("dali") / "photos", 12)


def graph_of(monkeypatch: pytest.MonkeyPatch, make: Any, device: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The pipeline that a peer defines, not built, and the arguments of its operators on images."""
    seen: list[Any] = []
    define = loader_peers.define

    def noting(folder: Path, images_of: Any, *more: Any) -> Any:
        recorder = _Recorder()
        images_of(recorder, SimpleNamespace(RGB="rgb"), "files")
        seen.extend([define(folder, images_of, *more), recorder.calls])
        return seen[0]

    monkeypatch.setattr(loader_peers, "define", noting)
    monkeypatch.setattr(loader_peers, "_rounds", lambda *_: None)
    sizes = {} if make is loader_peers.decoder_alone else {"img_size": 32}
    make(folder, steps=1, batch_size=4, workers=1, device=device, **sizes)
    return seen[0], seen[1]


def test_the_peer_is_one_graph_on_either_device(monkeypatch, folder):
    _, on_cpu = graph_of(monkeypatch, loader_peers.stock_dali, "cpu", folder)
    monkeypatch.undo()
    _, on_gpu = graph_of(monkeypatch, loader_peers.stock_dali, "gpu", folder)  # DALI itself checks the names
    assert list(on_cpu) == list(on_gpu) == ["decoders.image_random_crop", "resize", "random.coin_flip", "flip"]
    assert on_cpu["decoders.image_random_crop"]["device"] == "cpu"
    decoder = on_gpu["decoders.image_random_crop"]
    assert (decoder["device"], decoder["hw_decoder_load"]) == ("mixed", 0.35)
    assert all(on_cpu[name]["device"] == "cpu" and on_gpu[name]["device"] == "gpu" for name in ("resize", "flip"))
    same = set(on_cpu["decoders.image_random_crop"]) - {"device"}
    assert all(decoder[name] == on_cpu["decoders.image_random_crop"][name] for name in same)


def test_the_limit_only_decodes(monkeypatch, folder):
    _, calls = graph_of(monkeypatch, loader_peers.decoder_alone, "gpu", folder)
    assert list(calls) == ["decoders.image"]
    assert calls["decoders.image"]["device"] == "mixed"


def test_arguments_that_dali_does_not_know_would_be_found_without_a_gpu(folder):
    with pytest.raises(KeyError, match="hw_decoder_loaf"):
        loader_peers.define(
            folder, lambda fn, _, files: fn.decoders.image(files, device="mixed", hw_decoder_loaf=1), 4, 1, "gpu"
        )


def test_batches_are_crops_of_the_files(monkeypatch, folder):
    seen: list[Any] = []
    rounds = loader_peers.in_whole_rounds
    monkeypatch.setattr(
        loader_peers, "in_whole_rounds", lambda pipeline: lambda batches: seen.append(rounds(pipeline)(batches))
    )
    loader_peers.stock_dali(folder, steps=3, batch_size=4, img_size=32, workers=1)()
    images, labels = seen[0]
    assert np.asarray(images.as_tensor()).shape == (4, 32, 32, 3)
    assert np.asarray(images.as_tensor()).dtype == np.uint8
    assert len(labels) == 4


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_a_round_makes_its_batches_and_leaves_none_under_way(batches):
    dali: Any = pytest.importorskip("nvidia.dali")
    asked: list[int] = []

    def source() -> np.ndarray:
        asked.append(len(asked))
        return np.full((2, 3), len(asked), np.uint8)

    @dali.pipeline_def(batch_size=2, num_threads=1, device_id=None, prefetch_queue_depth=loader_peers.PREFETCH)
    def graph() -> Any:
        return dali.fn.external_source(source=source, batch=True)

    pipeline: Any = graph()
    pipeline.build()
    run = loader_peers.in_whole_rounds(pipeline)
    before = len(asked)
    for n in range(1, 4):
        (last,) = run(batches)
        assert len(asked) == before + n * batches
        assert np.asarray(last.as_tensor())[0, 0] == len(asked)  # the last one asked for has come out
