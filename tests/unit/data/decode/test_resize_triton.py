"""The GPU's kernels for crop, resize and flip, run by Triton's interpreter on a CPU, against their twin on threads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_vit.common.filters import BICUBIC, BILINEAR, NEAREST
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.decode.backend import LENGTH, LOW
from lowrank_vit.data.decode.resident import ResidentBackend
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from tests.device_path import CudaPath
from tests.photos import write_sets
from tests.triton_interpreter import interpreted

CPU = torch.device("cpu")
SIZE = 6
KERNELS = {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
CASES = [
    *((use, name) for use in ("training", "corners") for name in KERNELS),
    *(("evaluation", name) for name in ("bilinear", "bicubic")),
]
"""No nearest in evaluation: where pixels meet, one way of rounding takes the left one and another the right."""
AS_PIL = [(use, name) for use, name in CASES if use != "evaluation" and name != "nearest"]
BASE = 2**31 + 11
"""First byte of the first image: a set on a GPU has more bytes than 32 bits count. No memory is behind them here."""


def errors() -> dict[str, Any]:
    """For each use and filter: greatest difference from the twin and from PIL in levels, and share of other pixels.

    And the difference of a resident set's batches from those on a CPU's way, with the lines that asked for the way.
    """
    from lowrank_vit.data.decode import resize_triton

    rng = np.random.default_rng(0)
    heights, widths = np.array([1, 40, 1, 5, 90, 4]), np.array([1, 1, 30, 7, 180, 3])
    B, row_bytes = len(heights), 3 * widths
    num_bytes = heights * row_bytes
    starts = BASE + np.cumsum(num_bytes) - num_bytes
    flat = np.zeros(BASE + num_bytes.sum(), np.uint8)
    flat[BASE:] = rng.integers(0, 256, num_bytes.sum(), dtype=np.uint8)
    found: dict[str, float] = {}
    for use, name in CASES:
        spans = _middles(heights, widths) if use == "evaluation" else _windows(heights, widths, rng, use == "corners")
        kernels, flips = np.full(B, KERNELS[name], np.int8), rng.integers(0, 2, B).astype(bool)
        expected = np.empty((B, SIZE, SIZE, 3), np.uint8)
        addresses = flat.ctypes.data + starts
        assert resize_batch(addresses, num_bytes, row_bytes, spans, kernels, flips, expected).all()
        table = np.column_stack([flips, kernels, starts, widths, spans.reshape(B, 8), np.zeros(B)])
        width = int(spans[:, 1, LENGTH].max())
        ours = resize_triton.resize(torch.from_numpy(flat), torch.from_numpy(table), width, SIZE)
        error = np.abs(ours.numpy().astype(int) - expected)
        found |= {f"{use}, {name}, greatest": float(error.max()), f"{use}, {name}, share": float((error > 0).mean())}
        if (use, name) in AS_PIL:
            pils = [_by_pil(flat[starts[n] :], widths[n], spans[n], flips[n], name) for n in range(B)]
            found[f"{use}, {name}, PIL"] = float(np.abs(ours.numpy().astype(int) - np.stack(pils)).max())
    on_cuda_path = CudaPath()
    with TemporaryDirectory() as folder:
        found["a resident set"] = _error_of_resident_sets(Beton(write_sets(Path(folder))["raw"]), on_cuda_path)
    return {**found, "asked": sorted(on_cuda_path.asked)}


def _error_of_resident_sets(beton: Beton, on_cuda_path: CudaPath) -> float:
    rules, made = TrainRules(scale=(0.02, 0.1)), list[list[Batch]]()  # the interpreter is slow
    plan = TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=SIZE, batch_size=3)
    for way in (nullcontext, on_cuda_path):
        with way():
            loader = Loader(ResidentBackend(beton, plan, CPU, 2), beton, plan, CPU)
            made.append(list(islice(loader.batches(0), 2)))
            loader.close()
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours.targets, theirs.targets)
    return max(float((ours.images.int() - theirs.images.int()).abs().max()) for ours, theirs in zip(*made, strict=True))


def _by_pil(pixels: np.ndarray, width: int, spans: np.ndarray, is_flipped: bool, name: str) -> np.ndarray:
    """The window of one image, its columns resized before its rows as we do."""
    (top, rows), (left, columns) = spans[:, [LOW, LENGTH]].astype(int).tolist()
    image = Image.fromarray(pixels[: (top + rows) * width * 3].reshape(-1, width, 3))
    window, kernel = image.crop((left, top, left + columns, top + rows)), Image.Resampling[name.upper()]
    resized = np.asarray(window.resize((columns, SIZE), kernel).resize((SIZE, SIZE), kernel)).astype(int)
    return resized[:, ::-1] if is_flipped else resized


def _windows(heights: np.ndarray, widths: np.ndarray, rng: np.random.Generator, is_corner: bool) -> np.ndarray:
    """Somewhere within each image, or to its last row and column."""
    sides = np.stack([heights, widths], axis=1)
    low = np.floor(rng.random(sides.shape) * sides * 0.6)
    length = sides - low if is_corner else np.ceil((sides - low) * rng.uniform(0.3, 1.0, sides.shape))
    return np.stack([low, length / SIZE, low, length], axis=2)


def _middles(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    length = np.stack([heights, widths], axis=1).astype(float)
    resized = np.maximum(SIZE + 2, np.floor(length * (SIZE + 2) / length.min(axis=1, keepdims=True)))
    scale = length / resized
    return np.stack([(resized - SIZE) // 2 * scale, scale, np.zeros_like(length), length], axis=2)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted("tests.unit.data.decode.test_resize_triton")


@pytest.mark.parametrize(("use", "kernel"), CASES)
def test_pixels_are_the_twins_within_a_level(found: dict[str, float], use: str, kernel: str) -> None:
    """Sums of float32 in another order: a level, on few pixels."""
    assert found[f"{use}, {kernel}, greatest"] <= (0 if kernel == "nearest" else 1)
    assert found[f"{use}, {kernel}, share"] < 0.005


@pytest.mark.parametrize(("use", "kernel"), AS_PIL)
def test_pixels_are_pils_within_a_level(found: dict[str, float], use: str, kernel: str) -> None:
    """PIL's sums are of fixed point; that of the first pass may be a level off in the second."""
    assert found[f"{use}, {kernel}, PIL"] <= 2


def test_a_resident_set_on_a_gpus_way_gives_the_cpus_batches(found: dict[str, Any], on_cuda_path: CudaPath) -> None:
    on_cuda_path.saw(found["asked"])
    assert found["a resident set"] <= 1


if __name__ == "__main__":
    print(json.dumps(errors()))
