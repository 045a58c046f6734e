"""Metrics of how weights move: of their change between two refreshes, and of the optimizer's direction at a refresh.

D is such a matrix (R, C), float64; 1..p is the block of W's first singular triplets, see `subspaces`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.measures.metrics import effective_rank, energy_rank, stable_rank
from lowrank_vit.spectral.measures.subspaces import block_energy, blocks_of, captured
from lowrank_vit.spectral.solving.extremes import Solved, Solver, Triplets
from lowrank_vit.spectral.solving.norm import norms_of_changes
from lowrank_vit.spectral.solving.pieces import in_pieces, slices_of
from lowrank_vit.spectral.solving.solve import MatrixStack, all_values, float64_numpy, side_by_side

_ADAM = ("torch.optim.adam.Adam", "torch.optim.adamw.AdamW")
_PAIRED_ON_CPU = 4
"""Number of matrices copied at a time where their grouping into stacks has changed."""
_SGD, _MUON = "torch.optim.sgd.SGD", "timm.optim.muon.Muon"


def paired(before: Sequence[MatrixStack], now: Sequence[MatrixStack]) -> Iterator[tuple[MatrixStack, MatrixStack]]:
    """Pairs (before, now) of stacks of the same matrices, in pieces of `pieces.in_pieces` and in the dtype of `now`.

    A piece with a matrix that was not there before is left out. A layer that has become factors in between is in
    another stack than before, since its product is float64.
    """
    if [one.names for one in before] == [one.names for one in now]:
        for pair in zip(before, now, strict=True):
            yield from zip(*map(in_pieces, pair), strict=True)
        return
    earlier = {name: matrix for one in before for name, matrix in zip(one.names, one.matrices_NRC, strict=True)}
    for one in itertools.chain.from_iterable(in_pieces(stack, _PAIRED_ON_CPU) for stack in now):
        if all(name in earlier for name in one.names):
            matrices_NRC = torch.stack([earlier[name].to(one.matrices_NRC) for name in one.names])
            yield replace(one, matrices_NRC=matrices_NRC), one


def why_no_direction(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Why `update_direction` cannot tell the direction of a group's parameters, in words; empty where it can."""
    name, of_known = _name_of(optimizer), "is not known (that of Adam, AdamW, Muon and SGD is)"
    if name not in (*_ADAM, _SGD, _MUON):
        return f"that of {name} {of_known}"
    if (algorithm := group.get("algo", "muon")) != "muon":
        return f"that of {name} as {algorithm!r} {of_known}"
    if group.get("nesterov"):
        return "Nesterov momentum includes the last gradient, which is gone when spectra are due"
    if name == _SGD and not group["momentum"]:
        return "SGD without momentum stores none"
    return ""


@torch.no_grad()
def update_direction(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor | None:
    """The direction in which the last step moved a parameter, without learning rate and sign, as a new tensor.

    Adam and AdamW: m / (sqrt(v) + eps), both corrected for their start as in torch, without weight decay where that is
    decoupled; so are parameters that Muon leaves to AdamW. SGD: the momentum buffer. Muon: what timm's own iteration
    makes of the momentum buffer, a nearly orthogonal matrix (as costly as that part of a step).

    None where no step was taken yet, and where the direction is not known: see `why_no_direction`. Does not wait for
    the device.

    Args:
        optimizer: after its step.
        group: the parameter's group of this optimizer.
        parameter: of the group.
    """
    state = optimizer.state.get(parameter) or {}
    if why_no_direction(optimizer, group):
        return None
    momentum = state.get("momentum_buffer")
    if momentum is not None:
        return _orthogonalised(momentum, group) if _name_of(optimizer) == _MUON else momentum.clone()
    if "exp_avg" not in state:
        return None
    beta1, beta2 = group["betas"]
    step = state["step"].double()
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return state["exp_avg"] / (1 - beta1**step) / deviation


def _orthogonalised(momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """The step of timm's Muon on a zero parameter. The momentum stands for the gradient too, so it does not change."""
    from timm.optim.muon import muon

    moved = torch.zeros_like(momentum)
    tensors = {"params": [moved], "grads": [momentum], "momentum_bufs": [momentum.clone()]}
    chosen: dict[str, Any] = {**group, **tensors, "lr": 1.0, "weight_decay": 0.0}
    muon(**{name: chosen[name] for name in inspect.signature(muon).parameters})
    return moved.neg_()


def _name_of(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def update_metrics(
    prefix: str, change_RC: Tensor, values_of_change: np.ndarray | float, block: Triplets | None
) -> dict[str, float]:
    """How many directions D has, and how much of D lies in the top block of W.

    Args:
        prefix: what the names begin with.
        change_RC: D, float64, on any device.
        values_of_change: its singular values (K,), descending, or the first one alone, |D|_2.
        block: W's first p triplets; None where they are not known.

    Returns:
        "<prefix>_stable_rank" and, with all values, "<prefix>_effective_rank", "<prefix>_rank90" (see `metrics`). With
        a block also the shares, 0-1, "<prefix>_top_u" |U_p^T D|_F^2 / |D|_F^2, "<prefix>_top_v" |D V_p|_F^2 / |D|_F^2
        and "<prefix>_top" |U_p^T D V_p|_F^2 / |D|_F^2, and their expected values for random U_p and V_p, exact for any
        D: "<prefix>_chance_u" p/R, "_chance_v" p/C and "_chance" p^2/(R C) (E U_p U_p^T is p/R times the identity).
        With a block and all values also "<prefix>_most", the share of D's own first p values, an upper bound of the
        three (Ky Fan). Shares of D = 0 are NaN; with a NaN in D all numbers are.
    """
    first_alone = isinstance(values_of_change, float | int)
    s = np.atleast_1d(np.asarray(values_of_change, np.float64))
    greatest = float(s[0])
    whole, *shares = _squares(change_RC, greatest, block)
    if first_alone:
        values = {"stable_rank": whole if greatest != 0 else 0.0}
    else:
        values = {"stable_rank": stable_rank(s), "effective_rank": effective_rank(s), "rank90": energy_rank(s, 90)}
    if block is not None:
        (rows, cols), p = change_RC.shape, block.s.size
        values |= {"chance_u": p / rows, "chance_v": p / cols, "chance": p * p / (rows * cols)}
        if not first_alone:
            relative = s / greatest if greatest != 0 else np.full_like(s, np.nan)
            values["most"] = float(np.sum(relative[:p] ** 2) / np.sum(relative**2))
        values |= {name: share / whole for name, share in zip(("top_u", "top_v", "top"), shares, strict=True)}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _squares(change_RC: Tensor, scale: float, block: Triplets | None) -> list[float]:
    """|D|_F^2, and with a block those of U_p^T D, D V_p, U_p^T D V_p; D is over `scale`, to keep squares in range."""
    unit_RC = change_RC / scale if scale != 0 else torch.full_like(change_RC, float("nan"))
    parts = [unit_RC]
    if block is not None:
        u_Rp, v_Cp = (torch.from_numpy(np.ascontiguousarray(one)).to(unit_RC) for one in (block.u, block.v))
        left_pC = u_Rp.T @ unit_RC
        parts += [left_pC, unit_RC @ v_Cp, left_pC @ v_Cp]
    return torch.stack([part.square().sum() for part in parts]).tolist()


def update_norms(
    before: MatrixStack, now: MatrixStack, cpu_threads: int = 1, solver: Solver = "gram64"
) -> dict[str, dict[str, float]]:
    """By name: "update_norm2" |W - W'|_2 = sigma_1(W - W') and "update_normF" |W - W'|_F, in the weights' unit.

    "update_norm2_low" and "update_norm2_high" enclose the first, see `norm.spectral_norms`. Both norms: Golub & Van
    Loan, section 2.3.
    """
    spectral, frobenius = norms_of_changes(before.matrices_NRC, now.matrices_NRC, solver, cpu_threads)
    keys = ("update_norm2", "update_norm2_low", "update_norm2_high", "update_normF")
    return {
        name: dict(zip(keys, map(float, values), strict=True))
        for name, *values in zip(now.names, *spectral, frobenius, strict=True)
    }


def update_spectra(
    prefix: str,
    stack: MatrixStack,
    blocks: Mapping[str, Triplets],
    cpu_threads: int = 1,
    norms: Sequence[float] | None = None,
    before_NRC: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """By name: `update_metrics` of each matrix of a stack of changes or directions of weights.

    Args:
        prefix: see `update_metrics`.
        stack: the matrices.
        blocks: the first triplets of the weights by name, where they are known.
        cpu_threads: how many matrices are solved at once on a CPU.
        norms: the spectral norm of each matrix, used in place of all its values.
        before_NRC: subtracted from the matrices, in float64.
    """
    described: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for one in slices_of(stack.matrices_NRC, cpu_threads):
            changes_NRC = stack.matrices_NRC[one].double()
            if before_NRC is not None:
                changes_NRC = changes_NRC - before_NRC[one].double()
            values = all_values(changes_NRC, cpu_threads) if norms is None else norms[one]
            found = zip(stack.names[one], changes_NRC, values, strict=True)
            described |= {name: update_metrics(prefix, change, s, blocks.get(name)) for name, change, s in found}
    return described


def block_energies(
    before: Mapping[str, Solved], now: Mapping[str, Solved], stack: MatrixStack, cpu_threads: int = 1
) -> dict[str, dict[str, float]]:
    """By name: "block_energy" (see `subspaces.block_energy`), where `before` has the block.

    Args:
        before, now: by name, solved.
        stack: the weights whose solutions are `now`, or some of them.
        cpu_threads: how many matrices are taken at once on a CPU.
    """
    on_host: dict[str, Tensor] = {}
    on_device: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, matrix in zip(stack.names, stack.matrices_NRC, strict=True):
            blocks = blocks_of(before[name], now[name]) if name in before else None
            if blocks is None:
                continue
            if cuda_path(matrix) and now[name].s[0] > 0:
                weights_RC = matrix.double()
                u_Rp = torch.from_numpy(blocks[0].u).to(weights_RC)
                on_device[name] = torch.linalg.matrix_norm(u_Rp.T @ weights_RC / float(now[name].s[0]))
            else:
                on_host[name] = matrix.cpu()

        def one(name: str) -> float:
            return block_energy(before[name], now[name], float64_numpy(on_host[name]))

        energies = dict(zip(on_host, side_by_side(one, on_host, cpu_threads), strict=True))
        if on_device:
            norms = torch.stack(list(on_device.values())).tolist()  # waits once for all of them
            energies |= {name: captured(norm, now[name]) for name, norm in zip(on_device, norms, strict=True)}
    return {name: {"block_energy": energy} for name, energy in energies.items()}
