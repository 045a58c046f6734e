"""Factorised layers and the files that hold them: rebuilt by every reader, refused where ranks and factors disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Optim
from lowrank_vit.model.class_match import Classes, Trust
from lowrank_vit.model.create import create_model
from lowrank_vit.model.fit import load_initial, load_weights
from lowrank_vit.model.low_rank import LowRankLinear, merge, parts_of, product, ranks_of, with_products
from lowrank_vit.model.optimizer import create_optimizer
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.spectral.analyze import choose_weights
from lowrank_vit.spectral.layers import matrices_of, targets_of_model

NAME = "vit_tiny_patch16_224"
KWARGS = ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=2")
LAYERS = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1")


def made(seed: int = 0, num_classes: int = 7, *more: str) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(NAME, num_classes, img_size=32, model_kwargs=(*KWARGS, *more)).eval()


def in_factors(seed: int = 0, names: tuple[str, ...] = LAYERS, rank: int = 4, parts: int = 1) -> nn.Module:
    model = made(seed)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        up, down = torch.randn(layer.out_features, rank) / 9, torch.randn(parts * rank, layer.in_features) / 9
        model.set_submodule(name, LowRankLinear(up, down, layer.bias))
    return model


def saved(path: Path, model: nn.Module, **content: Any) -> Path:
    ranks = ranks_of(model)
    torch.save({"arch": NAME, "state_dict": model.state_dict(), "lowrank_ranks": ranks, **content}, path)
    return path


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IMAGES)


def test_parts_are_known_from_the_shapes():
    assert [parts_of((6, 2), down) for down in ((2, 5), (4, 5), (6, 5), (3, 5), (8, 5), (0, 5))] == [1, 2, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="no product"):
        LowRankLinear(torch.ones(6, 2), torch.ones(3, 5))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_in_factors_computes_its_product_compiled_or_not(parts: int, has_bias: bool):
    torch.manual_seed(0)
    layer = LowRankLinear(torch.randn(12, 2), torch.randn(2 * parts, 5), torch.randn(12) if has_bias else None)
    x = torch.randn(2, 3, 4, 5).permute(0, 2, 1, 3)
    blocks = zip(layer.up.chunk(parts), layer.down.chunk(parts), strict=True)
    expected = x @ torch.cat([up @ down for up, down in blocks]).mT + (layer.bias if layer.bias is not None else 0)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer.merged()(x), expected, atol=1e-5)
    assert torch.allclose(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected, atol=1e-5)


def test_what_watches_weights_sees_the_product_under_the_layers_own_name():
    model = in_factors(parts=3)
    whole = in_factors(parts=3)
    merge(whole)
    watched, expected = targets_of_model(model, "attn.qkv,mlp.fc1"), targets_of_model(whole, "attn.qkv,mlp.fc1")
    assert watched == expected
    split = targets_of_model(model, "attn.qkv", split_qkv=True)
    assert list(split) == [f"blocks.{i}.attn.qkv.{one}" for i in (0, 1) for one in "qkv"]
    of_model, cpu = matrices_of(model, watched), torch.device("cpu")
    of_state = choose_weights(model.state_dict(), "attn.qkv,mlp.fc1", False, cpu, NAME)
    assert of_state[1] == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    for name, matrix in matrices_of(whole, expected).items():
        assert torch.allclose(of_model[name].float(), matrix, rtol=1e-6, atol=1e-7)
        assert torch.equal(of_model[name], of_state[0][name])
        assert of_model[name].dtype is (torch.float64 if name in LAYERS else torch.float32)
    assert list(with_products(model.state_dict())) == list(made().state_dict())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", ["pth", "without ranks", "safetensors", "half", "wrapped"])
def test_every_form_of_file_rebuilds_the_model(tmp_path: Path, form: str, parts: int):
    model, path = in_factors(parts=parts), tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "half":
        model.half().float()
    states = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if form == "half":
        states = {name: tensor.half() for name, tensor in states.items()}
    elif form == "wrapped":
        states = {f"module.{name}": tensor for name, tensor in states.items()}
    if form == "safetensors":
        save_file(states, path)
    else:
        ranks = {} if form == "without ranks" else {"lowrank_ranks": ranks_of(model)}
        torch.save({"state_dict": states, **ranks}, path)
    other, said = made(5), list[str]()
    load_initial(other, path, NAME, said.append)
    assert ranks_of(other) == dict.fromkeys(LAYERS, 4)
    assert torch.equal(logits(other), logits(model))
    assert said == [f"initial weights: those of {path}, 2 factorised layers"]


def wrong_rank(content: dict[str, Any]) -> None:
    content["lowrank_ranks"]["blocks.1.mlp.fc1"] = 5


def unknown_name(content: dict[str, Any]) -> None:
    content["lowrank_ranks"]["blocks.7.mlp.fc1"] = 4


def one_untold(content: dict[str, Any]) -> None:
    del content["lowrank_ranks"]["blocks.1.mlp.fc1"]


def no_ranks_at_all(content: dict[str, Any]) -> None:
    content["lowrank_ranks"] = [4, 4]


def cut_factor(content: dict[str, Any]) -> None:
    content["state_dict"]["blocks.1.mlp.fc1.down"] = content["state_dict"]["blocks.1.mlp.fc1.down"][:3]


def lost_factor(content: dict[str, Any]) -> None:
    del content["state_dict"]["blocks.1.mlp.fc1.up"]


def untold_lost_factor(content: dict[str, Any]) -> None:
    lost_factor(content)
    del content["lowrank_ranks"]


def of_another_width(content: dict[str, Any]) -> None:
    content["arch"] = "vit_small_patch16_224"
    content["state_dict"]["blocks.1.mlp.fc1.down"] = torch.ones(4, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_rank, r"rank 5 for blocks.1.mlp.fc1, but the factors have rank 4"),
        (unknown_name, r"lists a rank but has no factors for blocks.7.mlp.fc1"),
        (one_untold, r"has factors but lists no rank for blocks.1.mlp.fc1"),
        (no_ranks_at_all, r"its `lowrank_ranks` is \[4, 4\], not a rank for each layer name"),
        (cut_factor, r"lists a rank but has no factors for blocks.1.mlp.fc1"),
        (lost_factor, r"lists a rank but has no factors for blocks.1.mlp.fc1"),
        (untold_lost_factor, r"are missing \(blocks.1.mlp.fc1.weight\).*unknown here \(blocks.1.mlp.fc1.down\)"),
        (of_another_width, r"saved from vit_small.*blocks.1.mlp.fc1.down is \(4, 48\) there, \(4, 24\) here"),
    ],
)
def test_files_whose_ranks_and_factors_disagree_are_refused(tmp_path: Path, change: Any, message: str):
    content = torch.load(saved(tmp_path / "x.pth", in_factors()), weights_only=True)
    change(content)
    torch.save(content, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth.*{message}"):
        load_weights(made(), checkpoint, checkpoint.weights(use_ema=False), NAME)


def test_a_file_in_factors_of_a_deeper_model_is_refused(tmp_path: Path):
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", in_factors()))
    with pytest.raises(UserError, match=r"does not fit --model .*unknown here \(blocks.1.attn.proj.bias\)"):
        load_weights(made(0, 7, "depth=1"), checkpoint, checkpoint.weights(use_ema=False), NAME)


def test_pretrained_path_gives_a_new_head_and_keeps_the_factors(tmp_path: Path):
    model = in_factors(names=(*LAYERS, "head"), parts=1)
    path, said = saved(tmp_path / "x.pth", model), list[str]()
    other = create_model(
        NAME, 3, img_size=32, model_kwargs=KWARGS, pretrained_file=read_checkpoint(path), say=said.append
    )
    assert ranks_of(other) == dict.fromkeys(LAYERS, 4)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items() if n.startswith("blocks."))
    assert "pretrained weights: head of 7 classes replaced by one of 3" in said
    same = create_model(NAME, 7, img_size=32, model_kwargs=KWARGS, pretrained_file=read_checkpoint(path)).eval()
    assert torch.equal(logits(same), logits(model))


def test_a_head_in_factors_follows_the_names_of_the_classes(tmp_path: Path):
    names = [f"class{i}" for i in range(7)]
    model = in_factors(names=("head",))
    path = saved(tmp_path / "x.pth", model, class_names=names)
    assert read_checkpoint(path).num_outputs(("head",)) == 7
    other = made(3)
    load_initial(other, path, NAME, lambda line: None, (Classes("data", 7, names[::-1]), Trust()))
    assert torch.allclose(logits(other), logits(model).flip(1))


def test_an_average_in_factors_is_loaded_into_a_copy_of_the_model(tmp_path: Path):
    model, ema = in_factors(0), in_factors(1)
    checkpoint = read_checkpoint(saved(tmp_path / "x.pth", model, state_dict_ema=ema.state_dict()))
    other = made(4)
    for use_ema, expected in ((False, model), (True, ema)):
        load_weights(other, checkpoint, checkpoint.weights(use_ema), NAME)
        assert torch.equal(logits(other), logits(expected))


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_factors_are_in_their_blocks_group_and_decay_as_weights_do(layer_decay: float | None):
    model = in_factors()
    optimizer = create_optimizer(Optim(opt="adamw", weight_decay=0.05, layer_decay=layer_decay), model, 1e-3)
    of_name = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for layer in LAYERS:
        bias = of_name[id(model.get_parameter(f"{layer}.bias"))]
        beside = of_name[
            id(model.get_parameter(f"{layer.partition('.mlp')[0].partition('.attn')[0]}.attn.proj.weight"))
        ]
        for end in ("up", "down"):
            group = of_name[id(model.get_parameter(f"{layer}.{end}"))]
            assert (group["weight_decay"], bias["weight_decay"]) == (0.05, 0)
            assert group.get("lr_scale") == beside.get("lr_scale") == bias.get("lr_scale")


def test_muon_takes_factors_as_it_takes_weights():
    model = in_factors()
    optimizer = create_optimizer(Optim(opt="nadamuon", muon_fallback=True), model, 1e-3)
    uses = {id(p): group.get("use_fallback", False) for group in optimizer.param_groups for p in group["params"]}
    assert not any(uses[id(model.get_parameter(f"{LAYERS[0]}.{end}"))] for end in ("up", "down"))
    logits_of = model.train()(IMAGES)
    logits_of.sum().backward()
    optimizer.step()
    assert product(*(model.get_parameter(f"{LAYERS[0]}.{end}") for end in ("up", "down"))).isfinite().all()
