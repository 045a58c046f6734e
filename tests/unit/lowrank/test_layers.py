"""Factorised layers: what they compute, what they cost, and what becomes of a model that is put into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import Factors, Layer, costs_of, even_factors, factorise, joined, pays, save_compressed
from lowrank_vit.lowrank.targets import Split, find_targets, parts_of_targets
from lowrank_vit.model.flops import train_flops_per_image
from lowrank_vit.model.low_rank import LowRankLinear, merge, product, ranks_of
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.spectral.solving.solve import solve
from tests.monitors import watch

SMALL: dict[str, Any] = {"num_classes": 7, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def truncated(layer: nn.Linear, rank: int, parts: int = 1) -> Factors:
    rows = layer.weight.detach().double().chunk(parts)
    of_parts: list[Factors] = []
    for matrix, bias in zip(rows, layer.bias.detach().chunk(parts), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        of_parts.append((*even_factors(u[:, :rank], s[:rank], vh[:rank].mT), bias))
    return joined(of_parts)


def in_factors(seed: int = 0, rank: int = 8, **kwargs: Any) -> nn.Module:
    model = vit(seed, **kwargs)
    factorise(model, {name: truncated(one, rank) for name, one in find_targets(model, img_size=32).items()})
    return model


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_factors_of_certified_triplets_make_the_truncated_matrix():
    torch.manual_seed(0)
    layer = nn.Linear(60, 90)
    solved = solve({"w": layer.weight.detach()}, 10)["w"].top
    assert solved.certificate.max() < 1e-12
    u, s, v = (torch.from_numpy(one) for one in (solved.u, solved.s, solved.v))
    model = nn.Sequential(layer)
    factorise(model, {"0": (*even_factors(u, s, v), layer.bias)})
    made = model[0]
    assert isinstance(made, LowRankLinear)
    expected = (u * s) @ v.mT
    assert (product(made.up, made.down) - expected).norm() < 1e-6 * expected.norm()
    assert list(model.state_dict()) == ["0.up", "0.down", "0.bias"]
    assert torch.allclose(made.up.norm(dim=0), made.down.norm(dim=1))


@pytest.mark.parametrize("shared", [False, True])
def test_factors_are_copied_unless_they_are_to_be_shared(shared: bool):
    up, down, bias = torch.randn(9, 2), torch.randn(2, 6), torch.randn(9)
    model = nn.Sequential(nn.Linear(6, 9))
    factorise(model, {"0": (up, down, bias)}, shared=shared)
    for given, parameter in zip((up, down, bias), model.parameters(), strict=True):
        assert torch.equal(given, parameter)
        assert (given.data_ptr() == parameter.data_ptr()) == shared
    factorise(model := nn.Sequential(nn.Linear(6, 9)).double(), {"0": (up, down, bias)}, shared=shared)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


def test_a_merged_model_answers_as_the_one_in_factors():
    model, whole = in_factors(), vit()
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    with torch.no_grad():
        expected = model(IMAGES)
        merge(model)
        merged = model(IMAGES)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert not ranks_of(model)
    assert (merged - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("split", ["whole", "thirds", "heads"])
def test_a_fused_qkv_is_taken_whole_by_thirds_or_by_heads(split: Split):
    model = vit()
    targets = find_targets(model, "attn.qkv,mlp.fc1", img_size=32)
    parts = parts_of_targets(model, targets, split)
    assert parts["blocks.0.attn.qkv"] == {"whole": 1, "thirds": 3, "heads": 9}[split]
    assert parts["blocks.1.mlp.fc1"] == 1
    costs = costs_of(model, targets, img_size=32, parts=parts)
    ranks = dict.fromkeys(targets, 5)
    factors = {name: truncated(layer, 5, parts[name]) for name, layer in targets.items()}
    full = {
        name: truncated(layer, min(layer.out_features // parts[name], 48), parts[name])
        for name, layer in targets.items()
    }
    again = copy.deepcopy(model)
    factorise(again, full, anyway=True)
    factorise(model, factors)
    assert ranks_of(model) == ranks
    assert costs.count(ranks) == sum(p.numel() for p in model.parameters())
    assert 3 * costs.count(ranks, "flops") == train_flops_per_image(model, 32)
    with torch.no_grad():
        expected, merged = model(IMAGES), copy.deepcopy(model)
        merge(merged)
        assert torch.allclose(merged(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(again(IMAGES), vit()(IMAGES), rtol=1e-4, atol=1e-4)
    matrix = merged.get_parameter("blocks.0.attn.qkv.weight")
    assert all(
        torch.linalg.matrix_rank(part.double(), rtol=1e-5) == 5 for part in matrix.chunk(parts["blocks.0.attn.qkv"])
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_bfloat16_autocast_trains_and_stays_close(parts: int):
    torch.manual_seed(0)
    layer = LowRankLinear(*truncated(nn.Linear(32, 48), 6, parts)).float()
    x = torch.randn(5, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.float(), layer.merged()(x), atol=0.05)
    found.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("rows", "columns", "parts"), [(12, 8, 1), (8, 12, 1), (144, 48, 3), (7, 1, 1), (2, 2, 1), (9, 9, 9)]
)
def test_the_greatest_rank_that_pays_is_the_last_with_fewer_weights(rows: int, columns: int, parts: int):
    layer, rank = Layer(rows, columns, 3, parts), pays(rows, columns, parts)
    assert rank == 0 or layer.cost(rank) < layer.cost(None)
    assert layer.cost(rank + 1) >= layer.cost(None) or rank == min(rows // parts, columns)
    assert layer.cost(rank, "flops") == 6 * layer.cost(rank)


def replaced(model: nn.Module, name: str, factors: Callable[[nn.Linear], Factors]) -> dict[str, Factors]:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return {"blocks.0.mlp.fc2": truncated(model.blocks[0].mlp.fc2, 4), name: factors(layer)}  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            lambda layer: (torch.ones(144, 60), torch.ones(60, 48), layer.bias),
            "rank 60 is too large for the matrix.* 48",
        ),
        (lambda layer: truncated(layer, 37), r"rank 37 .* as the layer \(6,912\). The largest rank .* is 35"),
        (lambda layer: (torch.ones(48, 4), torch.ones(4, 48), layer.bias), "144 x 48, but its factors make 48 x 48"),
        (lambda layer: (*truncated(layer, 4)[:2], None), "must have a bias"),
        (lambda layer: (torch.full((144, 4), 1e300, dtype=torch.float64), torch.ones(4, 48), layer.bias), "not finite"),
    ],
)
def test_factors_that_cannot_be_are_refused_by_name_and_nothing_changes(factors: Any, message: str):
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=f"blocks.0.attn.qkv.*{message}"):
        factorise(model, replaced(model, "blocks.0.attn.qkv", factors))
    assert list(model.state_dict()) == list(before)


def test_what_is_no_linear_or_in_factors_already_cannot_be_put_in_factors():
    model = in_factors()
    some = (torch.ones(48, 2), torch.ones(2, 48), None)
    with pytest.raises(UserError, match=r"norm.*not a Linear"):
        factorise(model, {"blocks.0.norm1": some})
    with pytest.raises(UserError, match=r"blocks.0.attn.qkv is factorised already"):
        factorise(model, {"blocks.0.attn.qkv": some})
    with pytest.raises(UserError, match=r"factorised already: blocks.0.attn.qkv and 7 more"):
        find_targets(model, img_size=32)


def test_the_monitor_watches_the_product_as_the_layer_it_stands_for(tmp_path: Path):
    model, ema = in_factors(0), in_factors(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with watch(model, tmp_path, ema, split_qkv=True) as monitor:
        monitor.observe(0)
        monitor.wait()
    (record,) = monitor.records()
    assert record.values["spec/refresh/failed"] == 0
    found = {key: value for key, value in record.values.items() if key.endswith("/numerical_rank") and "blocks" in key}
    assert len(found) == 2 * 2 * (3 + 3)
    assert set(found.values()) == {8.0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def content_of(path: Path) -> Mapping[str, Any]:
    return torch.load(path, weights_only=True)


def test_a_compressed_checkpoint_keeps_the_ranks_and_a_merged_one_is_plain_timms(tmp_path: Path):
    model = in_factors()
    save_compressed(model, tmp_path / "small.pth.tar", None, "vit_tiny_patch16_224", {"method": "svd"})
    content = content_of(tmp_path / "small.pth.tar")
    assert content["lowrank_ranks"] == ranks_of(model)
    assert read_checkpoint(tmp_path / "small.pth.tar").lowrank_ranks == ranks_of(model)
    with torch.no_grad():
        expected = model(IMAGES)
    merge(model)
    save_compressed(model, tmp_path / "merged.pth", None, "vit_tiny_patch16_224", {"method": "svd"})
    assert "lowrank_ranks" not in content_of(tmp_path / "merged.pth")
    plain = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "merged.pth"), **SMALL).eval()
    with torch.no_grad():
        assert (plain(IMAGES) - expected).abs().max() < 1e-5 * expected.abs().max()
    tensors = tmp_path / "merged.safetensors"
    save_compressed(model, tensors, None, "vit_tiny_patch16_224", {"method": "svd", "budget": 0.5})
    assert read_checkpoint(tensors).content["compression"] == {"method": "svd", "budget": 0.5}
    again = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tensors), **SMALL)
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in again.state_dict().items())
    with pytest.raises(UserError, match=r"small.npz does not end like"):
        save_compressed(model, tmp_path / "small.npz", None, "vit_tiny_patch16_224", {})
