"""What DALI is told before it decodes on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from nvidia.dali import backend

from lowrank_vit.data.decode import dali
from lowrank_vit.data.decode.dali_pipeline import PipelineShape, memory_hints, release_memory


def hints(height: int, width: int, load: float = 0.5, batch_size: int = 256) -> dict[str, int]:
    of_set = {"has_jpeg": True, "has_raw": False, "is_evaluation": False}
    on_gpu = {"device_id": 0, "resize": True, "num_threads": 8, "prefetch": 2}
    more = {"hw_decoder_load": load, "large": (height, width)}
    return memory_hints(PipelineShape(img_size=224, batch_size=batch_size, **of_set, **on_gpu, **more))


def test_memory_is_taken_for_large_images_and_never_less_than_dalis_own():
    assert hints(375, 500) == {
        "device_memory_padding": 1 << 24,
        "host_memory_padding": 1 << 23,
        "preallocate_height_hint": 375,
        "preallocate_width_hint": 500,
    }
    assert hints(1500, 2000)["device_memory_padding"] == 9 * 1500 * 2000
    assert hints(1500, 2000)["host_memory_padding"] == 6 * 1500 * 2000


def test_huge_images_do_not_take_the_gpus_memory():
    found = hints(10_000, 20_000)
    assert found["device_memory_padding"] == found["host_memory_padding"] == 1 << 26
    height, width = found["preallocate_height_hint"], found["preallocate_width_hint"]
    assert 0.9 * 2**31 < 128 * 3 * height * width <= 2**31
    assert 2 * height - 2 <= width <= 2 * height + 2


def test_without_the_engine_nothing_is_taken_for_it():
    assert set(hints(375, 500, load=0.0)) == {"device_memory_padding", "host_memory_padding"}


def test_a_decoder_that_is_closed_gives_the_gpus_memory_to_others(monkeypatch, on_cuda_path):
    released: list[int] = []
    monkeypatch.setattr(dali, "release_memory", lambda: released.append(1))
    decoder: Any = object.__new__(dali.DaliBackend)
    decoder._device = torch.device("cpu")
    decoder.close()
    assert not released
    with on_cuda_path():
        decoder.close()
    assert released
    release_memory()  # DALI has such a thing


def test_dali_knows_all_of_it():
    schemas: Any = backend  # compiled, and not typed
    for operator in ("decoders__Image", "decoders__ImageSlice"):
        known = set(schemas.GetSchema(operator).GetArgumentNames())
        assert {*hints(375, 500), "hw_decoder_load", "jpeg_fancy_upsampling"} <= known
