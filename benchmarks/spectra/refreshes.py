"""A refresh of the spectra, model and EMA, beside what it cost before: two matrices of each of ViT-B's four shapes.

Two sets: what training makes of weights, 32 directions above the bulk, and timm's initial weights, which have no gap
anywhere (names with "_initial"). Between two refreshes the weights have moved by 0.3 % of their norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness.measure import Case
from benchmarks.spectra import before
from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching.refresh import EMA, MODEL, Memory, SpectralSettings, Stacks, refresh

SETS = ("", "_initial")
SHAPES: Mapping[str, tuple[int, int]] = {
    "attn.qkv": (2304, 768),
    "attn.proj": (768, 768),
    "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}
LAYERS = 2
"""Enough that a stack is more than one matrix, as the stacks of a model are."""
TOPK, INTERVAL, MOVE = 8, 2, 0.003
DIRECTIONS, LEAST, MOST = 32, 1.2, 10.0
"""Of trained-like weights: their singular values are spaced by equal factors, in edges of the bulk."""
STD = 0.02
"""Of timm's initial weights."""
_UNIT = "matrices/s"


def cases(threads: int, device: torch.device) -> tuple[dict[str, Case], dict[str, tuple[str, str]]]:
    """Cases, and ratios of them; what it cost before only on a CPU, since the copy that was kept is of that way."""
    found: dict[str, Case] = {}
    ratios: dict[str, tuple[str, str]] = {}
    for which in SETS:
        earlier, now = pair(device, SHAPES, is_initial=bool(which))
        found[f"full_refresh{which}"] = _of_today(earlier, now, threads, f"as now, {_in_words(which)}")
        if not cuda_path(device):
            found[f"refresh_before{which}"] = _of_before(earlier, now, threads, f"as before, {_in_words(which)}")
            ratios[f"full_refresh_vs_before{which}"] = (f"full_refresh{which}", f"refresh_before{which}")
    return found, ratios


def _in_words(which: str) -> str:
    return "timm's initial weights" if which else "trained-like weights"


def _of_today(earlier: Stacks, now: Stacks, threads: int, what: str) -> Case:
    settings, memory = SpectralSettings(TOPK, INTERVAL, cpu_threads=threads), Memory()

    def run() -> None:
        refresh(1, now, settings, copy.copy(memory))
        _wait(now)

    def first() -> None:
        refresh(0, earlier, settings, memory)

    return Case(run, _count(now), _UNIT, f"all of a refresh but the disk, {what}", first=first)


def _of_before(earlier: Stacks, now: Stacks, threads: int, what: str) -> Case:
    memory = before.Memory()

    def run() -> None:
        before.refresh(now, TOPK, INTERVAL, threads, copy.copy(memory))

    def first() -> None:
        before.refresh(earlier, TOPK, INTERVAL, threads, memory)

    return Case(run, _count(now), _UNIT, f"the same, {what}", first=first)


def _count(stacks: Stacks) -> int:
    return sum(len(stack.names) for of_kind in stacks.values() for stack in of_kind)


def pair(device: torch.device, shapes: Mapping[str, tuple[int, int]], *, is_initial: bool) -> tuple[Stacks, Stacks]:
    """Weights of model and EMA, and the same a refresh later."""
    random = torch.Generator().manual_seed(0)
    model = {
        f"blocks.{layer}.{name}": weights(shape, random, is_initial=is_initial)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    ema = {name: moved(weight, random, 3 * MOVE) for name, weight in model.items()}
    both: list[Stacks] = []
    for move in (0.0, MOVE):
        both.append({})
        for kind, of_kind in ((MODEL, model), (EMA, ema)):
            now = {name: moved(weight, random, move).to(device) for name, weight in of_kind.items()}
            both[-1][kind] = stack_by_shape(now, [name for name in now if name.endswith("qkv")])
    return both[0], both[1]


def weights(shape: tuple[int, int], random: torch.Generator, *, is_initial: bool) -> Tensor:
    """A float32 matrix (R, C) as timm makes it, or one that has more large values, as training leaves them."""
    rows, cols = shape
    noise = torch.nn.init.trunc_normal_(torch.empty(rows, cols), std=STD, generator=random)
    if is_initial:
        return noise
    count = min(DIRECTIONS, *shape)
    values = STD * (rows**0.5 + cols**0.5) * LEAST * (MOST / LEAST) ** torch.linspace(1, 0, count)
    left, right = (torch.linalg.qr(torch.randn(n, count, generator=random))[0] for n in shape)
    return noise + (left * values) @ right.T


def moved(weight: Tensor, random: torch.Generator, share: float) -> Tensor:
    """The same with noise of this share of its Frobenius norm."""
    deviation = share * float(torch.linalg.vector_norm(weight)) / weight.numel() ** 0.5
    return weight + deviation * torch.randn(weight.shape, generator=random)


def _wait(stacks: Stacks) -> None:
    if any(stack.matrices_NRC.is_cuda for of_kind in stacks.values() for stack in of_kind):
        torch.cuda.synchronize()
