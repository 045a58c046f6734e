"""The solver's accuracy: matrices with spectra that are hard in different ways, against numpy's float64 SVD."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness.measure import Result
from benchmarks.spectra.refreshes import MOVE, moved
from lowrank_vit.spectral.solving.ends import solve_ends
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import solve, stack_by_shape

TOPK = 8
TOP_LIMIT, LAST_LIMIT, SINE_LIMIT = 1e-12, 1e-6, 1e-6


@dataclass(frozen=True)
class Accuracy:
    """Errors of one matrix against numpy's float64 SVD."""

    top: float
    """Largest relative error of the first 8 values."""
    last: float
    """Largest relative error of the last 8; for values below 1e-12 sigma_1 the error divided by sigma_1."""
    sine: float
    """Largest sine between our and the true subspaces, at both ends and sides with a relative gap above 0.001."""
    ends: float | None
    """As `top`, for the first values computed alone from those of the matrix moved by 0.3 %; None if the whole spectrum
    was computed instead."""
    certified: bool
    """Whether no value at either end, or computed alone, has an error above its certificate."""
    solver: str
    """gram64, or svd after a fallback."""

    @property
    def passes(self) -> bool:
        """Whether the errors are within the promised limits."""
        is_right = self.top <= TOP_LIMIT and (self.ends is None or self.ends <= TOP_LIMIT)
        return is_right and self.last <= LAST_LIMIT and self.sine <= SINE_LIMIT and self.certified


def accuracy_cases() -> dict[str, Tensor]:
    """Matrices of ViT-Small's shapes with differently hard spectra, float64 except for the first three."""
    rng = np.random.default_rng(0)

    def haar(rows: int, cols: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((rows, cols)))[0]

    def known(s: np.ndarray, rows: int, cols: int) -> Tensor:
        return torch.from_numpy((haar(rows, s.size) * s) @ haar(cols, s.size).T)

    def noise(rows: int, cols: int) -> Tensor:
        return torch.from_numpy(0.02 * rng.standard_normal((rows, cols)))

    return {
        "normal entries, 1152x384": noise(1152, 384).float(),
        "normal entries, 384x384": noise(384, 384).float(),
        "normal entries, 384x1536": noise(384, 1536).float(),
        "rank 8 + noise, 1536x384": known(np.linspace(9, 2, 8), 1536, 384) + noise(1536, 384),
        "condition 1e4, 384x384": known(np.geomspace(1, 1e-4, 384), 384, 384),
        "condition 1e6, 1152x384": known(np.geomspace(1, 1e-6, 384), 1152, 384),
        "condition 1e6, 384x384": known(np.geomspace(1, 1e-6, 384), 384, 384),
        "condition 1e6, 384x1536": known(np.geomspace(1, 1e-6, 384), 384, 1536),
        "condition 1e7, 384x384": known(np.geomspace(1, 1e-7, 384), 384, 384),
        "repeated values, 1152x384": known(np.repeat(np.linspace(2, 1, 24), 16), 1152, 384),
        "rank 100, 384x384": known(np.linspace(2, 1, 100), 384, 384),
        "clustered at 8 and 377, 1152x384": known(np.repeat([3.0, 2.0, 1.5, 1.0], [6, 6, 362, 10]), 1152, 384),
        "graded columns, 1152x384": noise(1152, 384) * torch.logspace(0, -6, 384, dtype=torch.float64),
        "Kahan, 384x384": _kahan(384, 0.99),
        "Hilbert, 384x384": torch.from_numpy(1.0 / (np.arange(384)[:, None] + np.arange(384) + 1.0)),
        "Laeuchli, 385x384": torch.from_numpy(np.vstack([np.ones(384), 1e-6 * np.eye(384)])),
        "normal entries times 1e200, 1152x384": noise(1152, 384) * 1e200,
        "normal entries times 1e-200, 384x384": noise(384, 384) * 1e-200,
        "diagonal, 384x384": torch.diag(torch.linspace(1, 384, 384, dtype=torch.float64)),
        "zero, 384x384": torch.zeros(384, 384),
    }


def _kahan(k: int, s: float) -> Tensor:
    c = (1 - s**2) ** 0.5
    return torch.from_numpy(np.diag(s ** np.arange(k)) @ (np.eye(k) - c * np.triu(np.ones((k, k)), 1)))


def measure_accuracy(name: str, matrix: Tensor, threads: int, device: torch.device) -> Accuracy:
    """Solve one matrix on `device` and compare it with numpy."""
    found = solve({name: matrix.to(device)}, TOPK, cpu_threads=threads)[name]
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    unit = s[0] or 1.0
    top, last = np.abs(found.top.s - s[:TOPK]), np.abs(found.last.s - s[::-1][:TOPK])
    scale = np.where(s[::-1][:TOPK] > 1e-12 * unit, s[::-1][:TOPK], unit)
    # The reference itself has an error of some eps sigma_1, which the certificate does not cover.
    allowed = 32 * np.finfo(np.float64).eps * unit
    certified = (top <= found.top.certificate + allowed).all() and (last <= found.last.certificate + allowed).all()
    alone, of_alone = _alone(name, matrix.to(device), threads), None
    if alone is not None:
        errors = np.abs(alone.top.s - s[:TOPK])
        certified &= (errors <= alone.top.certificate + allowed).all() and alone.index
        of_alone = float((errors / s[:TOPK]).max())
    return Accuracy(
        float((top / np.where(s[:TOPK] > 0, s[:TOPK], unit)).max()),
        float((last / scale).max()),
        _greatest_sine(found, u, s, vh.T),
        of_alone,
        bool(certified),
        found.solver,
    )


def _alone(name: str, matrix: Tensor, threads: int) -> Solved | None:
    earlier = moved(matrix.cpu(), torch.Generator().manual_seed(0), MOVE).to(matrix)
    before = solve({name: earlier}, TOPK, cpu_threads=threads)[name].start
    if before is None:
        return None
    return solve_ends(stack_by_shape({name: matrix})[0], {name: before}, TOPK, cpu_threads=threads)[name]


def _greatest_sine(found: Solved, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> float:
    sines = [0.0]
    for end, columns, gap in (
        (found.top, slice(TOPK), s[TOPK - 1] - s[TOPK]),
        (found.last, slice(-TOPK, None), s[-TOPK - 1] - s[-TOPK]),
    ):
        beside = s[TOPK - 1] if end is found.top else s[-TOPK - 1]
        if beside > 1e-12 * s[0] and gap > 1e-3 * beside:
            for ours, true in ((end.u, u[:, columns]), (end.v, v[:, columns])):
                sines.append(float(np.linalg.norm(ours - true @ (true.T @ ours), 2)))
    return max(sines)


def print_accuracy(result: Result, console: Console) -> None:
    """Print the accuracy section as a table of 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("against numpy's float64 SVD", overflow="fold")
    for heading in ("top 8", "last 8", "sine", "alone", "certified", "solver", ""):
        table.add_column(heading, justify="right")
    for name, one in result.extra["accuracy"].items():
        numbers = (f"{one[key]:.0e}" for key in ("top", "last", "sine"))
        alone = "whole" if one["ends"] is None else f"{one['ends']:.0e}"
        table.add_row(
            name, *numbers, alone, str(one["certified"]).lower(), one["solver"], "ok" if one["passes"] else "MISSED"
        )
    console.print(table)
    for name, shares in result.extra["fallbacks"].items():
        console.print(f"{name}: {max(shares, default=0):.0%} solved whole after all", highlight=False)
    console.print(
        f"promised: {TOP_LIMIT:.0e}, {LAST_LIMIT:.0e}, {SINE_LIMIT:.0e}, {TOP_LIMIT:.0e}, true\n", highlight=False
    )
