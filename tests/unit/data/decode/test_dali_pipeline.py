"""What DALI is told before it decodes on a GPU."""

from __future__ import annotations

from nvidia.dali import backend

from lowrank_vit.data.decode.dali_pipeline import PipelineShape, memory_hints


def hints(height: int, width: int, load: float = 0.5, batch_size: int = 256) -> dict[str, int]:
    of_set = {"has_jpeg": True, "has_raw": False, "is_evaluation": False}
    on_gpu = {"device_id": 0, "resize": True, "num_threads": 8, "prefetch": 2}
    more = {"hw_decoder_load": load, "largest": (height, width)}
    return memory_hints(PipelineShape(img_size=224, batch_size=batch_size, **of_set, **on_gpu, **more))


def test_memory_is_taken_for_the_largest_image_and_never_less_than_dalis_own():
    assert hints(375, 500) == {
        "device_memory_padding": 1 << 24,
        "host_memory_padding": 1 << 23,
        "preallocate_height_hint": 375,
        "preallocate_width_hint": 500,
    }
    assert hints(1500, 2000)["device_memory_padding"] == 9 * 1500 * 2000
    assert hints(1500, 2000)["host_memory_padding"] == 6 * 1500 * 2000


def test_one_huge_image_does_not_take_the_gpus_memory():
    found = hints(10_000, 20_000)
    assert found["device_memory_padding"] == found["host_memory_padding"] == 1 << 26
    height, width = found["preallocate_height_hint"], found["preallocate_width_hint"]
    assert 0.9 * 2**31 < 128 * 3 * height * width <= 2**31
    assert 2 * height - 2 <= width <= 2 * height + 2


def test_without_the_engine_nothing_is_taken_for_it():
    assert set(hints(375, 500, load=0.0)) == {"device_memory_padding", "host_memory_padding"}


def test_dali_knows_all_of_it():
    for operator in ("decoders__Image", "decoders__ImageSlice"):
        known = set(backend.GetSchema(operator).GetArgumentNames())
        assert {*hints(375, 500), "hw_decoder_load", "jpeg_fancy_upsampling"} <= known
