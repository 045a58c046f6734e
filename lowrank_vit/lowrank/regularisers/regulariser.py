"""Regularisers in a training step: they change gradients or weights so that weights come near low rank.

Every `--reg-every` updates the penalties' gradients are computed from the current weights, and reused until the next
time, since they change slowly. Everything stays on the device; the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.low_rank_options import LowRank
from lowrank_vit.lowrank.regularisers.first import first_triplets, stable_rank_gradient
from lowrank_vit.lowrank.regularisers.polar import clipped, polar
from lowrank_vit.model.low_rank import LowRankLinear, with_products
from lowrank_vit.ranks.world import World
from lowrank_vit.spectral.select import select_targets

_TOGETHER = 2**25
"""Matrix entries processed at a time; the work takes about five times their memory."""
_NUCLEAR, _STABLE_RANK, _ERROR, _LEFT_OUT = range(4)
"""Columns of the numbers noted for each matrix."""
_NO_NUMBER = torch.finfo(torch.float32).max
"""Stands for NaN and infinity: a checkpoint holds only finite numbers."""


class _Matrix(NamedTuple):
    """A matrix that the penalties act on: a weight, or one part of the rows of a product of two factors."""

    parameters: tuple[int, ...]
    """Index of the weight, or indices of `up` and `down`, among the parameters."""
    parts: int
    part: int
    shape: tuple[int, int]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The weight (R, C), or its factors (R, r) and (r, C), from `tensors`, which are shaped as the parameters."""
        found = [tensors[number] for number in self.parameters]
        if len(found) == 1:
            return [found[0].flatten(1)]
        return [one.unflatten(0, (self.parts, -1))[self.part] for one in found]


class Regulariser:
    """Nuclear norm, stable rank and clipping of the targets; bit-identical on every rank.

    For a factorised layer W = A B (each part of its rows by itself): the nuclear norm is taken in its variational form
    (|A|^2 + |B|^2) / 2, which is never less, and equal if the factors are balanced; the stable rank is that of the
    product; clipping acts on each factor at the root of the limit, so the product's values cannot exceed the limit.
    """

    def __init__(self, options: LowRank, model: nn.Module, optimizer: Optimizer, world: World | None = None) -> None:
        """`model`: the raw module, on its device. Raises `UserError` if no target is trained."""
        self._options, self._world = options, world or World()
        self.follow(model, optimizer)
        device = self._parameters[0].device
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        """Stable-rank gradients left out so far, and values lowered by the last clipping."""

    @classmethod
    def of(cls, options: LowRank, model: nn.Module, optimizer: Optimizer, world: World) -> Regulariser | None:
        """The regulariser for the flags; None if they are all off."""
        is_on = options.reg_nuclear or options.reg_stable_rank or options.spectral_clip
        return cls(options, model, optimizer, world) if is_on else None

    def follow(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the current targets, as after layers were factorised; gradients are recomputed."""
        self._optimizer = optimizer
        own = self._options.reg_targets
        patterns, flag = (own, "--reg-targets") if own else (self._options.lowrank_targets, "--lowrank-targets")
        names = select_targets(with_products(dict(model.named_parameters())), patterns, flag)
        self._parameters, self._matrices = _matrices_of(model, list(names))
        if not self._matrices:
            raise UserError(f"None of the weights that {flag} names is trained. Leave out the --reg options.")
        sizes = [parameter.numel() for parameter in self._parameters]
        sizes += [min(matrix.shape) for matrix in self._matrices] + [4 * len(self._matrices)]
        self._kept = torch.zeros(sum(sizes), device=self._parameters[0].device)
        """Gradients by parameter, left vectors by matrix, and four numbers by matrix (`_NUCLEAR` and so on)."""
        self._sizes, self._is_fresh = sizes, False
        self._groups: list[list[int]] | None = None

    def in_words(self) -> str:
        """A line for the log about what is regularised."""
        options, count = self._options, len(self._matrices)
        way = "coupled" if options.reg_coupled else "decoupled"
        parts = {
            f"nuclear norm {options.reg_nuclear:g}, {way}": options.reg_nuclear,
            f"stable rank {options.reg_stable_rank:g}, {way}": options.reg_stable_rank,
            f"singular values clipped at {options.spectral_clip}": options.spectral_clip,
        }
        acting = "; ".join(text for text, value in parts.items() if value)
        return f"{count} matrices regularised every {options.reg_every} updates: {acting}"

    def before_step(self, update: int, is_skipped: Tensor | None = None) -> None:
        """Add the penalties to the gradients, or subtract them from the weights, before the step of update `update`.

        By default the weights move by learning rate times gradient, like AdamW's weight decay. The optimizer does not
        see this: Adam's second moments would divide it by the size of the loss's gradients. With `--reg-coupled` the
        penalties are added to the gradients after gradient clipping, like torch's own L2 penalty. `is_skipped`, (), is
        above 0 if a gradient scaler skips this update.
        """
        if not (self._options.reg_nuclear or self._options.reg_stable_rank):
            return
        with torch.no_grad():
            if not self._is_fresh or update % self._options.reg_every == 0:
                self._refresh()
            kept = self._split(self._kept)[: len(self._parameters)]
            if self._options.reg_coupled:
                pairs = [(p.grad, one) for p, one in zip(self._parameters, kept, strict=True) if p.grad is not None]
                torch._foreach_add_([grad for grad, _ in pairs], [one for _, one in pairs])  # pyright: ignore
                return
            if is_skipped is not None:
                kept = torch._foreach_mul(kept, (is_skipped == 0).to(self._kept))  # pyright: ignore
            for group, numbers in zip(self._optimizer.param_groups, self._numbers_by_group(), strict=True):
                if numbers:
                    weights, gradients = [self._parameters[i] for i in numbers], [kept[i] for i in numbers]
                    torch._foreach_add_(weights, gradients, alpha=-group["lr"])  # pyright: ignore

    def after_step(self, update: int) -> None:
        """Clip singular values after the step of update `update`, if that is due."""
        limit, every = self._options.spectral_clip, self._options.reg_every
        if limit is None or (update + 1) % every:
            return
        with torch.no_grad(), _ieee_products():
            new = torch.zeros_like(self._kept)
            parts = self._split(new)
            numbers = parts[-1].view(-1, 4)
            for batch in self._batches(by_factor=True):
                own = [one for one in batch if one[0] % self._world.size == self._world.rank]
                if not own:
                    continue
                is_factor = len(self._matrices[own[0][0]].parameters) > 1
                wide = torch.stack([_wide(self._matrices[i].of(self._parameters)[at]) for i, at in own])
                found = clipped(wide, limit**0.5 if is_factor else limit)
                for (i, at), matrix, count in zip(own, *found, strict=True):
                    target = self._matrices[i].of(parts)[at]
                    target.copy_(_back(matrix, target.shape))
                    numbers[i, at] = count
            self._world.sum(new)
            torch._foreach_copy_(self._parameters, parts[: len(self._parameters)])  # pyright: ignore
            self._counts[1] = numbers.sum()

    def values(self) -> dict[str, float]:
        """Values to log, from the last computation and clipping; waits for the device.

        `nuclear_norm`: sum over the targets. `stable_rank`: mean, and `stable_rank_error`: the largest relative error
        bound of a first value, both over the certified matrices. `stable_rank_left_out`: gradients left out so far
        because they were not certified. `clipped_values`: count of the last clipping. Values that are NaN or infinite
        are missing.
        """
        numbers = self._split(self._kept)[-1].view(-1, 4)
        is_good = numbers[:, _LEFT_OUT] == 0
        ranks, errors = (torch.where(is_good, numbers[:, at], 0.0) for at in (_STABLE_RANK, _ERROR))
        of_all = [numbers[:, _NUCLEAR].sum(), is_good.sum(), ranks.sum(), errors.max()]
        nuclear, good, rank, error, left_out, count = torch.stack([*of_all, *self._counts]).tolist()
        found: dict[str, float] = {}
        if self._options.reg_nuclear and nuclear < _NO_NUMBER:
            found |= {"nuclear_norm": nuclear}
        if self._options.reg_stable_rank:
            found |= {"stable_rank": rank / good, "stable_rank_error": error} if good else {}
            found |= {"stable_rank_left_out": int(left_out)}
        return found | ({"clipped_values": int(count)} if self._options.spectral_clip else {})

    def state_dict(self) -> dict[str, Tensor]:
        """The state that the weights do not tell."""
        return {"kept": self._kept if self._is_fresh else self._kept.new_zeros(0), "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state. Raises `UserError` if it is of other targets."""
        kept = state["kept"]
        if kept.numel() not in (0, self._kept.numel()):
            raise UserError(
                f"the penalties' gradients have {kept.numel()} values, but the targets need {self._kept.numel()}. The "
                "file is damaged. Give another one of the run."
            )
        self._is_fresh = kept.numel() > 0
        if self._is_fresh:
            self._kept.copy_(kept)
        self._counts.copy_(state["counts"])
        self._groups = None

    def _refresh(self) -> None:
        """Compute each matrix's gradients on its rank, and share them with all ranks."""
        last = self._split(self._kept)
        new = torch.zeros_like(self._kept)
        parts = self._split(new)
        numbers = parts[-1].view(-1, 4)
        with _ieee_products():
            for batch in self._batches():
                own = [i for i, _ in batch if i % self._world.size == self._world.rank]
                if own:
                    self._add(own, last, parts, numbers)
        numbers.nan_to_num_(nan=_NO_NUMBER, posinf=_NO_NUMBER)
        self._world.sum(new)
        self._kept.copy_(new)
        self._counts[0] += numbers[:, _LEFT_OUT].sum().long()
        self._is_fresh = True

    def _add(self, own: list[int], last: Sequence[Tensor], parts: Sequence[Tensor], numbers: Tensor) -> None:
        """Write the gradients and numbers of matrices of one shape to `parts`; all are whole, or all are factorised."""
        options, at = self._options, len(self._parameters)
        pairs = [self._matrices[i].of(self._parameters) for i in own]
        is_whole = len(pairs[0]) == 1
        wide_NKL = torch.stack([_wide(pair[0] if is_whole else pair[0] @ pair[1]) for pair in pairs])
        gradient_NKL = torch.zeros_like(wide_NKL)
        noted_N4 = torch.zeros_like(numbers[: len(own)])
        if options.reg_nuclear and is_whole:
            gradient_NKL = polar(wide_NKL)
            noted_N4[:, _NUCLEAR] = (gradient_NKL * wide_NKL).sum((1, 2))
            gradient_NKL *= options.reg_nuclear
        if options.reg_stable_rank:
            first = first_triplets(wide_NKL, torch.stack([last[at + i] for i in own]))
            rank_N, by_NKL = stable_rank_gradient(wide_NKL, first)
            is_good_N = first.is_certified_N & by_NKL.flatten(1).isfinite().all(1)
            gradient_NKL += torch.where(is_good_N[:, None, None], options.reg_stable_rank * by_NKL, 0.0)
            noted_N4[:, _STABLE_RANK:] = torch.stack([rank_N, first.error_N, ~is_good_N], 1)
            for i, left_K in zip(own, torch.where(is_good_N[:, None], first.left_NK, 0.0), strict=True):
                parts[at + i].copy_(left_K)
        for i, pair, wide_KL, noted_4 in zip(own, pairs, gradient_NKL, noted_N4, strict=True):
            targets, gradient_RC = self._matrices[i].of(parts), _back(wide_KL, self._matrices[i].shape)
            if is_whole:
                targets[0].copy_(gradient_RC)
            else:
                up_Rr, down_rC = pair
                targets[0].copy_(gradient_RC @ down_rC.mT + options.reg_nuclear * up_Rr)
                targets[1].copy_(up_Rr.mT @ gradient_RC + options.reg_nuclear * down_rC)
                noted_4[_NUCLEAR] = (up_Rr.square().sum() + down_rC.square().sum()) / 2
            numbers[i].copy_(noted_4)

    def _batches(self, *, by_factor: bool = False) -> Generator[list[tuple[int, int]]]:
        """Batches of matrices or factors of one shape, as (index of the matrix, 0 or index of the factor)."""
        by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, matrix in enumerate(self._matrices):
            shapes = [matrix.shape]
            if by_factor:
                shapes = [tuple(one.shape) for one in matrix.of(self._parameters)]
            for at, shape in enumerate(shapes):
                by_shape.setdefault((len(matrix.parameters), *sorted(shape)), []).append((i, at))
        for (_, short, long), alike in by_shape.items():
            count = max(1, _TOGETHER // (short * long))
            for begin in range(0, len(alike), count):
                yield alike[begin : begin + count]

    def _split(self, kept: Tensor) -> list[Tensor]:
        """Views of `kept`: gradients shaped as the parameters, then left vectors, then numbers."""
        views = list(kept.split(self._sizes))
        shaped = [view.view(one.shape) for view, one in zip(views, self._parameters, strict=False)]
        return shaped + views[len(shaped) :]

    def _numbers_by_group(self) -> list[list[int]]:
        if self._groups is None:
            numbers = {id(parameter): i for i, parameter in enumerate(self._parameters)}
            self._groups = [
                [numbers[id(p)] for p in group["params"] if id(p) in numbers] for group in self._optimizer.param_groups
            ]
        return self._groups


def _matrices_of(model: nn.Module, names: Sequence[str]) -> tuple[list[nn.Parameter], list[_Matrix]]:
    """The trained parameters of the named modules, each once, and the matrices that they make."""
    parameters: list[nn.Parameter] = []
    matrices: list[_Matrix] = []
    for name in names:
        module: Any = model.get_submodule(name)
        own = [module.up, module.down] if isinstance(module, LowRankLinear) else [module.weight]
        if any(id(one) == id(known) for one in own for known in parameters) or not all(p.requires_grad for p in own):
            continue
        at = len(parameters)
        parameters += own
        if len(own) == 1:
            matrices.append(_Matrix((at,), 1, 0, (len(own[0]), own[0][0].numel())))
        else:
            shape = (module.out_features // module.parts, module.in_features)
            matrices += [_Matrix((at, at + 1), module.parts, part, shape) for part in range(module.parts)]
    return parameters, matrices


def _wide(matrix_RC: Tensor) -> Tensor:
    return matrix_RC if matrix_RC.shape[0] <= matrix_RC.shape[1] else matrix_RC.mT


def _back(wide_KL: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `_wide` for a matrix of this shape."""
    return wide_KL if shape[0] <= shape[1] else wide_KL.mT


@contextmanager
def _ieee_products() -> Generator[None]:
    """Compute float32 products without TF32, which would make errors of 1 % in a polar factor; holds for all threads.

    The only other thread that multiplies on a GPU during a step is the monitor's, in float64.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
