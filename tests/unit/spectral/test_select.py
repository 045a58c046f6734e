"""Which weights a comma-separated list of patterns chooses."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.layers import matrices_of, targets_of_model
from lowrank_vit.spectral.select import (
    DEFAULT_TARGETS,
    choose_targets,
    module_depth,
    module_type,
    select_targets,
    take_targets,
)


def outline(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)


def test_default_targets_are_the_four_matrices_of_every_block_in_model_order(vit: VisionTransformer) -> None:
    chosen = select_targets(dict(vit.named_parameters()), DEFAULT_TARGETS)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(chosen) == [f"blocks.{block}.{kind}" for block in range(2) for kind in kinds]
    assert chosen["blocks.1.attn.qkv"] is vit.get_parameter("blocks.1.attn.qkv.weight")


def test_order_of_patterns_repeats_and_blanks_do_not_matter(vit: VisionTransformer) -> None:
    weights = dict(vit.named_parameters())
    assert list(select_targets(weights, " mlp.fc1 ,attn.qkv, ,mlp.fc1,")) == list(
        select_targets(weights, "attn.qkv,mlp.fc1")
    )


def test_a_state_dict_with_buffers_gives_the_same_names(vit: VisionTransformer) -> None:
    from_state = select_targets(vit.state_dict() | {"step": torch.tensor(3)}, DEFAULT_TARGETS)
    assert list(from_state) == list(select_targets(dict(vit.named_parameters()), DEFAULT_TARGETS))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head"]),
        ("blocks.1.attn.proj", ["blocks.1.attn.proj"]),
        ("proj", ["blocks.0.attn.proj", "blocks.1.attn.proj"]),  # not the 4-D patch_embed.proj
        ("1.mlp.fc2", ["blocks.1.mlp.fc2"]),
    ],
)
def test_a_pattern_is_a_whole_name_or_an_ending_at_a_dot(
    vit: VisionTransformer, pattern: str, expected: list[str]
) -> None:
    assert list(select_targets(dict(vit.named_parameters()), pattern)) == expected


@pytest.mark.parametrize("pattern", ["fc", "ttn.qkv", "norm1", "blocks"])
def test_parts_of_words_and_weights_that_are_no_matrix_do_not_match(vit: VisionTransformer, pattern: str) -> None:
    with pytest.raises(UserError, match=f"'{pattern}' matches no 2-D weight"):
        select_targets(dict(vit.named_parameters()), f"attn.qkv,{pattern}")


def test_the_error_names_the_nearest_ending_and_those_that_exist(vit: VisionTransformer) -> None:
    with pytest.raises(UserError, match=r"'attn\.qvk'.*meant 'attn\.qkv'.*attn\.qkv, attn\.proj, mlp\.fc1, mlp\.fc2"):
        select_targets(dict(vit.named_parameters()), "attn.qvk")


def test_no_pattern_and_no_matrix_are_errors(vit: VisionTransformer) -> None:
    with pytest.raises(UserError, match=r"^--spec-targets ' , ' names nothing"):
        select_targets(dict(vit.named_parameters()), " , ")
    with pytest.raises(UserError, match="no 2-D weight at all"):
        select_targets({"norm.weight": torch.ones(3)}, "norm")


@pytest.mark.parametrize("patterns", ["nothing", "", "norm1"])
def test_an_error_begins_with_the_flag_that_gave_the_names(vit: VisionTransformer, patterns: str) -> None:
    weights = dict(vit.named_parameters())
    with pytest.raises(UserError, match=r"^--lowrank-targets[: ]"):
        select_targets(weights, patterns, "--lowrank-targets")
    with pytest.raises(UserError, match=r"^--spec-targets[: ]"):
        targets_of_model(vit, patterns)
    with pytest.raises(UserError, match=r"^--targets[: ]"):
        choose_targets(weights, patterns, flags="--")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.qkv", "attn.qkv"),
        ("layers.2.blocks.11.mlp.fc1", "mlp.fc1"),
        ("head", "head"),
        ("pre.head.fc", "pre.head.fc"),
        ("experts.3", "experts.3"),
    ],
)
def test_module_type_is_what_follows_the_last_number(name: str, kind: str) -> None:
    assert module_type(name) == kind


@pytest.mark.parametrize(
    ("name", "depth"), [("blocks.3.attn.qkv", "3"), ("layers.2.blocks.11.mlp.fc1", "2.11"), ("head", "")]
)
def test_module_depth_is_its_numbers(name: str, depth: str) -> None:
    assert module_depth(name) == depth


def test_splitting_gives_what_the_attention_computes_with(vit: VisionTransformer) -> None:
    weights = dict(vit.named_parameters())
    parts = targets_of_model(vit, "attn.qkv,attn.proj", split_qkv=True)
    assert list(parts)[:4] == [
        "blocks.0.attn.qkv.q",
        "blocks.0.attn.qkv.k",
        "blocks.0.attn.qkv.v",
        "blocks.0.attn.proj",
    ]
    matrices = take_targets(lambda module: weights[f"{module}.weight"], parts)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = torch.nn.functional.linear(x, weights["blocks.0.attn.qkv.weight"]).reshape(1, 5, 3, 8).unbind(2)
    for letter, expected in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(x @ matrices[f"blocks.0.attn.qkv.{letter}"].T, expected)
    assert [module_type(name) for name in parts][:2] == ["attn.qkv.q", "attn.qkv.k"]
    assert matrices["blocks.0.attn.proj"] is weights["blocks.0.attn.proj.weight"]


def test_splitting_needs_a_qkv_that_divides_by_three(vit: VisionTransformer) -> None:
    with pytest.raises(UserError, match=r"^--spec-split-qkv: none of the watched matrices \(mlp.fc1\)"):
        choose_targets(dict(vit.named_parameters()), "mlp.fc1", split_qkv=True)
    with pytest.raises(UserError, match="16 rows, which do not divide"):
        choose_targets({"attn.qkv.weight": torch.ones(16, 4)}, "qkv", split_qkv=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_patch_embedding_is_the_matrix_that_its_patches_are_multiplied_with(
    vit: VisionTransformer, memory_format: torch.memory_format
) -> None:
    model = copy.deepcopy(vit).to(memory_format=memory_format)
    chosen = targets_of_model(model, "patch_embed.proj,mlp.fc1")
    assert list(chosen) == ["patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    matrix = matrices_of(model, chosen)["patch_embed.proj"]
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.functional.unfold(images, 8, stride=8).mT
    bias = model.get_parameter("patch_embed.proj.bias")
    torch.testing.assert_close(patches @ matrix.T + bias, model.patch_embed(images))


def test_an_ending_of_matrices_does_not_take_convolutions_along(vit: VisionTransformer) -> None:
    weights = dict(vit.named_parameters())
    assert "patch_embed.proj" not in select_targets(weights, "proj")
    assert next(iter(select_targets(weights, "patch_embed.proj,proj"))) == "patch_embed.proj"
    with pytest.raises(UserError, match=r"Endings that exist: .*head; convolutions: patch_embed\.proj"):
        select_targets(weights, "nothing")


def test_separate_projections_are_proposed_in_place_of_a_fused_one() -> None:
    model = outline("eva02_base_patch14_448")
    with pytest.raises(UserError, match="qkv") as told:
        targets_of_model(model, DEFAULT_TARGETS)
    line = re.search(r'--spec-targets "([^"]*)"', str(told.value))
    assert line
    proposed = line[1].split(",")
    assert proposed[:4] == ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"]
    assert set(proposed[4:]) == {"mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}
    assert len(targets_of_model(model, line[1])) == 12 * len(proposed)
    with pytest.raises(UserError, match=r'--targets "attn\.q,attn\.kv"'):
        choose_targets({"attn.q.weight": torch.ones(3, 3), "attn.kv.weight": torch.ones(3, 3)}, "attn.qkv", flags="--")


def test_a_shared_weight_is_found_under_each_of_its_names(vit: VisionTransformer) -> None:
    model = copy.deepcopy(vit)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, assignment]
    online, offline = targets_of_model(model, "1.mlp.fc1"), choose_targets(model.state_dict(), "1.mlp.fc1")
    assert list(online) == list(offline) == ["blocks.1.mlp.fc1"]
    assert matrices_of(model, online)["blocks.1.mlp.fc1"] is model.get_parameter("blocks.0.mlp.fc1.weight")
