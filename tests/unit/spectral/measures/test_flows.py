"""Numbers of tokens and of attention against numpy on explicit tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.measures import flows
from lowrank_vit.spectral.measures.flows import TokenSums, attention_entropies, token_metrics, token_variances


def tokens(*shape: int, seed: int = 0, mean: float = 0.7) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2.0, shape[-1])
    return mean + scale * torch.randn(shape, generator=random)


def sums_of(*parts: torch.Tensor) -> TokenSums:
    sums = TokenSums.like(parts[0])
    for part in parts:
        sums.add(part)
    return sums


def numbers_of(*parts: torch.Tensor) -> dict[str, float]:
    sums = sums_of(*parts)
    return token_metrics(sums, token_variances(sums))


def mean_cosine(x_TC: np.ndarray) -> float:
    units = x_TC / np.linalg.norm(x_TC, axis=1, keepdims=True)
    cosines = units @ units.T
    return cosines[~np.eye(len(x_TC), dtype=bool)].mean()


@pytest.mark.parametrize(("images", "per_image", "channels"), [(6, 17, 24), (2, 5, 24), (1, 3, 8), (3, 200, 8)])
def test_tokens_are_described_as_numpy_does_from_the_whole_matrix(images, per_image, channels):
    x = tokens(images, per_image, channels)
    all_MC = x.double().reshape(-1, channels).numpy()
    s = np.zeros(channels)
    found = np.linalg.svd(all_MC - all_MC.mean(0), compute_uv=False)
    s[: len(found)] = found
    s[s < 1e-7 * s[0]] = 0  # the mean takes one away, where there are fewer tokens than channels
    sums = sums_of(*x.split(2))
    np.testing.assert_allclose(token_variances(sums), s**2 / len(all_MC), rtol=1e-9, atol=1e-13)
    numbers, p = numbers_of(*x.split(2)), s[s > 0] / s.sum()
    assert numbers["stable_rank"] == pytest.approx(np.sum(s**2) / s[0] ** 2)
    assert numbers["effective_rank"] == pytest.approx(np.exp(-np.sum(p * np.log(p))))
    assert numbers["rank_limit"] == min(channels, images * per_image - 1) >= np.count_nonzero(s)
    assert numbers["cosine"] == pytest.approx(mean_cosine(all_MC))
    assert numbers["cosine_image"] == pytest.approx(np.mean([mean_cosine(one.double().numpy()) for one in x]))


def test_how_tokens_are_parted_does_not_matter_nor_does_their_type():
    x = tokens(8, 9, 16)
    whole, parted = numbers_of(x), numbers_of(*x.split(3))
    assert whole == pytest.approx(parted, rel=1e-12)
    assert numbers_of(x.bfloat16()) == pytest.approx(numbers_of(x.bfloat16().double()), rel=1e-12)


def test_isotropic_tokens_have_no_mean_cosine_and_equal_ones_have_one():
    isotropic = numbers_of(tokens(16, 100, 64, mean=0) / torch.linspace(0.1, 2.0, 64))
    assert abs(isotropic["cosine"]) < 5 * (2 / (1600 * 1599 * 64)) ** 0.5
    assert isotropic["effective_rank"] > 0.98 * 64
    alike = numbers_of(tokens(1, 1, 16).expand(3, 7, 16))
    assert (alike["cosine"], alike["cosine_image"]) == pytest.approx((1.0, 1.0))
    assert (alike["stable_rank"], alike["effective_rank"]) == (0.0, 0.0)


def test_zeros_and_numbers_that_are_not_finite_have_defined_values():
    zeros = numbers_of(torch.zeros(2, 3, 4))
    assert zeros == {"stable_rank": 0, "effective_rank": 0, "rank_limit": 4, "cosine": 0, "cosine_image": 0}
    one = numbers_of(tokens(1, 1, 4))
    assert np.isnan([one["cosine"], one["cosine_image"]]).all()
    x = tokens(2, 3, 4)
    for bad in (float("nan"), float("inf")):
        x[1, 2, 3] = bad
        numbers = numbers_of(x)
        assert np.isnan([value for name, value in numbers.items() if name != "rank_limit"]).all()


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 49, 2**22])
def test_entropies_are_those_of_an_explicit_softmax(monkeypatch, at_once):
    monkeypatch.setattr(flows, "_LOGITS_AT_ONCE", at_once)
    q, k = tokens(5, 3, 7, 16, seed=1), tokens(5, 3, 7, 16, seed=2)
    logits = 0.25 * q.double().numpy() @ k.double().numpy().swapaxes(-1, -2)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_entropies(q, k, 0.25), -(p * np.log(p)).sum((0, 2, 3)), rtol=1e-12)


def test_entropy_lies_between_one_token_and_all_alike():
    t = 11
    alike = attention_entropies(torch.zeros(1, 2, t, 4), tokens(1, 2, t, 4), 1.0) / t
    np.testing.assert_allclose(alike, np.log(t), rtol=1e-12)
    q = 1e3 * torch.eye(t)[None, None]
    assert attention_entropies(q, q, 1.0).tolist() == [0.0]
    assert torch.isnan(attention_entropies(torch.full((1, 1, t, 4), torch.nan), torch.zeros(1, 1, t, 4), 1.0)).all()
