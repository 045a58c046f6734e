"""Methods of truncation: no descent on a method's stated loss beats it, and the whole weight comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.calibration import calibrate
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.truncate import DAMPING, Decomposition, Root, decompose, decompose_layers
from tests.unit.lowrank.examples import TOKENS, matrix, model_and_images, moments_of, samples

ROWS, COLS, RANK = 7, 11, 3
ALL = pytest.mark.parametrize("method", METHODS)


def weight_of(one: Decomposition, rank: int) -> tuple[Tensor, Tensor | None]:
    """W_r in full, and its bias."""
    up, down, bias = one.factors(rank)
    assert up.shape == (one.shape[0], rank)
    assert down.shape == (one.parts * rank, one.shape[1])
    return torch.cat([a @ b for a, b in zip(up.chunk(one.parts), down.chunk(one.parts), strict=True)]), bias


def stated_loss(method: str, x_NTC: Tensor, g_NTR: Tensor, *, has_bias: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """What a method says that it makes least, of dW and the change of the bias; written from the samples themselves.

    Damping adds its share of the mean of the diagonal to the diagonal.
    """
    x, g = x_NTC.reshape(-1, COLS), g_NTR.reshape(-1, ROWS)

    def damped(diagonal: Tensor) -> Tensor:
        return diagonal + DAMPING * diagonal.mean()

    share = DAMPING * x.square().mean()

    def of_outputs(dw: Tensor, db: Tensor, left: Tensor) -> Tensor:
        error = (x @ dw.T + db) @ left
        return error.square().sum(dim=1).mean() + share * (left.T @ dw).square().sum()

    if method == "svd":
        return lambda dw, db: dw.square().sum()
    if method == "asvd":
        return lambda dw, db: (dw.square() * damped(x.abs().mean(dim=0))).sum()
    if method == "fwsvd":
        fisher = torch.einsum("ntr,ntc->nrc", g_NTR, x_NTC).square().mean(dim=0).sum(dim=0)
        return lambda dw, db: (dw.square() * damped(fisher)).sum()
    if method == "svdllm":
        return lambda dw, db: of_outputs(dw, db, torch.eye(ROWS, dtype=dw.dtype))
    G = g.T @ g / len(g_NTR)
    values, vectors = torch.linalg.eigh(G + DAMPING * G.diagonal().mean() * torch.eye(ROWS, dtype=G.dtype))
    return lambda dw, db: of_outputs(dw, db, vectors * values.sqrt())


@ALL
@pytest.mark.parametrize("has_bias", [False, True])
def test_descent_on_its_stated_loss_does_not_beat_a_method(method: str, has_bias: bool):
    x_NTC, g_NTR = samples(ROWS, COLS)
    weight, bias = matrix(ROWS, COLS), matrix(1, ROWS)[0] if has_bias else None
    loss = stated_loss(method, x_NTC, g_NTR, has_bias=has_bias)
    one = decompose(weight, bias, METHODS[method], moments_of(x_NTC, g_NTR))
    truncated, new_bias = weight_of(one, RANK)
    change = torch.zeros(ROWS, dtype=weight.dtype) if bias is None or new_bias is None else bias - new_bias
    found = float(loss(weight - truncated, change))
    expected = 2 * float(one.own_losses[RANK])
    assert found == pytest.approx(expected, rel=1e-9)
    for start in range(2):
        up, down = (matrix(*shape, seed=start + 5).requires_grad_() for shape in ((ROWS, RANK), (RANK, COLS)))
        if start == 0:  # from where the method is, too
            up, down = (factor.clone().requires_grad_() for factor in one.factors(RANK)[:2])
        shift = change.clone().requires_grad_()
        learned = [up, down, shift] if has_bias and method in ("svdllm", "kfac") else [up, down]
        descent = torch.optim.LBFGS(learned, max_iter=150, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(up: Tensor = up, down: Tensor = down, shift: Tensor = shift, descent=descent) -> Tensor:
            descent.zero_grad()
            value = loss(weight - up @ down, shift) / expected
            value.backward()
            return value

        descent.step(closure)
        assert float(closure().detach()) >= 1 - 1e-6


def pathological() -> dict[str, tuple[Tensor, Tensor]]:
    x, g = samples(ROWS, COLS)
    centred = x - x.mean(dim=2, keepdim=True)
    x_dead, g_dead = x.clone(), g.clone()
    x_dead[:, :, ::2], g_dead[:, :, 1:] = 0.0, 0.0
    return {
        "after LayerNorm": (centred / centred.std(dim=2, keepdim=True), g),
        "dead features": (x_dead, g_dead),
        "no input at all": (torch.zeros_like(x), g),
        "no gradient": (x, torch.zeros_like(g)),
        "one image": (x[:1], g[:1]),
        "one token": (x[:1, :1], g[:1, :1]),
        "a constant": (torch.full_like(x, 1e3), g),
        "large and small": (x * 1e20, g * 1e-30),
        "nearly nothing": (x * 1e-200, g * 1e-200),
    }


@ALL
@pytest.mark.parametrize("kind", pathological())
@pytest.mark.parametrize("shape", [(ROWS, COLS), (COLS, ROWS)])
def test_at_full_rank_the_weight_comes_back_on_any_calibration_set(method: str, kind: str, shape: tuple[int, int]):
    x, g = pathological()[kind]
    moments = moments_of(x, g) if shape == (ROWS, COLS) else moments_of(g * 1e2, x)
    weight, bias = matrix(*shape), matrix(1, shape[0])[0]
    for this_bias in (bias, None):
        one = decompose(weight, this_bias, METHODS[method], moments)
        found, new_bias = weight_of(one, one.rank)
        assert float((found - weight).norm()) <= 1e-9 * float(weight.norm())
        assert (new_bias is None) == (this_bias is None)
        if new_bias is not None:
            scale = 1.0 + float(moments.mean_C.norm())
            assert float((new_bias - bias).norm()) <= 1e-9 * scale * float(weight.norm())
        assert np.isfinite(one.losses).all()
        assert one.losses[-1] == 0


@ALL
def test_factors_of_float32_weights_are_those_of_float64(method: str):
    moments = moments_of(*samples(ROWS, COLS))
    weight = matrix(ROWS, COLS).float()
    one, exact = (decompose(w, None, METHODS[method], moments) for w in (weight, weight.double()))
    for rank in range(1, ROWS + 1):
        found, expected = weight_of(one, rank)[0], weight_of(exact, rank)[0]
        assert found.dtype == torch.float32
        assert float((found.double() - expected).norm()) <= 1e-6 * float(expected.norm())


@ALL
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_predicted_losses_are_the_trace_itself(method: str, has_bias: bool, parts: int):
    x, g = samples(9, 5)
    moments, weight = moments_of(x, g, pieces=3), matrix(9, 5)
    bias = matrix(1, 9)[0] if has_bias else None
    one = decompose(weight, bias, METHODS[method], moments, parts)
    is_centred = has_bias and method in ("svdllm", "kfac")
    S = moments.covariance_CC if is_centred else moments.input_CC
    for rank in range(1, one.rank + 1):
        dw = weight - weight_of(one, rank)[0]
        expected = float((moments.gradient_RR @ dw @ S @ dw.T).trace()) / 2
        assert float(one.losses[rank]) == pytest.approx(expected, rel=1e-7, abs=1e-12 * one.losses[0])
    whole = float((moments.gradient_RR @ weight @ S @ weight.T).trace()) / 2
    assert float(one.losses[0]) == pytest.approx(whole, rel=1e-7)


def test_curves_are_monotone_in_their_own_norm():
    weight, moments = matrix(ROWS, COLS), moments_of(*samples(ROWS, COLS))
    plain, kfac = (decompose(weight, None, METHODS[name], moments) for name in ("svd", "kfac"))
    norms = [float((weight - weight_of(plain, rank)[0]).square().sum()) / 2 for rank in range(1, ROWS + 1)]
    np.testing.assert_allclose(norms, plain.own_losses[1:], atol=1e-12)
    assert (np.diff(plain.own_losses) < 0).all()
    assert (np.diff(kfac.losses) < 0).all()
    np.testing.assert_allclose(kfac.losses, kfac.own_losses, rtol=1e-3)  # but for the damping


def test_a_correction_of_the_bias_keeps_the_mean_of_the_outputs():
    x, g = samples(ROWS, COLS)
    weight, bias = matrix(ROWS, COLS), matrix(1, ROWS)[0]
    for method in ("svdllm", "kfac"):
        one = decompose(weight, bias, METHODS[method], moments_of(x, g))
        for rank in (1, RANK):
            truncated, new_bias = weight_of(one, rank)
            before, after = (
                functional.linear(x, w, b).mean(dim=(0, 1)) for w, b in ((weight, bias), (truncated, new_bias))
            )
            torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_parts_are_taken_each_by_its_own_rows():
    x, g = samples(9, 5)
    weight, bias = matrix(9, 5), matrix(1, 9)[0]
    one = decompose(weight, bias, METHODS["kfac"], moments_of(x, g, pieces=3), parts=3)
    assert one.rank == 3
    found, found_bias = weight_of(one, 2)
    for part in range(3):
        rows = slice(3 * part, 3 * part + 3)
        alone = decompose(weight[rows], bias[rows], METHODS["kfac"], moments_of(x, g[:, :, rows]))
        expected, expected_bias = weight_of(alone, 2)
        torch.testing.assert_close(found[rows], expected)
        assert found_bias is not None
        torch.testing.assert_close(found_bias[rows], expected_bias)


def cut_off_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root and its pseudo-inverse, without damping: values below 1e-10 of the greatest count as none."""
    values, vectors = torch.linalg.eigh(moment)
    kept = values > 1e-10 * values[-1]
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / root, 0.0)
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T


def test_a_symmetric_cut_off_root_is_a_twin_where_moments_are_regular(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_vit.lowrank.truncate.DAMPING", 1e-14)
    x, g = samples(ROWS, COLS)
    weight, moments = matrix(ROWS, COLS), moments_of(x, g)
    left, left_inverse = cut_off_root(moments.gradient_RR)
    right, right_inverse = cut_off_root(moments.input_CC)
    u, s, vt = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    expected = left_inverse @ (u[:, :RANK] * s[:RANK]) @ vt[:RANK] @ right_inverse
    one = decompose(weight, None, METHODS["kfac"], moments)
    torch.testing.assert_close(weight_of(one, RANK)[0], expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(one.values_PK[0], s.numpy(), rtol=1e-7)
    # With fewer tokens than columns, the cut-off loses a part of W even at full rank; damping does not.
    right, right_inverse = cut_off_root(moments_of(x[:1], g[:1]).input_CC)
    assert float((weight @ right @ right_inverse - weight).norm()) > 0.1 * float(weight.norm())


class _SumOfTokens(nn.Module):
    """Logits 0 with the weight that it begins with, and linear in another: the sum over tokens of (W - W_0) x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self.register_buffer("start", weight)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Logits (N, R)."""
        start: Tensor = self.start  # pyright: ignore[reportAssignmentType]
        return (self.layer(x_NTC) - x_NTC @ start.T).sum(dim=1)


def test_kfac_predicts_the_second_order_loss_where_tokens_are_independent():
    """The tokens of the set are uncorrelated to the bit: every sign of every one of three tokens occurs alike."""
    weight, base = matrix(4, 6), matrix(3, 6, seed=3)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    x_NTC = signs[:, :, None] * base
    model = _SumOfTokens(weight)
    moments = calibrate(model, [x_NTC.repeat(500, 1, 1)], {"layer": model.layer})["layer"]
    fisher = torch.eye(4, dtype=torch.float64) / 4 - 1 / 16  # of a softmax of equal logits
    torch.testing.assert_close(moments.gradient_RR, 3 * fisher, atol=0.03, rtol=0.0)  # labels were drawn
    exact = dataclasses.replace(moments, gradient_RR=3 * fisher)
    one = decompose(weight, None, METHODS["kfac"], exact)
    for rank in (1, 2, 3):
        dw = weight_of(one, rank)[0] - weight

        def loss(step: Tensor, dw: Tensor = dw) -> Tensor:
            logits = torch.func.functional_call(model, {"layer.weight": weight + step * dw}, (x_NTC,))
            return -functional.log_softmax(logits, dim=1).mean()  # labels are all alike likely

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(loss(step), step, create_graph=True)
        (second,) = torch.autograd.grad(first, step)
        assert float(one.losses[rank]) == pytest.approx(float(second) / 2, rel=1e-9)


def test_layers_of_a_model_are_decomposed_with_what_is_wrong_named():
    model, images = model_and_images()
    targets = model.targets()
    moments, heard = calibrate(model, [images], targets), list[int]()
    made = decompose_layers(targets, METHODS["kfac"], moments, progress=heard.append)
    assert list(made) == list(targets)
    assert heard == [1, 2, 3, 4]
    assert made["blocks.0.fc1"].factors(2)[2] is not None
    assert made["blocks.1.fc2"].factors(2)[2] is None
    plain = decompose_layers(targets, METHODS["svd"], None)["blocks.0.fc1"]
    assert np.isnan(plain.losses).all()
    torch.testing.assert_close(weight_of(plain, plain.rank)[0], targets["blocks.0.fc1"].weight.detach())
    with torch.no_grad():
        targets["blocks.1.fc1"].weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"blocks\.1\.fc1: The weights hold a NaN"):
        decompose_layers(targets, METHODS["kfac"], moments)


@pytest.mark.parametrize("rank", [0, -1, 8])
def test_a_rank_above_the_matrix_or_of_none_is_refused(rank: int):
    one = decompose(matrix(ROWS, COLS), None, METHODS["svd"], None)
    with pytest.raises(UserError, match=rf"Rank {rank} does not fit a 7 x 11 matrix. Give 1 to 7"):
        one.factors(rank)


def test_moments_that_are_not_finite_are_refused():
    moments = moments_of(*samples(ROWS, COLS))
    bad = dataclasses.replace(moments, gradient_RR=moments.gradient_RR * torch.nan)
    with pytest.raises(UserError, match="moments that are not finite"):
        decompose(matrix(ROWS, COLS), None, METHODS["kfac"], bad)


@pytest.mark.parametrize("faults", [1, 2])
def test_wrong_triplets_are_not_taken_but_those_of_a_second_solver(faults: int, monkeypatch: pytest.MonkeyPatch):
    svd, calls = torch.linalg.svd, list[int]()

    def wrong(matrix_RC: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(matrix_RC, full_matrices=full_matrices)
        calls.append(len(calls))
        return u, s, vt.flip(0) if len(calls) <= faults else vt

    monkeypatch.setattr(torch.linalg, "svd", wrong)
    weight = matrix(ROWS, COLS)
    if faults == 2:
        with pytest.raises(UserError, match="singular triplets have an error of"):
            decompose(weight, None, METHODS["svd"], None)
    else:
        one = decompose(weight, None, METHODS["svd"], None)
        torch.testing.assert_close(weight_of(one, ROWS)[0], weight)
    assert len(calls) >= 2


def test_factors_outlive_a_change_of_the_weights_that_they_are_of():
    weight, bias = matrix(ROWS, COLS), matrix(1, ROWS)[0]
    one = decompose(weight, bias, METHODS["kfac"], moments_of(*samples(ROWS, COLS)))
    before = one.factors(RANK)
    weight.zero_()
    bias.zero_()
    torch.testing.assert_close(one.factors(RANK), before, rtol=0, atol=0)


def test_roots_are_roots():
    moment = moments_of(*samples(ROWS, COLS)).input_CC
    for one in (moment, moment.diagonal().clone()):
        root = Root.of(one)
        x = matrix(3, COLS)
        torch.testing.assert_close(root.undo(root.times(x)), x)
        dense = root.times(torch.eye(COLS, dtype=torch.float64))
        expected = one if one.ndim == 2 else one.diag()
        torch.testing.assert_close(dense @ dense.T, expected + DAMPING * expected.diagonal().mean() * torch.eye(COLS))
    assert TOKENS < COLS
