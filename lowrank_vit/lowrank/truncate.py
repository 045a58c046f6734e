"""Truncation of a weighted matrix, the part that all methods share.

A method is a pair (L, M). L W M is truncated to rank r, then L and M are undone, so W_r is the matrix of rank r with
the least |L (W - W_r) M|_F (Eckart & Young, Psychometrika 1 (1936)). Letters of shapes: weight W (R, C), y = W x + b, K
= min(R, C). Everything is computed in float64 on the weight's device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.layers import Factors, even_factors, joined
from lowrank_vit.spectral.solving.solve import first_triplets

DAMPING = 1e-6
"""Added to a moment's diagonal, as a share of the diagonal's mean."""
_CERTIFIED = 1e-10
"""Largest residual of a triplet, as a share of the largest value."""


@dataclass(frozen=True)
class Root:
    """A root F of a symmetric, positive definite moment A = F F^T.

    Any root will do: two roots differ by a rotation, which changes neither W_r nor the values of L W M. Cholesky's is
    used, at a tenth of the work of an eigendecomposition.
    """

    factor: Tensor | None
    """Lower triangular (N, N), a diagonal (N,), or None for the identity."""

    @classmethod
    def of(cls, moment: Tensor, damp_by: Tensor | None = None) -> Root:
        """The root of a moment (N, N) or a diagonal one (N,), after adding `DAMPING` times the diagonal's mean to the
        diagonal.

        Moments are singular after a LayerNorm, with dead features and with few tokens. A moment of zeros prefers no
        direction, so its root is the identity.

        Args:
            moment: float64, positive semi-definite up to rounding.
            damp_by: another moment, or its diagonal, whose mean is used for the damping. For a covariance, give the
            moment about zero: next to it the covariance may be mere rounding.
        """
        by = moment if damp_by is None else damp_by
        damping = DAMPING * float((by if by.ndim == 1 else by.diagonal()).mean())
        if not np.isfinite(damping):
            raise UserError("The calibration gave moments that are not finite.")
        if damping <= np.finfo(np.float64).tiny / DAMPING:
            return cls(None)
        if moment.ndim == 1:
            return cls((moment + damping).sqrt())
        damped = moment.clone()
        damped.diagonal().add_(damping)
        return cls(torch.linalg.cholesky(damped))

    def times(self, matrix_XN: Tensor) -> Tensor:
        """X F."""
        if self.factor is None:
            return matrix_XN
        return matrix_XN * self.factor if self.factor.ndim == 1 else matrix_XN @ self.factor

    def undo(self, matrix_XN: Tensor) -> Tensor:
        """X F^-1."""
        if self.factor is None:
            return matrix_XN
        if self.factor.ndim == 1:
            return matrix_XN / self.factor
        return torch.linalg.solve_triangular(self.factor, matrix_XN, upper=False, left=False)


IDENTITY = Root(None)


class Weighting(NamedTuple):
    """A method's weights for W: L is the transpose of `left`'s factor, M is `right`'s factor."""

    left: Root = IDENTITY
    right: Root = IDENTITY
    is_centred: bool = False
    """Whether the inputs are taken about their mean. The bias then becomes b + (W - W_r) E[x]."""


Method = Callable[[Tensor, Moments, bool], Weighting]
"""Takes a weight (R, C), float64, the layer's moments, and whether the layer has a bias."""


@dataclass(frozen=True)
class Decomposition:
    """A layer's weight as a sum of directions, the most important by its method first, with the cost of dropping the
    rest.

    A layer whose rows are split into P parts has K = min(R / P, C), and at rank r it keeps the first r directions of
    each part.
    """

    shape: tuple[int, int]
    parts: int
    values_PK: np.ndarray
    """The singular values of L W M, descending."""
    own_losses: np.ndarray
    """(K + 1,) half the sum of the squared values cut off at ranks 0 to K: the quantity that the method minimises."""
    losses: np.ndarray
    """(K + 1,) predicted loss at ranks 0 to K, nats per image: tr(G dW S dW^T) / 2, dW = W - W_r; see `decompose`.

    NaN without moments. With the method `kfac` it falls as the rank rises; with others it may rise.
    """
    dtype: torch.dtype
    """Dtype of the weight."""
    bias_R: Tensor | None
    """b, or b + W E[x] in float64 if the bias is corrected."""
    directions: tuple[tuple[Tensor, Tensor], ...]
    """For each part (R / P, M) and (M, C); the product over the first r is the part's W_r. M is K, or
    `greatest_rank`."""
    mean_C: Tensor | None
    """E[x] (C,) if the bias is corrected."""

    @property
    def rank(self) -> int:
        """K, the largest rank."""
        return self.values_PK.shape[1]

    def factors(self, rank: int) -> Factors:
        """W_r of rank 1 to K as balanced factors, and the bias, in the weight's own dtype.

        Balanced by the singular values of W_r itself, which keeps the error of rounding to that dtype small.
        """
        if not 1 <= rank <= self.rank:
            rows, cols = self.shape
            part = f" of {self.parts} parts" if self.parts > 1 else ""
            raise UserError(f"Rank {rank} does not fit a {rows} x {cols} matrix{part}. Give 1 to {self.rank}.")
        assert rank <= self.directions[0][1].shape[0], "more directions than were asked for"
        made: list[Factors] = []
        for left_RK, right_KC in self.directions:
            q_Rr, a_rr = torch.linalg.qr(left_RK[:, :rank])
            p_Cr, b_rr = torch.linalg.qr(right_KC[:rank].mT)
            u_rr, s_r, vt_rr = torch.linalg.svd(a_rr @ b_rr.mT)
            made.append((*even_factors(q_Rr @ u_rr, s_r, p_Cr @ vt_rr.mT), None))
        up_Rr, down_rC, _ = joined(made)
        bias_R = self.bias_R
        if bias_R is not None and self.mean_C is not None:
            halves = zip(up_Rr.chunk(self.parts), down_rC.chunk(self.parts), strict=True)
            bias_R = (bias_R - torch.cat([up @ (down @ self.mean_C) for up, down in halves])).to(self.dtype)
        return up_Rr.to(self.dtype), down_rC.to(self.dtype), bias_R


def decompose(
    weight_RC: Tensor,
    bias_R: Tensor | None,
    method: Method,
    moments: Moments | None,
    parts: int = 1,
    greatest_rank: int | None = None,
) -> Decomposition:
    """Decompose a layer's weight by a method and predict the loss at each rank.

    The loss is that of the Kronecker-factored Fisher to second order, whatever the method, so methods can be compared:
    tr(G dW S dW^T) / 2, with S about the mean if the bias is corrected. It would be exact to second order if an image's
    tokens were independent of one another, and gradients of inputs. They are not, so it needs a constant, see
    `allocation.measured_constant`.

    Args:
        weight_RC: finite, float32 or float64.
        bias_R: the bias, or None.
        method: one of `methods.METHODS`.
        moments: those of the layer, with at least as many pieces as parts; None: W is truncated unweighted, as by
        `svd`.
        parts: see `Decomposition`.
        greatest_rank: without moments, compute only this many directions, which takes a fifth of the time; the other
        values are then exact to 2e-8 of the largest. None: all.

    Raises:
        UserError: weights or moments are not finite, or the rows do not split into `parts`.
    """
    if not torch.isfinite(weight_RC).all():
        raise UserError("The weights hold a NaN or an infinity.")
    rows, cols = weight_RC.shape
    if rows % parts:
        raise UserError(f"{rows} rows cannot be split into {parts} equal parts.")
    size = rows // parts
    values: list[np.ndarray] = []
    directions: list[tuple[Tensor, Tensor]] = []
    is_centred = False
    for part, weight in enumerate(weight_RC.detach().double().split(size)):
        of_part = moments if moments is None or parts == 1 else moments.rows(part * size, (part + 1) * size)
        weighting = Weighting() if of_part is None else method(weight, of_part, bias_R is not None)
        left, right, is_centred = weighting
        if greatest_rank is not None and of_part is None and (first := _certified_first(weight, greatest_rank)):
            s_K, *both = first
            values.append(s_K)
            directions.append((both[0], both[1]))
            continue
        u_RK, s_K, vt_KC = _certified_svd(right.times(left.times(weight.mT).mT))
        values.append(s_K.cpu().numpy())
        directions.append((left.undo((u_RK * s_K).mT).mT, right.undo(vt_KC)))
    values_PK = np.stack(values)
    own = np.append(np.cumsum((values_PK**2).sum(axis=0)[::-1])[::-1], 0.0) / 2
    losses = np.full_like(own, np.nan)
    if moments is not None:
        losses = _predicted(directions, moments.gradient_RR, moments.covariance_CC if is_centred else moments.input_CC)
    bias = None if bias_R is None else bias_R.detach().clone()
    mean_C = None
    if bias is not None and moments is not None and is_centred:
        mean_C = moments.mean_C
        bias = bias.double() + weight_RC.detach().double() @ mean_C
    return Decomposition((rows, cols), parts, values_PK, own, losses, weight_RC.dtype, bias, tuple(directions), mean_C)


def decompose_layers(
    targets: Mapping[str, nn.Linear],
    method: Method,
    moments: Mapping[str, Moments] | None,
    *,
    parts: Mapping[str, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Decomposition]:
    """`decompose` every layer; `progress` is called after each with the number of layers done."""
    made: dict[str, Decomposition] = {}
    for name, layer in targets.items():
        of_layer = None if moments is None else moments[name]
        try:
            made[name] = decompose(layer.weight, layer.bias, method, of_layer, (parts or {}).get(name, 1))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if progress:
            progress(len(made))
    return made


def _certified_first(matrix_RC: Tensor, count: int) -> tuple[np.ndarray, Tensor, Tensor] | None:
    """All values (K,), and U S (R, M) and V^T (M, C) of the first triplets; None if one is not accurate enough."""
    m = min(count, *matrix_RC.shape)
    solved = first_triplets("a weight", matrix_RC, lambda _: m, log=lambda _: None)
    top = solved.top
    if top.s.size < m or not top.certificate.max(initial=0.0) <= _CERTIFIED * solved.s[0]:
        return None
    left_RM, right_MC = (torch.from_numpy(np.ascontiguousarray(one)).to(matrix_RC) for one in (top.u * top.s, top.v.T))
    return solved.s, left_RM, right_MC


def _certified_svd(matrix_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (R, K), values (K,), V^T (K, C), after checking the residuals of all triplets.

    A true value lies within sqrt((|A v - s u|^2 + |A^T u - s v|^2) / 2) of each. If a GPU's solver is off by more than
    rounding, LAPACK on the host is used instead.
    """
    worst, greatest = 0.0, 0.0
    for place in (matrix_RC, matrix_RC.cpu()):
        u_RK, s_K, vt_KC = (one.to(matrix_RC.device) for one in torch.linalg.svd(place, full_matrices=False))
        right = (matrix_RC @ vt_KC.mT - u_RK * s_K).square().sum(dim=0)
        left = (u_RK.mT @ matrix_RC - s_K[:, None] * vt_KC).square().sum(dim=1)
        worst, greatest = float(((right + left) / 2).max().sqrt()), float(s_K[0])
        if worst <= _CERTIFIED * greatest:
            return u_RK, s_K, vt_KC
    raise UserError(f"The singular triplets have an error of {worst:.1e}; the largest value is {greatest:.1e}.")


def _predicted(directions: list[tuple[Tensor, Tensor]], gradient_RR: Tensor, input_CC: Tensor) -> np.ndarray:
    """Losses (K + 1,) at ranks 0 to K: half of tr(G dW S dW^T), where dW is the sum of the directions cut off.

    With directions a_i b_i^T this is half the sum over pairs of directions cut off of (a_i^T G a_j) (b_i^T S b_j). Each
    rank less adds one row and one column of these pairs. Parts at the same rank count as one direction.
    """
    size, K = directions[0][0].shape
    pairs_KK = gradient_RR.new_zeros(K, K)
    for one, (left, right) in enumerate(directions):
        weighted_KC = right @ input_CC
        for other, (left_of_other, right_of_other) in enumerate(directions):
            block_RR = gradient_RR[one * size : (one + 1) * size, other * size : (other + 1) * size]
            pairs_KK += (left.mT @ block_RR @ left_of_other) * (weighted_KC @ right_of_other.mT)
    added = pairs_KK.triu(1).sum(dim=1) + pairs_KK.tril(-1).sum(dim=0) + pairs_KK.diagonal()
    tail = np.cumsum(added.cpu().numpy()[::-1])[::-1]
    return np.maximum(np.append(tail, 0.0), 0.0) / 2
