"""Adapters: what they add up to is PEFT's own merge, on the model, in a state dict and for the spectra."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.lora import KEY, Lora, add_adapters, classifiers, has_adapter, lora_of, merged, require_peft
from lowrank_vit.spectral.heads import attention_blocks
from lowrank_vit.spectral.layers import matrices_of, targets_of_model
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.watching.watched import directions_of, remark_on_directions
from tests.hidden_packages import hidden_packages

NAMES = tuple(f"blocks.{n}.{layer}" for n in range(2) for layer in DEFAULT_TARGETS.split(","))
LORA = Lora(3, 6.0, NAMES)


def vit(name: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(1)
    size: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model(name, num_classes=3, **size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def adapted(dropout: float = 0.0) -> nn.Module:
    """A model whose adapters have learnt something."""
    model = vit()
    add_adapters(model, LORA, dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def merged_by_peft(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain timm model, by PEFT's merge."""
    model = copy.deepcopy(model)
    for name in NAMES:
        layer: Any = model.get_submodule(name)
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model.state_dict()


def test_a_model_begins_as_it_was_and_adapters_and_head_alone_are_trained():
    model, plain = vit().train(), vit()
    before = model.eval()(images())
    model.train()
    model.get_submodule("blocks.1").eval()
    add_adapters(model, LORA, 0.1)
    assert [module.training for module in (model.get_submodule("blocks.0.attn.qkv.lora_A"), model)] == [True, True]
    assert not any(module.training for module in model.get_submodule("blocks.1").modules())
    assert torch.equal(model.eval()(images()), before)
    assert lora_of(model) == LORA
    assert Lora.of_content(LORA.content(), "it") == LORA
    assert lora_of(plain) is None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {f"{name}.lora_{one}.default.weight" for name in NAMES for one in "AB"}
    assert trained == adapters | {"head.weight", "head.bias"}
    for decay in (None, 0.7):
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=decay)
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        assert stepped == {id(model.get_parameter(name)) for name in trained}
        if decay:  # by the blocks that they are in
            scale = {id(one): group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
            of_blocks = [scale[id(model.get_parameter(f"blocks.{n}.mlp.fc1.lora_A.default.weight"))] for n in (0, 1)]
            assert of_blocks == pytest.approx([0.7**2, 0.7])


def test_merged_weights_are_pefts_and_load_into_plain_timm_with_the_same_logits():
    model = adapted()
    found = merged(model.state_dict(), lora_of(model), "it")
    expected, plain = merged_by_peft(model), vit()
    assert list(found) == list(plain.state_dict())
    for name, tensor in found.items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)
    plain.load_state_dict(found)
    torch.testing.assert_close(plain.eval()(images()), model.eval()(images()), atol=1e-5, rtol=0)


def test_spectra_are_of_layer_and_adapter_together():
    model = adapted()
    expected = merged_by_peft(model)
    for split in (False, True):
        chosen = targets_of_model(model, DEFAULT_TARGETS, split)
        assert chosen == targets_of_model(vit(), DEFAULT_TARGETS, split)
        found = matrices_of(model, chosen)
        plain = vit()
        plain.load_state_dict(expected)
        for name, matrix in matrices_of(plain, chosen).items():
            assert found[name].dtype is torch.float64
            torch.testing.assert_close(found[name], matrix.double(), atol=1e-7, rtol=1e-6)
    assert list(attention_blocks(model, "folded")) == ["blocks.0", "blocks.1"]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    chosen = targets_of_model(model, DEFAULT_TARGETS)
    assert not directions_of(model, optimizer, chosen)
    assert "has an adapter, and the optimizer steps those" in remark_on_directions(model, optimizer, chosen)


def test_a_step_is_one_graph_and_leaves_what_is_frozen(monkeypatch: pytest.MonkeyPatch):
    model = adapted().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(images()).float().square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_both_heads_of_a_distilled_model_are_trained():
    model = vit("deit_tiny_distilled_patch16_224")
    assert set(classifiers(model)) == {"head", "head_dist"}
    add_adapters(model, LORA)
    assert all(model.get_parameter(f"{head}.weight").requires_grad for head in ("head", "head_dist"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state.pop("blocks.0.attn.qkv.lora_A.default.weight"), "blocks.0.attn.qkv has no adapter"),
        (lambda state: state.pop("blocks.1.mlp.fc1.base_layer.weight"), "blocks.1.mlp.fc1 has no weight"),
        (
            lambda state: state.update({"blocks.0.mlp.fc2.lora_B.default.weight": torch.zeros(24, 2)}),
            "the adapter of blocks.0.mlp.fc2 is not of rank 3",
        ),
    ],
)
def test_adapters_that_a_file_does_not_tell_of_are_refused(change: Any, why: str):
    state = dict(adapted().state_dict())
    change(state)
    with pytest.raises(UserError, match=f"it: {why}.*and its `{KEY}` differ"):
        merged(state, LORA, "it")
    with pytest.raises(UserError, match=rf"it has adapters \(.*but no `{KEY}` with their scale"):
        merged(state, None, "it")


@pytest.mark.parametrize(
    "told",
    [
        {},
        [],
        4,
        {"rank": 0, "alpha": 1.0, "layers": ["a"]},
        {"rank": 2, "alpha": float("nan"), "layers": ["a"]},
        {"rank": 2, "alpha": 1.0, "layers": []},
        {"rank": 2, "alpha": 1.0, "layers": [1]},
        {"rank": 2.0, "alpha": 1.0, "layers": ["a"]},
    ],
)
def test_what_tells_of_no_adapters_is_refused(told: Any):
    with pytest.raises(UserError, match=r"it is damaged: its `lora` lacks the rank, alpha or layers"):
        Lora.of_content(told, "it")


def test_a_missing_package_is_named():
    said = r"needs the package peft.*pip install 'lowrank-vit\[lora\]'"
    with hidden_packages("peft"), pytest.raises(UserError, match=said):
        require_peft()
    assert not has_adapter(vit().get_submodule("blocks.0.attn.qkv"))  # and is not wanted for that
