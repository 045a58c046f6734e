"""A refresh of the spectra of model and EMA against an earlier version: two matrices of each of ViT-B's four shapes.

Two sets: weights as after training, with 32 directions above the bulk, and timm's initial weights, which have no gap
anywhere (names with "_initial"). Between two refreshes the weights move by 0.3 % of their norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.measure import Case
from benchmarks.spectra import before
from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.extremes import ENDS
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
"""Layers per shape, so that a stack has more than one matrix, as in a model."""
TOPK, INTERVAL, MOVE = 8, 2, 0.003
DIRECTIONS, LEAST, MOST = 32, 1.2, 10.0
"""For the trained weights: number of directions, and their least and largest value in units of the bulk's edge."""
STD = 0.02
"""Standard deviation of timm's initial weights."""
_UNIT = "matrices/s"


class Cases(NamedTuple):
    """The result of `cases`."""

    cases: dict[str, Case]
    ratios: dict[str, tuple[str, str]]
    fallbacks: dict[str, list[float]]
    """Filled as the cases run: by case, the share of matrices whose first values came from the whole spectrum."""


def cases(threads: int, device: torch.device) -> Cases:
    """Cases and their ratios; the earlier version is only for a CPU."""
    found: dict[str, Case] = {}
    ratios: dict[str, tuple[str, str]] = {}
    fallbacks: dict[str, list[float]] = {}
    for which in SETS:
        moments = series(device, SHAPES, is_initial=bool(which))
        for name, full in (("full_refresh", True), ("ends_refresh", False)):
            shares = [] if full else fallbacks.setdefault(f"{name}{which}", [])
            found[f"{name}{which}"] = _of_today(moments, threads, _in_words(which), shares, full=full)
        if not cuda_path(device):
            found[f"refresh_before{which}"] = _of_before(moments, threads, _in_words(which))
            for name in ("full_refresh", "ends_refresh"):
                ratios[f"{name}_vs_before{which}"] = (f"{name}{which}", f"refresh_before{which}")
    return Cases(found, ratios, fallbacks)


def _in_words(which: str) -> str:
    return "timm's initial weights" if which else "trained-like weights"


def _of_today(moments: list[Stacks], threads: int, what: str, shares: list[float], *, full: bool) -> Case:
    """One complete refresh, or the two first-values refreshes after one; the second of these has more to start from."""
    settings = SpectralSettings(TOPK, INTERVAL, cpu_threads=threads, full_every=1 if full else 3)
    memory, timed = Memory(), moments[1:2] if full else moments[1:]

    def run() -> None:
        remembered = copy.copy(memory)
        found = [refresh(i, one, settings, remembered, full=full) for i, one in enumerate(timed, start=1)]
        _wait(moments[0])
        solved = [one for refreshed in found for one in refreshed.solved.values()]
        shares.append(sum(one.solver != ENDS for one in solved) / len(solved))

    values = "whole spectra" if full else "the first values alone, from those of the refresh before"
    setting = f"all of a refresh but the disk, {values}, {what}"

    def first() -> None:
        refresh(0, moments[0], settings, memory)

    return Case(run, len(timed) * _count(moments[0]), _UNIT, setting, first=first)


def _of_before(moments: list[Stacks], threads: int, what: str) -> Case:
    memory = before.Memory()

    def run() -> None:
        before.refresh(moments[1], TOPK, INTERVAL, threads, copy.copy(memory))

    def first() -> None:
        before.refresh(moments[0], TOPK, INTERVAL, threads, memory)

    return Case(run, _count(moments[0]), _UNIT, f"a refresh as at commit 3036a33, {what}", first=first)


def _count(stacks: Stacks) -> int:
    return sum(len(stack.names) for of_kind in stacks.values() for stack in of_kind)


def series(device: torch.device, shapes: Mapping[str, tuple[int, int]], *, is_initial: bool) -> list[Stacks]:
    """Weights of model and EMA at three successive refreshes."""
    random = torch.Generator().manual_seed(0)
    model = {
        f"blocks.{layer}.{name}": weights(shape, random, is_initial=is_initial)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    ema = {name: moved(weight, random, 3 * MOVE) for name, weight in model.items()}
    kinds = {MODEL: model, EMA: ema}
    moments: list[Stacks] = []
    for move in (0.0, MOVE, MOVE):
        moments.append({})
        for kind, of_kind in kinds.items():
            kinds[kind] = {name: moved(weight, random, move) for name, weight in of_kind.items()}
            now = {name: weight.to(device) for name, weight in kinds[kind].items()}
            moments[-1][kind] = stack_by_shape(now, [name for name in now if name.endswith("qkv")])
    return moments


def weights(shape: tuple[int, int], random: torch.Generator, *, is_initial: bool) -> Tensor:
    """A float32 matrix (R, C) as initialised by timm, or with large values added, as after training."""
    rows, cols = shape
    noise = torch.nn.init.trunc_normal_(torch.empty(rows, cols), std=STD, generator=random)
    if is_initial:
        return noise
    count = min(DIRECTIONS, *shape)
    values = STD * (rows**0.5 + cols**0.5) * LEAST * (MOST / LEAST) ** torch.linspace(1, 0, count)
    left, right = (torch.linalg.qr(torch.randn(n, count, generator=random))[0] for n in shape)
    return noise + (left * values) @ right.T


def moved(weight: Tensor, random: torch.Generator, share: float) -> Tensor:
    """The weight plus noise of this share of its Frobenius norm."""
    scale = float(weight.abs().max()) or 1.0  # so that no square overflows
    deviation = share * scale * float(torch.linalg.vector_norm(weight / scale)) / weight.numel() ** 0.5
    return weight + deviation * torch.randn(weight.shape, dtype=weight.dtype, generator=random)


def _wait(stacks: Stacks) -> None:
    if any(stack.matrices_NRC.is_cuda for of_kind in stacks.values() for stack in of_kind):
        torch.cuda.synchronize()
